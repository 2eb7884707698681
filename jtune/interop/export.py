"""`jtune export CASE.yaml`: the base and its adapters as one Hugging Face checkpoint."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jtune import tuning
from jtune.config import Config
from jtune.data import get_template, load_tokenizer
from jtune.errors import ConfigError
from jtune.interop import hf, peft
from jtune.models import abstract_params, logical_axes
from jtune.models.families import decoder_config
from jtune.sharding import make_mesh, tree_shardings

log = logging.getLogger("jtune")


def run(config: Config) -> Path:
    """Merge `adapter_name_or_path`, in order, into `model_name_or_path`; write the result to `export_dir`.

    Merging is done in float32, then cast to `infer_dtype` (default: what the base is stored in). What is written is for
    transformers and for everything that reads its checkpoints.

    Returns:
      `export_dir`.

    Raises:
      ConfigError: `export_dir` is the base's own folder.
      DataError: what is wrong with the files.
    """
    args = config.model
    base, out = hf.fetch(args.model_name_or_path or "", **args.hub), Path(args.export_dir or "")
    if out.resolve() == base.resolve():
        raise ConfigError(f"export_dir: {out} is the folder of the base itself: give another one")
    source = hf.read_config(base)
    decoder = decoder_config(source)
    tokenizer = load_tokenizer(str(base), split_special_tokens=args.split_special_tokens)
    if config.data.template is not None:
        get_template(config.data.template, tokenizer)  # gives the tokenizer the template's eos and pad tokens

    log.info("reading weights of %s", args.model_name_or_path)
    axes = logical_axes(decoder)
    params: Any = hf.load_params(base, decoder, shardings=tree_shardings(axes, abstract_params(decoder), make_mesh()))
    dtype = hf.stored_dtype(source) if args.infer_dtype == "auto" else jnp.dtype(args.infer_dtype)
    for path in args.adapter_name_or_path:
        log.info("merging adapter %s", path)
        loaded, _ = peft.load_adapter(params, decoder, path, subfolder=args.adapter_folder, **args.hub)
        params = tuning.lora.merge(loaded)
    hf.save_model(params, decoder, source, out, max_shard_bytes=args.export_size * 10**9, dtype=dtype)
    tokenizer.save_pretrained(out)
    hf.copy_generation_config(base, out)
    count = sum(x.size for x in jax.tree.leaves(params))
    log.info("wrote %s parameters in %s to %s", f"{count:,}", dtype.name, out)
    return out
