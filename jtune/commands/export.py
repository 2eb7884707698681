"""`jtune export CASE.yaml`: the base and its adapters as one Hugging Face checkpoint."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtune.config import Config
from jtune.data import template_of
from jtune.errors import ConfigError
from jtune.files import whole_or_absent
from jtune.interop import hf, manifest, serving
from jtune.interop.endings import forget_tokenizer, resolve_endings, write_generation, write_tokenizer
from jtune.loading import vocabulary
from jtune.loading.model import adapter_reader
from jtune.loading.source import fetch_model, read_source
from jtune.models import CausalLM, DecoderConfig
from jtune.sharding import make_mesh
from jtune.tuning import count

log = logging.getLogger("jtune")

TOKENS = 32  # length of the sequence whose logits are compared


def export(config: Config) -> Path:
    """Merge `adapter_name_or_path`, in order, into `model_name_or_path`; write the result to `export_dir`.

    Merging is done in float32, a layer of a kernel at a time, and rounded to `infer_dtype` (default: the dtype of the
    stored base). The written model is read again, and its logits are compared with those of the base with its
    adapters. transformers, and all that read its checkpoints, read the folder; it appears only when it is complete.

    Returns:
      `export_dir`.

    Raises:
      ConfigError: `export_dir` is the base's own folder.
      DataError: a file is missing or malformed.
    """
    for note in config.notes:
        log.info("note: %s", note)
    args = config.model
    base, out = fetch_model(args), Path(args.export_dir or "")
    if out.resolve() == base.resolve():
        raise ConfigError(f"export_dir: {out} is the folder of the base itself: give another one")
    source = read_source(config, base, trains=False)
    decoder, tokenizer = source.decoder, source.tokenizer
    template = None if config.data.template is None else template_of(config.data, tokenizer, for_training=False)
    endings = resolve_endings(config, template, tokenizer, source.config_json, base)

    log.info("reading weights of %s", args.model_name_or_path)
    mesh = make_mesh()
    read = partial(vocabulary.load_params, decoder=decoder, mesh=mesh, seed=config.training.seed)
    params = read(base, change=source.change)
    dtype = source.stored_dtype if args.infer_dtype == "auto" else jnp.dtype(args.infer_dtype)
    read_adapter = adapter_reader(args)
    for path in args.adapter_name_or_path:
        log.info("reading adapter %s", path)
        params, _ = read_adapter(params, decoder, path)
    before = sample_logits(decoder, params)
    with whole_or_absent(out) as unfinished:
        write_tokenizer(unfinished, tokenizer)
        write_generation(unfinished, endings)
        stops = endings.eos if template is None else dict.fromkeys((*endings.eos, *template.stop_ids))
        form = None if template is None else template.form
        text, missing = serving.modelfile(form, tokenizer, tokenizer.convert_ids_to_tokens(list(stops)))
        (unfinished / serving.MODELFILE).write_text(text, encoding="utf-8")
        manifest.write(unfinished, manifest.describe(config, base))
        size = args.export_size * 10**9
        hf.save_model(params, decoder, endings.source, unfinished, base=base, max_shard_bytes=size, dtype=dtype)
        del params  # there is room for one model
        params = read(unfinished, change=None)
        difference = np.abs(sample_logits(decoder, params) - before).max()
        forget_tokenizer(out)
    log.info(
        "logits of the written model differ by at most %.3g from those of the base with its adapters; "
        "the largest logit is %.3g",
        difference,
        np.abs(before).max(),
    )
    log.info("wrote %s parameters in %s to %s", f"{count(params):,}", dtype.name, out)
    if missing:
        log.info("%s has no TEMPLATE: %s", out / serving.MODELFILE, missing)
    log.info("to serve it, type one of these\n  %s", "\n  ".join(serving.next_commands(out)))
    return out


def sample_logits(decoder: DecoderConfig, params: Any) -> np.ndarray:
    """Logits float32 `[TOKENS, vocab]` of a fixed sequence, from all over the vocabulary, computed in float32."""
    ids = np.linspace(0, decoder.vocab_size - 1, TOKENS).astype(np.int32)[None]
    model = CausalLM(decoder, dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda params: model.apply({"params": params}, ids))(params)[0])
