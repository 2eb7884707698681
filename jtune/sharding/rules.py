"""One table from the names of a parameter's axes to the mesh, and the shardings that follow from it."""

import math

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jtune.sharding.mesh import BATCH_AXES

# logical axis -> mesh axis. `embed` over fsdp is ZeRO-3: every kernel has it, so every kernel is split.
RULES = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": None,
    "layers": None,
    None: None,
}


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """The partition of an array whose dimensions have these logical names.

    A dimension that its mesh axis does not divide is left whole, and a mesh axis serves one dimension only (the first).
    """
    used: set[str] = set()
    parts: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        axis = RULES[name]
        if axis is None or axis in used or mesh.shape[axis] == 1 or size % mesh.shape[axis]:
            parts.append(None)
        else:
            parts.append(axis)
            used.add(axis)
    return P(*parts)


def tree_shardings(axes, shapes, mesh: Mesh):
    """Shardings of a parameter tree.

    Args:
      axes: tree of tuples of logical axis names (`jtune.models.logical_axes`).
      shapes: tree of anything with `.shape`, of the same structure.
    """
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, spec(names, leaf.shape, mesh)),
        shapes,
        axes,
        is_leaf=lambda x: x is None,
    )


def shard_like(leaf, mesh: Mesh) -> NamedSharding:
    """Place what has no declared axes (adapters): over `fsdp` on the largest dimension that it divides."""
    n = mesh.shape["fsdp"]
    dims = [d for d in range(1, leaf.ndim) if leaf.shape[d] % n == 0] if n > 1 else []
    if not dims or math.prod(leaf.shape) < 2**16:  # a small array costs more to gather than to keep
        return NamedSharding(mesh, P())
    largest = max(dims, key=lambda d: leaf.shape[d])
    return NamedSharding(mesh, P(*(("fsdp" if d == largest else None) for d in range(leaf.ndim))))


def batch_sharding(mesh: Mesh, *, accumulated: bool) -> NamedSharding:
    """Rows over `data` and `fsdp`; arrays are `[accum, batch, seq]` when accumulated, else `[batch, seq]`."""
    return NamedSharding(mesh, P(None, BATCH_AXES) if accumulated else P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
