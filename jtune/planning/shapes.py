"""A run as shapes: everything that its step takes, as `ShapeDtypeStruct`s with shardings. Nothing is read or allocated.

Works on a mesh of devices, and on an `AbstractMesh`, which has none: enough for all but compiling.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jtune import tuning
from jtune.config import Config
from jtune.data import Sizes, array_shapes
from jtune.errors import ConfigError
from jtune.evaluation.references import of_step
from jtune.loading.model import abstract_model, requested_remat, with_remat
from jtune.loading.second import abstract_second
from jtune.loading.source import Source
from jtune.losses.batch import sharding_of
from jtune.sharding.mesh import AXES
from jtune.sharding.rules import replicated
from jtune.stages import stage_of
from jtune.train.program import Program, make_program


def abstract_program(config: Config, source: Source, mesh: Mesh | AbstractMesh, *, platform: str) -> Program:
    """The train step of `config` on `mesh`, put together as `jtune train` does it, on shapes.

    With `remat: auto`, which depends on the rows (`jtune.planning.remat.sound_remat`), the module has "full".

    Args:
      platform: of the devices of the mesh: "tpu", "gpu", "cpu".
    """
    model = abstract_model(config, source, mesh, platform=platform)
    second = None if source.second is None else abstract_second(source.second, mesh, platform=platform)
    policy = requested_remat(config.training, config.model)
    module = with_remat(model.module, "full" if policy == "auto" else policy, platform)
    objective = stage_of(config.finetuning.stage).objective(config.finetuning, config.training)
    model = model._replace(module=module, second=second)
    return make_program(config, model, mesh, of_step(config, objective))


def batch_shapes(
    shape: tuple[int, int, int], sizes: Sizes, mesh: Mesh | AbstractMesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of an update of `[accum, batch, seq]`, as `BatchPlan.update` makes it."""
    everywhere = replicated(mesh)  # type: ignore[arg-type]
    found = {
        name: jax.ShapeDtypeStruct(of_array, dtype, sharding=sharding_of(name, mesh))  # type: ignore[arg-type]
        for name, (of_array, dtype) in array_shapes(shape, sizes).items()
    }
    return found | {"divisor": jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)}


def abstract_mesh(devices: int, **sizes: int) -> AbstractMesh:
    """A mesh without devices; axes that are not named have size 1, and `fsdp` what is left.

    Raises:
      ConfigError: the sizes do not divide `devices`.
    """
    others = math.prod(size for axis, size in sizes.items() if axis != "fsdp")
    if devices % others:
        raise ConfigError(f"{sizes} does not divide {devices} devices")
    all_sizes = dict.fromkeys(AXES, 1) | sizes | {"fsdp": devices // others}
    return AbstractMesh(tuple(all_sizes[axis] for axis in AXES), AXES)


def local_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def global_bytes(tree: Any) -> int:
    """Bytes of a tree, each array counted once."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bytes_by_kind(program: Program, batch: Any) -> dict[str, int]:
    """What a device holds between updates, exact but for the padding that a layout may need."""
    second = program.constants.second if program.second is not None else None
    adapters, trained = tuning.partition(program.state.trainable, tuning.adapter_mask(program.state.trainable))
    return {
        "frozen_parameters": local_bytes(program.constants) - local_bytes(second),
        "second_model": local_bytes(second),
        "trained_parameters": local_bytes(trained),
        "adapters": local_bytes(adapters),
        "optimizer_state": local_bytes(program.state.opt_state),
        "batch": local_bytes(batch),
    }
