"""The logical axes of a parameter tree after tuning has changed it."""

from collections.abc import Callable
from typing import Any

import jax

from jtune.models import DecoderConfig, logical_axes
from jtune.models.value_head import AXES
from jtune.tuning.nodes import Axes, is_node

# Adapter stacks of fewer elements cost more to gather than to keep whole.
SMALL_ADAPTER = 2**16


def prepared_axes(params: Any, decoder: DecoderConfig) -> Any:
    """The logical axes of a prepared tree's leaves: those of the decoder, and of a node's, what the node says."""
    of = declared_axes(decoder)
    lies = lambda path, leaf: leaf.lies(of(path), SMALL_ADAPTER) if is_node(leaf) else of(path)
    return jax.tree_util.tree_map_with_path(lies, params, is_leaf=is_node)


def declared_axes(decoder: DecoderConfig) -> Callable[[Any], Axes]:
    """The logical axes of the decoder and of a value head, by a path of `jax.tree_util`; layers in whatever stacks."""
    is_axes = lambda x: isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)
    names = lambda path: tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    declared = jax.tree_util.tree_leaves_with_path(logical_axes(decoder), is_leaf=is_axes)
    by_name = {names(path): axes for path, axes in declared} | AXES
    return lambda path: by_name[names(path)]
