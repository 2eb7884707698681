"""How a mesh splits attention."""

import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jtune.sharding.mesh import BATCH_AXES

# ---------------------------------------------------------------------- kernels over a mesh


class Parts(NamedTuple):
    """How a mesh cuts attention up."""

    axes: tuple[tuple[str, ...] | None, str | None, str | None]  # that rows, heads, and queries of a row lie over
    tensor: int
    context: int


def parts_of(mesh: Mesh | None, q_BTHD: jax.Array, k_BSKD: jax.Array) -> Parts:
    """What does not divide is computed on each device."""
    sizes = dict(mesh.shape) if mesh is not None else {}
    rows = tuple(axis for axis in BATCH_AXES if sizes.get(axis, 1) > 1)
    if q_BTHD.shape[0] % math.prod(sizes[axis] for axis in rows):
        rows = ()
    tensor, context = sizes.get("tensor", 1), sizes.get("context", 1)
    tensor = tensor if q_BTHD.shape[2] % tensor == 0 and k_BSKD.shape[2] % tensor == 0 else 1
    axes = rows or None, "tensor" if tensor > 1 else None, "context" if context > 1 else None
    return Parts(axes, tensor, context)
