"""One table from the names of array axes to the mesh, and the shardings that follow from it."""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jtune.sharding.mesh import BATCH_AXES

# Logical axis -> mesh axes. `embed` over fsdp is ZeRO-3: every kernel has it, so every kernel is split. The devices of
# `expert` and `context` hold other rows or tokens, so each would need a copy of the parameters: they split them too.
ZERO_AXES = ("fsdp", "expert", "context")
RULES: dict[str | None, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "experts": ("expert",),
    "embed": ZERO_AXES,
    "rank": ZERO_AXES,  # of adapters whose other dimension is not `embed`
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # activations; heads, kv_heads, mlp and vocab are the same ones
    "batch": BATCH_AXES,
    "sequence": ("context",),
    "whole_row_heads": ("tensor", "context"),  # where no row can be split
    "shards": (*BATCH_AXES, "context"),  # labelled positions, dealt out to all who split tokens
    None: (),
}


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """The partition of an array whose dimensions have these logical names.

    A mesh axis that does not divide the dimension is left out, and a mesh axis serves one dimension only (the first).
    """
    used: set[str] = set()
    parts: list[Any] = []
    for name, size in zip(axes, shape, strict=True):
        mine: tuple[str, ...] = ()
        for axis in RULES[name]:
            n = mesh.shape[axis]
            if n > 1 and axis not in used and size % n == 0:
                mine, size = (*mine, axis), size // n
        used.update(mine)
        parts.append(mine[0] if len(mine) == 1 else mine or None)
    return P(*parts)


def only(where: P, axes: Collection[str]) -> P:
    """What `where` says of the mesh axes `axes`.

    >>> only(P(("fsdp", "expert"), "tensor"), ("fsdp",)) == P("fsdp", None)
    True
    """
    parts = [tuple(axis for axis in named(part) if axis in axes) for part in where]
    return P(*(part[0] if len(part) == 1 else part or None for part in parts))


def named(part: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a partition: a name, several, or None."""
    return () if part is None else part if isinstance(part, tuple) else (part,)


def divides(tokens: P, mesh: Mesh) -> bool:
    """Whether each device has tokens of its own, but for those along `tensor`: what `tokens` says of them."""
    split = {axis for part in tokens for axis in named(part)}
    return all(axis in split for axis in (*BATCH_AXES, "context") if mesh.shape[axis] > 1)


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """`x`, said to lie as its logical axes tell; without a mesh, or on one device, nothing is said.

    >>> constrain(x_BTD, mesh, "batch", "sequence", None)                                      # doctest: +SKIP
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, mesh)))


def gather(x: jax.Array, where: P, axes: Collection[str] = ZERO_AXES) -> jax.Array:
    """Inside `jax.shard_map`: `x`, which lies as `where` says, whole along the mesh axes `axes`.

    The gradient is the other way round: summed over these axes, and each device keeps its part.
    """
    for dim, part in enumerate(where):
        mine = tuple(axis for axis in named(part) if axis in axes)
        if mine:
            x = jax.lax.all_gather(x, mine, axis=dim, tiled=True)
    return x


def tree_shardings(axes, shapes, mesh: Mesh):
    """Shardings of a parameter tree.

    Args:
      axes: tree of tuples of logical axis names (`jtune.models.logical_axes`).
      shapes: tree of anything with `.shape`, of the same structure.
    """
    return jax.tree.map(
        lambda leaf, names: None if leaf is None else NamedSharding(mesh, spec(names, leaf.shape, mesh)),
        shapes,
        axes,
        is_leaf=lambda x: x is None,
    )


class Unsplit(NamedTuple):
    """A parameter that a mesh axis was meant to split and does not."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # the mesh axes that divide none of the dimensions they are for
    bytes: int  # what each device holds more than if they did


def unsplit(axes, params, mesh: Mesh) -> list[Unsplit]:
    """The parameters that are not split as far as the table says, those that cost most first.

    Args:
      axes: tree of tuples of logical axis names, of the structure of `params`.
      params: tree of anything with `.shape` and `.dtype`.
    """
    found = []

    def look(path, leaf, names):
        wanted = {axis for name in names for axis in RULES[name] if mesh.shape[axis] > 1}
        where = spec(names, leaf.shape, mesh)
        split = {axis for part in where for axis in named(part)}
        missing = tuple(axis for axis in mesh.axis_names if axis in wanted - split)
        if missing:
            held = math.prod(NamedSharding(mesh, where).shard_shape(leaf.shape)) * leaf.dtype.itemsize
            needless = held - held // math.prod(mesh.shape[axis] for axis in missing)
            found.append(Unsplit(jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape, missing, needless))

    jax.tree_util.tree_map_with_path(look, params, axes)
    return sorted(found, key=lambda x: -x.bytes)


def describe_unsplit(found: list[Unsplit], most: int = 4) -> str:
    """One line about them, with what they cost."""
    shown = [f"{x.path} {list(x.shape)} over {', '.join(x.axes)} ({x.bytes / 1e6:,.1f} MB)" for x in found[:most]]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    total = sum(x.bytes for x in found) / 1e6
    return f"not split, as the mesh does not divide them: {'; '.join(shown)}{more}. {total:,.1f} MB more on each device"


def batch_sharding(mesh: Mesh, *, accumulated: bool) -> NamedSharding:
    """Rows over `batch`, tokens over `sequence`; arrays are `[accum, batch, seq]` when accumulated, or `[batch, seq]`.

    The sizes must divide: rows do by plan, and `jtune.sharding.check_row_length` says whether tokens do.
    """
    rows = P(BATCH_AXES, *RULES["sequence"])
    return NamedSharding(mesh, P(None, *rows) if accumulated else rows)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
