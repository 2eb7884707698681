"""From the arguments of a run to a model that can be asked."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtune import tuning
from jtune.config import Config, ModelArguments
from jtune.data import Template, template_of
from jtune.errors import ConfigError
from jtune.interop import hf, peft
from jtune.loading import vocabulary
from jtune.loading.model import compute_dtype, fetch_model, placement, read_base
from jtune.models import CausalLM
from jtune.models.attention.choose import choose
from jtune.models.families import decoder_config
from jtune.sharding import check_experts
from jtune.sharding.compiler import use_compile_cache
from jtune.sharding.mesh import mesh_of
from jtune.tuning.prepare import in_dtypes

log = logging.getLogger("jtune")


class Loaded(NamedTuple):
    model: CausalLM
    params: Any
    tokenizer: Any
    folder: Path  # of the model
    template: Template | None = None


def load(config: Config, *, for_chat: bool = False) -> Loaded:
    """The model and its adapters, not merged, on the devices that are there, split as the arguments `mesh_*` say.

    Where no adapter is given, what the same arguments have trained is taken: see `trained`.

    Args:
      for_chat: the template is wanted, too; it is made before weights are read.

    Raises:
      ConfigError: there are no weights yet, or no template that is wanted.
      DataError: what is wrong with the files.
    """
    args = trained(config)
    use_compile_cache(config.training.compile_cache_dir)
    mesh = mesh_of(config.training)
    folder = fetch_model(args)
    source = hf.read_config(folder)
    settled = vocabulary.resolve_vocabulary(replace(config, model=args), folder, decoder_config(source))
    decoder, tokenizer = settled.decoder, settled.tokenizer
    template = template_of(config.data, tokenizer, for_training=False) if for_chat else None
    check_experts(mesh, decoder.num_experts)
    if args.infer_dtype == "auto":
        dtype = compute_dtype(config.training, config.finetuning.pure_bf16, hf.stored_dtype(source))
    else:
        dtype = jnp.dtype(args.infer_dtype)
    params = read_base(folder, args, decoder, settled.change, mesh, seed=config.training.seed)
    for i, path in enumerate(args.adapter_name_or_path):
        log.info("adapter %s", path)
        params = tuning.lora.merge(params) if i else params
        params, _ = peft.load_adapter(
            params, decoder, path, subfolder=args.adapter_folder, base=args.model_name_or_path, **args.hub
        )
    params = in_dtypes(params, jax.tree.map(lambda _: False, params), dtype, dtype)
    params = jax.device_put(params, placement(params, decoder, mesh))
    device = mesh.local_devices[0]
    backend, _ = choose(args.flash_attn, device.platform, decoder, dtype, device)
    return Loaded(CausalLM(decoder, dtype=dtype, attention=backend, mesh=mesh), params, tokenizer, folder, template)


def trained(config: Config) -> ModelArguments:
    """Which model is meant: of a training file without an adapter, the one that it has trained, if it has.

    Raises:
      ConfigError: the file trains a model from random weights, and has not yet.
    """
    args, out = config.model, Path(config.training.output_dir)
    asked = config.training.do_train or "output_dir" in config.origins
    if asked and not args.adapter_name_or_path:
        if config.finetuning.finetuning_type == "lora" and (out / peft.CONFIG).exists():
            log.info("the adapter is the one in output_dir, %s", out)
            return replace(args, adapter_name_or_path=(str(out),), adapter_folder=None)
        if config.finetuning.finetuning_type != "lora" and (out / "config.json").exists():
            log.info("the model is the one in output_dir, %s", out)
            return replace(args, model_name_or_path=str(out))
    if args.train_from_scratch:
        raise ConfigError(
            f"train_from_scratch: {args.model_name_or_path} has no weights, and there is no model in output_dir "
            f"({out}) yet: `jtune train` writes one there"
        )
    return args
