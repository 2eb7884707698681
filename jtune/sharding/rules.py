"""One table from the names of array axes to the mesh, and the shardings that follow from it."""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jtune.sharding.mesh import BATCH_AXES

# Logical axis -> mesh axes. `embed` over fsdp is ZeRO-3: every kernel has this axis, so every kernel is split. The
# devices along `expert` and `context` hold different rows or tokens, so each would need a copy of the parameters:
# parameters are split over these axes too.
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
    # activations; heads, kv_heads, mlp and vocab are as above
    "batch": BATCH_AXES,
    "sequence": ("context",),
    "whole_row_heads": ("tensor", "context"),  # in layers that cannot split rows
    "shards": (*BATCH_AXES, "context"),  # labelled positions, distributed over all devices that split tokens
    None: (),
}


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """The partition of an array whose dimensions have these logical names.

    A mesh axis that does not divide the dimension is left out, and a mesh axis serves one dimension only (the first).
    """
    used: set[str] = set()
    entries: list[Any] = []
    for name, size in zip(axes, shape, strict=True):
        mine: tuple[str, ...] = ()
        for axis in RULES[name]:
            n = mesh.shape[axis]
            if n > 1 and axis not in used and size % n == 0:
                mine, size = (*mine, axis), size // n
        used.update(mine)
        entries.append(mine[0] if len(mine) == 1 else mine or None)
    return P(*entries)


def only(where: P, axes: Collection[str]) -> P:
    """The partition `where`, restricted to the mesh axes `axes`.

    >>> only(P(("fsdp", "expert"), "tensor"), ("fsdp",)) == P("fsdp", None)
    True
    """
    entries = [tuple(axis for axis in named(entry) if axis in axes) for entry in where]
    return P(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))


def named(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a partition: a name, several, or None."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def divides(tokens: P, mesh: Mesh) -> bool:
    """Whether the partition `tokens` gives each device tokens of its own (devices along `tensor` share them)."""
    split = {axis for part in tokens for axis in named(part)}
    return all(axis in split for axis in (*BATCH_AXES, "context") if mesh.shape[axis] > 1)


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """Constrain `x` to the sharding of its logical axes. Without a mesh, or on one device, return `x`.

    >>> constrain(x_BTD, mesh, "batch", "sequence", None)                                      # doctest: +SKIP
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, mesh)))


def gather(x: jax.Array, where: P, axes: Collection[str] = ZERO_AXES) -> jax.Array:
    """Inside `jax.shard_map`: all-gather `x`, whose partition is `where`, along the mesh axes `axes`.

    The gradient is reduce-scattered: summed over these axes, and each device keeps its shard.
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
    """A parameter that a mesh axis should split but does not."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # the mesh axes that divide none of their dimensions
    bytes: int  # extra bytes on each device


def unsplit(axes, params, mesh: Mesh) -> list[Unsplit]:
    """The parameters that are not split as far as `RULES` allows, largest cost first.

    Args:
      axes: tree of tuples of logical axis names, of the structure of `params`.
      params: tree of anything with `.shape` and `.dtype`.
    """
    replicated_leaves = []

    def look(path, leaf, names):
        wanted = {axis for name in names for axis in RULES[name] if mesh.shape[axis] > 1}
        where = spec(names, leaf.shape, mesh)
        split = {axis for part in where for axis in named(part)}
        missing = tuple(axis for axis in mesh.axis_names if axis in wanted - split)
        if missing:
            size = math.prod(NamedSharding(mesh, where).shard_shape(leaf.shape)) * leaf.dtype.itemsize
            extra = size - size // math.prod(mesh.shape[axis] for axis in missing)
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            replicated_leaves.append(Unsplit(name, leaf.shape, missing, extra))

    jax.tree_util.tree_map_with_path(look, params, axes)
    return sorted(replicated_leaves, key=lambda x: -x.bytes)


def describe_unsplit(leaves: list[Unsplit], most: int = 4) -> str:
    """One line about parameters that are not split, with their cost."""
    shown = [f"{x.path} {list(x.shape)} over {', '.join(x.axes)} ({x.bytes / 1e6:,.1f} MB)" for x in leaves[:most]]
    more = f" and {len(leaves) - most} more" if len(leaves) > most else ""
    total = sum(x.bytes for x in leaves) / 1e6
    cause = "the mesh axis does not divide the dimension"
    return f"replicated: {cause}: {'; '.join(shown)}{more}. {total:,.1f} MB more on each device"


def batch_sharding(mesh: Mesh, *, accumulated: bool) -> NamedSharding:
    """Rows over `batch`, tokens over `sequence`; arrays are `[accum, batch, seq]` when accumulated, or `[batch, seq]`.

    The mesh must divide the sizes. The plan makes rows divisible; `jtune.sharding.check_row_length` checks tokens.
    """
    rows = P(BATCH_AXES, *RULES["sequence"])
    return NamedSharding(mesh, P(None, *rows) if accumulated else rows)


def unit_sharding(mesh: Mesh) -> NamedSharding:
    """What is said of the units of each row, `[accum, batch, ...]`: split as the rows are."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
