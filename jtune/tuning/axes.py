"""The logical axes of a parameter tree after tuning has changed it."""

from typing import Any

import jax

from jtune.models import DecoderConfig, logical_axes
from jtune.tuning.nodes import Axes, Node, is_node, map_fields

# Adapter stacks of fewer elements cost more to gather than to keep whole.
SMALL_ADAPTER = 2**16


def prepared_axes(params: Any, decoder: DecoderConfig) -> Any:
    """The logical axes of a prepared tree's leaves: those of the decoder, and of a node's, what the node says."""
    is_axes = lambda x: isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)
    names = lambda path: tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    declared = jax.tree_util.tree_leaves_with_path(logical_axes(decoder), is_leaf=is_axes)
    by_name = {names(path): axes for path, axes in declared}
    of = lambda path, leaf: _of_node(leaf, by_name[names(path)]) if is_node(leaf) else by_name[names(path)]
    return jax.tree_util.tree_map_with_path(of, params, is_leaf=is_node)


def _of_node(node: Node, kernel: Axes) -> Any:
    declared = node.axes(kernel)

    def of(name: str, value: Any) -> Any:
        if name == "base" and value is not None:
            return _of_node(value, kernel) if is_node(value) else kernel
        small = lambda x: name in node.adapter and x.size < SMALL_ADAPTER
        return jax.tree.map(lambda x: (None,) * x.ndim if small(x) or name not in declared else declared[name], value)

    return map_fields(of, node)
