"""The one assembly of a model: from a path and arguments to its decoder, dtype and parameters."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jtune import tuning
from jtune.config import FinetuningArguments, ModelArguments, TrainingArguments
from jtune.errors import ConfigError
from jtune.interop import hf, peft
from jtune.loading import vocabulary
from jtune.models import CausalLM, DecoderConfig, init_params
from jtune.models.attention.choose import choose
from jtune.models.families import decoder_config
from jtune.sharding import (
    arrays,
    check_experts,
    tree_shardings,
)
from jtune.tuning import quantize
from jtune.tuning.vocabulary import Change

log = logging.getLogger("jtune")


class Model(NamedTuple):
    """A model that is ready to train: what it is, where it came from, and its parameters on the mesh."""

    module: CausalLM
    decoder: DecoderConfig
    source: dict[str, Any]  # the Hugging Face config.json
    params: Any
    mask: Any  # tree of bool: what trains


def compute_dtype(
    training: TrainingArguments, pure_bf16: bool, stored: jnp.dtype, platform: str | None = None
) -> jnp.dtype:
    """What matrix products are computed in: `bf16` or `fp16` if asked for, else what the weights are stored in.

    On CPU without `bf16`/`fp16` it is float32, as there is nothing to gain. TPUs have no float16 units.
    """
    platform = platform or jax.default_backend()
    if training.fp16 and platform == "tpu":
        log.info("fp16: TPUs compute in bfloat16 instead, which needs no loss scaling")
        return jnp.dtype(jnp.bfloat16)
    if training.fp16:
        return jnp.dtype(jnp.float16)
    if training.bf16 or pure_bf16 or (platform != "cpu" and stored == jnp.bfloat16):
        return jnp.dtype(jnp.bfloat16)
    return jnp.dtype(jnp.float32)


def load_model(
    folder: Path,
    args: ModelArguments,
    finetuning: FinetuningArguments,
    decoder: DecoderConfig,
    source: dict[str, Any],
    mesh: Mesh,
    *,
    dtype: jnp.dtype,
    seed: int,
    change: Change | None = None,
) -> Model:
    """Weights read straight to their place, adapters and freezing applied, trainable leaves in float32.

    Frozen leaves are kept in the compute dtype if that is smaller than what is stored: no float32 copy of them exists.

    Args:
      decoder, source: with the vocabulary of the run.
      change: what makes it of the one that is stored.
    """
    check_experts(mesh, decoder.num_experts)
    form = form_of(args)
    if args.train_from_scratch:
        log.info("drawing random weights (train_from_scratch)")
        draw = lambda key: quantize.apply(init_params(decoder, key, jnp.float32), form)
        shardings = placement(jax.eval_shape(draw, jax.random.key(seed)), decoder, mesh)
        params = quantize.placed(jax.jit(draw, out_shardings=shardings)(jax.random.key(seed)), decoder, mesh)
    else:
        params = read_base(folder, args, decoder, change, mesh, seed=seed)
    read_adapter = partial(peft.load_adapter, subfolder=args.adapter_folder, base=args.model_name_or_path, **args.hub)
    params, mask = tuning.prepare(
        params,
        finetuning,
        decoder,
        adapters=args.adapter_name_or_path,
        load_adapter=read_adapter,
        key=jax.random.key(seed),
        frozen_dtype=dtype,
    )
    params = jax.tree.map(arrays.put, params, placement(params, decoder, mesh))
    device = mesh.local_devices[0]
    backend, why = choose(args.flash_attn, device.platform, decoder, dtype, device)
    log.info("attention: %s (%s)", backend, why)
    module = CausalLM(decoder, dtype=dtype, attention=backend, mesh=mesh)
    return Model(module, decoder, source, params, mask)


def form_of(args: ModelArguments) -> quantize.Form | None:
    """How the base is kept: as it is stored, or in the 4 or 8 bits of `quantization_bit`."""
    return quantize.form_of(args.quantization_bit, args.quantization_type, args.double_quantization)


def read_base(
    folder: Path, args: ModelArguments, decoder: DecoderConfig, change: Change | None, mesh: Mesh, *, seed: int
) -> Any:
    """The weights of a model, straight to their places; quantised on the way, if `quantization_bit` says so."""
    form = form_of(args)
    log.info("reading weights of %s%s", args.model_name_or_path, f", kept in {form}" if form else "")
    return quantize.placed(vocabulary.load_params(folder, decoder, change, mesh, seed=seed, form=form), decoder, mesh)


def asked_remat(training: TrainingArguments, model: ModelArguments) -> str:
    """What the backward pass computes again: a policy of `CausalLM.remat`, or "auto".

    `disable_gradient_checkpointing` is LLaMA-Factory's name for "none".
    """
    return "none" if training.remat == "auto" and model.disable_gradient_checkpointing else training.remat


def with_remat(module: CausalLM, remat: str, platform: str) -> CausalLM:
    """The module with a remat policy. Its layers are unrolled on CPUs and GPUs when it keeps everything: what is kept
    is then used where it was written. TPUs compile a loop in a fraction of the time.
    """
    return module.clone(remat=remat, unrolled=platform != "tpu" and remat == "none")


def decoder_of(source: Mapping[str, Any], args: ModelArguments) -> DecoderConfig:
    """The decoder that a config.json describes, with what the arguments change of it.

    Raises:
      ConfigError: they ask for what this model does not have.
      DataError: see `jtune.models.families.decoder_config`.
    """
    decoder = decoder_config(source)
    if not args.moe_aux_loss_coef:
        return decoder
    if decoder.experts is None:
        raise ConfigError(f"moe_aux_loss_coef: {decoder.family} has no experts to balance: leave it out")
    return replace(decoder, experts=replace(decoder.experts, aux_coef=args.moe_aux_loss_coef))


def fetch_model(args: ModelArguments) -> Path:
    """The folder of `model_name_or_path`, downloaded if it is a hub id."""
    if args.model_name_or_path is None:
        raise ConfigError("model_name_or_path is not set: the folder of a Hugging Face model, or a hub id")
    return hf.fetch(args.model_name_or_path, **args.hub)


def placement(params: Any, decoder: DecoderConfig, mesh: Mesh) -> Any:
    """Shardings of a prepared tree, by the logical axes of its leaves.

    Args:
      params: of arrays or `jax.ShapeDtypeStruct`s; stacks of layers and nodes as tuning made them.
    """
    return tree_shardings(tuning.prepared_axes(params, decoder), params, mesh)


def abstract_like(tree: Any) -> Any:
    """The tree as `ShapeDtypeStruct`s with shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
