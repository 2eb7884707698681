"""The device mesh: `data` and `fsdp` split the batch, `fsdp` and `tensor` split the parameters."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jtune.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(*, data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with axes `data`, `fsdp`, `tensor`; at most one size is -1, "what is left".

    The default puts every device on `fsdp`: parameters, gradients and optimizer state are split over all of them.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise ConfigError(f"at most one mesh size may be -1, but {', '.join('mesh_' + a for a in free)} are")
    if free:
        sizes[free[0]] = max(1, len(devices) // fixed)
    if math.prod(sizes.values()) != len(devices):
        asked = ", ".join(f"mesh_{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(f"{asked} asks for {math.prod(sizes.values())} devices, but there are {len(devices)}")
    # Auto, said aloud: the default of make_mesh is Explicit, which Linen modules cannot be traced under.
    return jax.make_mesh(
        tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def batch_shards(mesh: Mesh) -> int:
    """How many pieces the batch is cut into: the number of data-parallel replicas in LLaMA-Factory's arithmetic."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
