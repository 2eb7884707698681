"""Freeze tuning: some layers train, the others do not, and stacks are cut where that changes."""

import difflib
from collections.abc import Collection, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any

import jax

from jtune.errors import ConfigError
from jtune.models.decoder import numbered, stacks
from jtune.tuning.masks import learns

PyTree = Any


def trainable_layers(count: int, wanted: int) -> range:
    """The layers that train: the last `wanted`, or the first ones if it is negative."""
    return range(max(0, count - wanted), count) if wanted > 0 else range(min(-wanted, count))


def expanded_layers(count: int, expanded: int) -> range:
    """The layers that an expansion by `expanded` layers has added (LLaMA Pro, arXiv:2401.02415): every so many-th.

    >>> list(expanded_layers(12, 3))
    [3, 7, 11]

    Raises:
      ConfigError: they cannot be evenly spaced.
    """
    if expanded < 1 or count % expanded:
        raise ConfigError(
            f"use_llama_pro: `num_layers` {count} should be divisible by `num_layer_trainable` {expanded} "
            "(freeze_trainable_layers): the model that scripts/llama_pro.py writes has layers added, and the number "
            "of those is what belongs there"
        )
    stride = count // expanded
    return range(stride - 1, count, stride)


def borders(layers: Collection[int]) -> list[int]:
    """Where a model is to be cut so that every stack lies within `layers` or outside of them.

    >>> borders([3, 4, 7])
    [3, 5, 7, 8]
    """
    return sorted(i for i in {*layers, *(i + 1 for i in layers)} if (i in layers) != (i - 1 in layers))


def cut_layers(params: PyTree, at: Sequence[int]) -> PyTree:
    """Cut stacks of layers into shorter ones, so that gradients exist only for those that train."""
    parts = []
    for numbers, stack in numbered(params["layers"]):
        ends = [0, *sorted({i - numbers.start for i in at if i in numbers[1:]}), len(numbers)]
        parts += [jax.tree.map(itemgetter(slice(a, b)), stack) for a, b in pairwise(ends)]
    return {**params, "layers": tuple(parts) if len(parts) > 1 else parts[0]}


def freeze(
    params: PyTree, layers: int, modules: Sequence[str], extra: Sequence[str], *, expanded: bool = False
) -> tuple[PyTree, PyTree]:
    """(params with its layers cut, mask), as LLaMA-Factory's freeze tuning selects them.

    Args:
      layers: how many train (`freeze_trainable_layers`).
      expanded: they are those that an expansion has added (`expanded_layers`).
      modules: names right under a layer (`mlp`, `self_attn`, `input_layernorm` ...), or `all`.
      extra: names outside the layers (`embed_tokens`, `norm`, `lm_head`). As there, a name counts wherever it is part
        of a parameter's name: `norm` is also part of every layer's `input_layernorm`.

    Raises:
      ConfigError: a name that matches nothing, or a number of layers that does not.
    """
    inside = list(dict.fromkeys(name for stack in stacks(params["layers"]) for name in stack))
    outside = [name for name in params if name != "layers"]
    for name in modules:
        if name != "all" and name not in inside:
            raise ConfigError(_unknown("freeze_trainable_modules", name, ["all", *inside]))
    for name in extra:
        if name not in outside:
            tied = " (this model's head is its embed_tokens)" if name == "lm_head" else ""
            raise ConfigError(_unknown("freeze_extra_modules", name, outside) + tied)

    count = sum(len(numbers) for numbers, _ in numbered(params["layers"]))
    chosen = expanded_layers(count, layers) if expanded else trainable_layers(count, layers)
    cut = cut_layers(params, borders(chosen))

    def in_stack(first: int, stack: PyTree) -> PyTree:
        def trains(path: Any, _: Any) -> bool:
            names = [key.key for key in path]
            named = first in chosen and ("all" in modules or names[0] in modules)
            return learns(path) and (named or any(word in ".".join(names) for word in extra))

        return jax.tree_util.tree_map_with_path(trains, stack)

    masks = [in_stack(numbers.start, stack) for numbers, stack in numbered(cut["layers"])]
    mask = {name: jax.tree.map(lambda _, name=name: name in extra, params[name]) for name in outside}
    return cut, {**mask, "layers": tuple(masks) if len(masks) > 1 else masks[0]}


def _unknown(argument: str, name: str, there: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, there, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{argument}: {name!r} is not in this model.{hint} There are: {', '.join(there)}"
