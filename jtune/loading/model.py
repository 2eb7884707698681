"""The one assembly of a model: from the arguments of a run to its parameters, as arrays or as shapes."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jtune import tuning
from jtune.config import Config, ModelArguments, TrainingArguments
from jtune.interop import peft
from jtune.interop.peft_shapes import adapter_shapes
from jtune.loading import vocabulary
from jtune.loading.source import Source
from jtune.loading.value_head import head_shapes, load_value_head, scores, with_value_head
from jtune.models import CausalLM, DecoderConfig, abstract_params, init_params
from jtune.models.attention import choose
from jtune.sharding import arrays, check_experts, tree_shardings
from jtune.tuning import quantize

log = logging.getLogger("jtune")


class Model(NamedTuple):
    """A model that is ready to train."""

    module: CausalLM
    params: Any  # arrays on the mesh, or `jax.ShapeDtypeStruct`s with shardings
    mask: Any  # tree of bool: what trains
    second: "Model | None" = None  # the one beside it, if there is one (`jtune.loading.second`)


# ---------------------------------------------------------------------- for training


def load_model(config: Config, source: Source, mesh: Mesh) -> Model:
    """Read weights straight to their places, apply adapters and freezing; trainable leaves are float32.

    Frozen leaves are kept in the compute dtype if that is smaller than what is stored: no float32 copy of them exists.

    Raises:
      ConfigError: a name of `lora_target` and the like matches nothing.
      DataError: the weights cannot be read or do not fit config.json.
    """
    args, seed = config.model, config.training.seed
    check_experts(mesh, source.decoder.num_experts)
    if args.train_from_scratch:
        log.info("drawing random weights (train_from_scratch)")
        params = draw_base(args, source.decoder, mesh, seed=seed)
    else:
        params = read_base(args, source, mesh, seed=seed)
    dtype = compute_dtype(config, source)
    params, mask = tuned(config, source, params, dtype, adapter_reader(args))
    if scores(config):
        width, trains = source.decoder.hidden_size, config.training.do_train
        head = load_value_head(config, source.value_head, width, trains=trains)
        params, mask = with_value_head(params, mask, head)
    return on_devices(config, source, mesh, dtype, params, mask)


def on_devices(config: Config, source: Source, mesh: Mesh, dtype: jnp.dtype, params: Any, mask: Any) -> Model:
    """A model whose parameters are prepared: each where it belongs, with the attention that its devices have."""
    params = jax.tree.map(arrays.put, params, placement(params, source.decoder, mesh))
    backend, why = attention_of(config, source, mesh, dtype)
    log.info("attention: %s (%s)", backend, why)
    return Model(CausalLM(source.decoder, dtype=dtype, attention=backend, mesh=mesh), params, mask)


def abstract_model(config: Config, source: Source, mesh: Mesh | AbstractMesh, *, platform: str) -> Model:
    """`load_model` on shapes: nothing is read or allocated.

    Args:
      mesh: of devices, or without: enough for all but compiling.
      platform: of the devices: "tpu", "gpu", "cpu".
    """
    # Without devices nothing is compiled, so activations and kernels need no shardings.
    of_devices = mesh if isinstance(mesh, Mesh) else None
    dtype = compute_dtype(config, source, platform)
    stored = jnp.dtype(jnp.float32) if config.model.train_from_scratch else source.stored_dtype
    masks = []

    def prepared(params: Any) -> Any:
        kept = quantize.placed(quantize.apply(params, form_of(config.model)), source.decoder, of_devices)
        read = lambda params, decoder, path: adapter_shapes(params, decoder, path, config)
        params, mask = tuned(config, source, kept, dtype, read)
        if scores(config):
            params, mask = with_value_head(params, mask, head_shapes(source.decoder.hidden_size))
        masks.append(mask)
        return params

    params = jax.eval_shape(prepared, abstract_params(source.decoder, stored))
    shardings = placement(params, source.decoder, mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
    backend, _ = choose(config.model.flash_attn, platform, source.decoder, dtype)
    return Model(CausalLM(source.decoder, dtype=dtype, attention=backend, mesh=of_devices), params, masks[0])


def tuned(config: Config, source: Source, params: Any, dtype: jnp.dtype, read_adapter: Callable) -> tuple[Any, Any]:
    """The parameters as `finetuning_type` trains them, and the mask of what trains. Traceable."""
    return tuning.prepare(
        params,
        config.finetuning,
        source.decoder,
        adapters=config.model.adapter_name_or_path,
        load_adapter=read_adapter,
        key=jax.random.key(config.training.seed),
        frozen_dtype=dtype,
    )


# ---------------------------------------------------------------------- parts of it


def compute_dtype(config: Config, source: Source, platform: str | None = None) -> jnp.dtype:
    """The dtype of matrix products: `bf16` or `fp16` if asked for, else that of the stored weights.

    On CPU without `bf16`/`fp16` it is float32, as nothing is gained by less. TPUs have no float16 units.
    """
    platform = platform or jax.default_backend()
    training = config.training
    if training.fp16 and platform == "tpu":
        log.info("fp16: TPUs compute in bfloat16 instead, which needs no loss scaling")
        return jnp.dtype(jnp.bfloat16)
    if training.fp16:
        return jnp.dtype(jnp.float16)
    stored_bf16 = platform != "cpu" and source.stored_dtype == jnp.bfloat16
    return jnp.dtype(jnp.bfloat16 if training.bf16 or config.finetuning.pure_bf16 or stored_bf16 else jnp.float32)


def attention_of(config: Config, source: Source, mesh: Mesh, dtype: jnp.dtype) -> tuple[str, str]:
    """The attention kernel that a model gets on the devices of a mesh, and why."""
    device = mesh.local_devices[0]
    return choose(config.model.flash_attn, device.platform, source.decoder, dtype, device)


def form_of(args: ModelArguments) -> quantize.Form | None:
    """How the base is kept: as it is stored (None), or in the 4 or 8 bits of `quantization_bit`."""
    return quantize.form_of(args.quantization_bit, args.quantization_type, args.double_quantization)


def read_base(args: ModelArguments, source: Source, mesh: Mesh, *, seed: int) -> Any:
    """The weights of the base, read straight to their places; quantised on the way, if `quantization_bit` says so."""
    form = form_of(args)
    log.info("reading weights of %s%s", args.model_name_or_path, f", kept in {form}" if form else "")
    read = vocabulary.load_params(source.folder, source.decoder, source.change, mesh, seed=seed, form=form)
    return quantize.placed(read, source.decoder, mesh)


def draw_base(args: ModelArguments, decoder: DecoderConfig, mesh: Mesh, *, seed: int) -> Any:
    """Random weights in the place of those of the base."""
    draw = lambda key: quantize.apply(init_params(decoder, key, jnp.float32), form_of(args))
    shardings = placement(jax.eval_shape(draw, jax.random.key(seed)), decoder, mesh)
    return quantize.placed(jax.jit(draw, out_shardings=shardings)(jax.random.key(seed)), decoder, mesh)


def adapter_reader(args: ModelArguments) -> Callable:
    """`jtune.interop.peft.load_adapter` with what the arguments say of adapters' files."""
    return partial(peft.load_adapter, subfolder=args.adapter_folder, base=args.model_name_or_path, **args.hub)


def placement(params: Any, decoder: DecoderConfig, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of a prepared tree, by the logical axes of its leaves.

    Args:
      params: of arrays or `jax.ShapeDtypeStruct`s; stacks of layers and nodes as tuning made them.
    """
    return tree_shardings(tuning.prepared_axes(params, decoder), params, mesh)  # type: ignore[arg-type]


def requested_remat(training: TrainingArguments, model: ModelArguments) -> str:
    """What the arguments ask the backward pass to recompute: a policy of `CausalLM.remat`, or "auto".

    `disable_gradient_checkpointing` is LLaMA-Factory's name for "none".
    """
    return "none" if training.remat == "auto" and model.disable_gradient_checkpointing else training.remat


def with_remat(module: CausalLM, remat: str, platform: str) -> CausalLM:
    """The module with a remat policy.

    On CPUs and GPUs its layers are unrolled when it keeps everything: XLA then uses activations where they were
    written. TPUs compile a loop in a fraction of the time.
    """
    return module.clone(remat=remat, unrolled=platform != "tpu" and remat == "none")


def abstract_like(tree: Any) -> Any:
    """The tree as `ShapeDtypeStruct`s with shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
