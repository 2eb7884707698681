"""The logical axes of a parameter tree after tuning has changed it."""

from typing import Any

import jax

from jtune.models import DecoderConfig, logical_axes
from jtune.tuning.lora import is_adapter_leaf

# Adapter stacks of fewer elements cost more to gather than to keep whole.
SMALL_ADAPTER = 2**16


def prepared_axes(params: Any, decoder: DecoderConfig) -> Any:
    """The logical axes of a prepared tree's leaves: those of the decoder, and an adapter's, which follow its kernel's.

    An adapter `a` `[in, rank]` lies along `in` as its kernel does, `b` `[rank, out]` along `out`, each split along its
    other dimension where the first is not.
    """
    is_axes = lambda x: isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)
    names = lambda path: tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    declared = jax.tree_util.tree_leaves_with_path(logical_axes(decoder), is_leaf=is_axes)
    by_name = {names(path): axes for path, axes in declared}

    def axes_of(path: Any, leaf: Any) -> tuple[str | None, ...]:
        axes = by_name[names(path)]
        if not is_adapter_leaf(path):
            return axes
        *lead, inputs, outputs = axes
        if leaf.size < SMALL_ADAPTER:
            return (*lead, None, None)
        return (*lead, inputs, "rank") if path[-1].name == "a" else (*lead, "rank", outputs)

    return jax.tree_util.tree_map_with_path(axes_of, params)
