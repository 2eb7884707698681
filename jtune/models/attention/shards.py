"""The split of attention over a mesh."""

import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jtune.sharding.mesh import BATCH_AXES


class AttentionShards(NamedTuple):
    """The mesh axes that split attention, and the sizes of two of them."""

    axes: tuple[tuple[str, ...] | None, str | None, str | None]  # of rows, of heads, of the queries of a row
    tensor: int
    context: int


def shards_of(mesh: Mesh | None, q_BTHD: jax.Array, k_BSKD: jax.Array) -> AttentionShards:
    """The split of attention; an axis that does not divide its dimension repeats the work on each device."""
    sizes = dict(mesh.shape) if mesh is not None else {}
    rows = tuple(axis for axis in BATCH_AXES if sizes.get(axis, 1) > 1)
    if q_BTHD.shape[0] % math.prod(sizes[axis] for axis in rows):
        rows = ()
    tensor, context = sizes.get("tensor", 1), sizes.get("context", 1)
    tensor = tensor if q_BTHD.shape[2] % tensor == 0 and k_BSKD.shape[2] % tensor == 0 else 1
    axes = rows or None, "tensor" if tensor > 1 else None, "context" if context > 1 else None
    return AttentionShards(axes, tensor, context)
