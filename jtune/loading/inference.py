"""From the arguments of a run to a model that answers: for chat, eval and export, and for the REPL."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtune import tuning
from jtune.config import Config, ModelArguments
from jtune.config.run_folder import trained_folder
from jtune.data import Template, template_of
from jtune.errors import ConfigError
from jtune.interop import hf, peft
from jtune.loading.model import adapter_reader, attention_of, compute_dtype, placement, read_base
from jtune.loading.source import read_source
from jtune.loading.vocabulary import load_params, vocabulary_of
from jtune.models import CausalLM
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
    """The model and its adapters, not merged, on the devices of this machine, split as the arguments `mesh_*` say.

    Without an adapter among the arguments, `load` takes what the same arguments have trained: see `trained`.

    Args:
      for_chat: make the template, too, before weights are read.

    Raises:
      ConfigError: there are no weights yet, or no template that is wanted.
      DataError: what is wrong with the files.
    """
    config = replace(config, model=trained(config))
    args = config.model
    use_compile_cache(config.training.compile_cache_dir)
    mesh = mesh_of(config.training)
    source = read_source(config, trains=False)
    template = template_of(config.data, source.tokenizer, for_training=False) if for_chat else None
    check_experts(mesh, source.decoder.num_experts)
    dtype = compute_dtype(config, source) if args.infer_dtype == "auto" else jnp.dtype(args.infer_dtype)
    params = read_base(args, source, mesh, seed=config.training.seed)
    read_adapter = adapter_reader(args)
    for i, path in enumerate(args.adapter_name_or_path):
        log.info("adapter %s", path)
        params = tuning.lora.merge(params) if i else params
        params, _ = read_adapter(params, source.decoder, path)
    params = in_dtypes(params, jax.tree.map(lambda _: False, params), dtype, dtype)
    params = jax.device_put(params, placement(params, source.decoder, mesh))
    backend, _ = attention_of(config, source, mesh, dtype)
    module = CausalLM(source.decoder, dtype=dtype, attention=backend, mesh=mesh)
    return Loaded(module, params, source.tokenizer, source.folder, template)


def trained(config: Config) -> ModelArguments:
    """Which model is meant: of a training file without an adapter, the one that it has trained, if it has.

    Raises:
      ConfigError: the file trains a model from random weights, and has not yet.
    """
    args, out = config.model, Path(config.training.output_dir)
    asked = config.training.do_train or "output_dir" in config.origins
    if asked and not args.adapter_name_or_path:
        is_lora = config.finetuning.finetuning_type == "lora"
        what = "adapter" if is_lora else "model"
        found = trained_folder(out, peft.CONFIG if is_lora else "config.json")
        if found == out:
            log.info("the %s is the one in output_dir, %s", what, out)
        elif found is not None:
            log.info("the run in output_dir has not finished: the %s is that of %s", what, found)
        elif not args.train_from_scratch:
            log.info("there is no %s in output_dir, %s, yet: this is the model before training", what, out)
        if found is not None and is_lora:
            return replace(args, adapter_name_or_path=(str(found),), adapter_folder=None)
        if found is not None:
            return replace(args, model_name_or_path=str(found))
    if args.train_from_scratch:
        raise ConfigError(
            f"train_from_scratch: {args.model_name_or_path} has no weights, and there is no model in output_dir "
            f"({out}) yet: `jtune train` writes one there"
        )
    return args


def load_model(path: str, adapter: str | None = None, dtype: str = "float32") -> tuple[CausalLM, dict]:
    """Read a Hugging Face checkpoint, and a PEFT adapter onto it: a model in one call, for the REPL and for scripts.

    >>> model, params = load_model("path/to/model")                      # doctest: +SKIP
    >>> logits = model.apply({"params": params}, input_ids)              # doctest: +SKIP

    Args:
      path: a folder, or a hub id.
      adapter: a folder, or a hub id; its kernels are `jtune.lora.LoRA` nodes in `params`. An adapter that was trained
        with another vocabulary brings its rows along.
      dtype: of the parameters and of the computation.

    Returns:
      The module and its parameters, on the first device. `model.apply({"params": params}, input_ids, positions=None,
      segment_ids=None)` with int32 `[batch, seq]` gives logits float32 `[batch, seq, vocab]`.

    Raises:
      DataError: what is wrong with the files.
    """
    folder = hf.fetch(path)
    adapters = [] if adapter is None else [hf.fetch(adapter)]
    decoder, change = vocabulary_of(decoder_config(hf.read_config(folder)), folder, adapters)
    params = load_params(folder, decoder, change, None, seed=0, dtype=jnp.dtype(dtype))
    if adapter is not None:
        params, _ = peft.load_adapter(params, decoder, adapter, base=path)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    return CausalLM(decoder, dtype=jnp.dtype(dtype)), params
