"""A run as shapes: everything that its step takes, as `ShapeDtypeStruct`s with shardings. Nothing is read or allocated.

Works on a mesh of devices, and on an `AbstractMesh`, which has none: enough for all but compiling.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from jtune import tuning
from jtune.config import Config
from jtune.errors import ConfigError
from jtune.interop import hf
from jtune.interop.peft_shapes import adapter_shapes
from jtune.loading.model import asked_remat, compute_dtype, form_of, placement, with_remat
from jtune.losses.batch import Batch
from jtune.losses.objective import objective_of, step_constants
from jtune.models import CausalLM, DecoderConfig, abstract_params
from jtune.models.attention.choose import choose
from jtune.sharding.mesh import AXES
from jtune.sharding.rules import batch_sharding, replicated
from jtune.train.optimizer import optimizer_of
from jtune.train.state import TrainState, abstract_state
from jtune.tuning import quantize


class Shapes(NamedTuple):
    """What the train step is lowered for."""

    module: CausalLM
    tx: optax.GradientTransformation
    params: Any  # as tuning prepared them
    mask: Any  # what trains
    frozen: Any  # all that the step takes and does not change (`jtune.losses.objective.step_constants`)
    state: TrainState
    mesh: Mesh | AbstractMesh


def run_shapes(
    config: Config, decoder: DecoderConfig, source: dict[str, Any], mesh: Mesh | AbstractMesh, *, platform: str
) -> Shapes:
    """The model, its state and their places, as `jtune train` would have them on `mesh`.

    With `remat: auto`, which needs to know the rows (`jtune.planning.remat.sound_remat`), the module has "full".

    Args:
      source: the model's config.json.
      platform: of the devices of the mesh: "tpu", "gpu", "cpu".
    """
    training, finetuning = config.training, config.finetuning
    stored = jnp.dtype(jnp.float32) if config.model.train_from_scratch else hf.stored_dtype(source)
    dtype = compute_dtype(training, finetuning.pure_bf16, hf.stored_dtype(source), platform)
    # Without devices nothing is compiled, and where activations and kernels lie need not be said.
    of_devices = mesh if isinstance(mesh, Mesh) else None
    masks = []

    def prepared(params: Any) -> Any:
        params, mask = tuning.prepare(
            quantize.placed(quantize.apply(params, form_of(config.model)), decoder, of_devices),
            finetuning,
            decoder,
            adapters=config.model.adapter_name_or_path,
            load_adapter=lambda params, decoder, path: adapter_shapes(params, decoder, path, config),
            key=jax.random.key(0),
            frozen_dtype=dtype,
        )
        masks.append(mask)
        return params

    params = jax.eval_shape(prepared, abstract_params(decoder, stored))
    placed = placement(params, decoder, mesh)  # type: ignore[arg-type]
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed)
    trainable, frozen = tuning.partition(params, masks[0])
    held = step_constants(objective_of(finetuning, training), trainable, frozen, dtype)
    tx = optimizer_of(training, finetuning, trainable, decoder)
    state = abstract_state(trainable, tx, mesh, float16=dtype == jnp.float16)  # type: ignore[arg-type]
    backend, _ = choose(config.model.flash_attn, platform, decoder, dtype)
    policy = asked_remat(training, config.model)
    module = CausalLM(decoder, dtype=dtype, attention=backend, mesh=of_devices)
    module = with_remat(module, "full" if policy == "auto" else policy, platform)
    return Shapes(module, tx, params, masks[0], held, state, mesh)


def batch_shapes(shape: Sequence[int], mesh: Mesh | AbstractMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of an update of `[accum, batch, seq]`, as `BatchPlan.update` makes it."""
    rows, everywhere = batch_sharding(mesh, accumulated=True), replicated(mesh)  # type: ignore[arg-type]
    found = {
        name: jax.ShapeDtypeStruct(tuple(shape), jnp.float32 if name == "loss_weights" else jnp.int32, sharding=rows)
        for name in Batch.__annotations__
        if name != "divisor"
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


def bytes_by_kind(shapes: Shapes, batch: Any) -> dict[str, int]:
    """What a device holds between updates, exact but for the padding that a layout may need."""
    adapters, trained = tuning.partition(shapes.state.trainable, tuning.adapter_mask(shapes.state.trainable))
    return {
        "frozen_parameters": local_bytes(shapes.frozen),
        "trained_parameters": local_bytes(trained),
        "adapters": local_bytes(adapters),
        "optimizer_state": local_bytes(shapes.state.opt_state),
        "batch": local_bytes(batch),
    }
