"""The device mesh: its axes and their sizes.

`data`, `fsdp` and `expert` split the rows of a batch, `context` the tokens of a row, `tensor` each matrix product.
Parameters are split over all but `data` (see rules.py).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jtune.config import TrainingArguments
from jtune.errors import ConfigError

# Neighbours on the last axis are neighbours in hardware, so the axis with the most frequent collectives comes last.
AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = -1,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over `devices` (default: all) with the axes `AXES`; at most one size is -1: the remaining devices.

    The default puts every device on `fsdp`: parameters, gradients and optimizer state are split over all of them.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
    wrong = [f"mesh_{axis}={size}" for axis, size in sizes.items() if size != -1 and size < 1]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: a mesh size is a number of devices, or -1 for the remaining ones")
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise ConfigError(f"at most one mesh size may be -1, but {', '.join('mesh_' + a for a in free)} are")
    if free:
        sizes[free[0]] = max(1, len(devices) // fixed)
    if math.prod(sizes.values()) != len(devices):
        asked = ", ".join(f"mesh_{axis}={size}" for axis, size in sizes.items() if size > 1) or "a mesh of size 1"
        raise ConfigError(f"{asked} needs {math.prod(sizes.values())} devices, but there are {len(devices)}")
    # Linen modules cannot be traced under Explicit axes, the default of make_mesh.
    return jax.make_mesh(
        tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def batch_shards(mesh: Mesh) -> int:
    """How many shards the batch has: the number of data-parallel replicas in LLaMA-Factory's arithmetic."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_experts(mesh: Mesh, num_experts: int) -> None:
    """Raise a ConfigError if `mesh_expert` does not divide the experts of the model (0: it has none)."""
    size = mesh.shape["expert"]
    if size > 1 and not num_experts:
        raise ConfigError(f"mesh_expert={size}, but this model has no experts: use mesh_fsdp instead")
    if num_experts % size:
        raise ConfigError(f"mesh_expert={size} does not divide the {num_experts} experts of this model")


def check_row_length(mesh: Mesh, seq: int) -> None:
    """Raise a ConfigError if rows of `seq` tokens cannot be cut into `mesh_context` equal shards."""
    size = mesh.shape["context"]
    if seq % size:
        raise ConfigError(
            f"rows of {seq} tokens cannot be split over mesh_context={size}: with packing, and in stage pt, set "
            f"cutoff_len to a multiple of it, as {-(-seq // size) * size}; other rows are multiples of 64"
        )


def mesh_of(training: TrainingArguments, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that the arguments `mesh_*` ask for, over `devices` (default: all)."""
    return make_mesh(devices=devices, **{axis: getattr(training, f"mesh_{axis}") for axis in AXES})
