"""`jtune export CASE.yaml`: the base and its adapters as one Hugging Face checkpoint."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtune.config import Config
from jtune.data import Template, template_of
from jtune.errors import ConfigError
from jtune.files import whole_or_absent
from jtune.interop import hf, manifest, serving
from jtune.interop.classifier import Form, as_classifier, padding_token
from jtune.interop.endings import Endings, forget_tokenizer, resolve_endings, write_generation, write_tokenizer
from jtune.interop.value_head import FILE as VALUE_HEAD_FILE
from jtune.interop.value_head import forget_value_head, is_classifier, read_value_head, save_value_head
from jtune.loading import vocabulary
from jtune.loading.model import adapter_reader
from jtune.loading.source import fetch_model, read_source
from jtune.loading.value_head import head_beside, load_value_head, scores
from jtune.models import CausalLM, DecoderConfig
from jtune.models.decoder import hidden_states
from jtune.models.value_head import VALUE_HEAD, score, split_head
from jtune.sharding import make_mesh
from jtune.tuning import count

log = logging.getLogger("jtune")

TOKENS = 32  # length of the sequence whose logits are compared


def export(config: Config) -> Path:
    """Merge `adapter_name_or_path`, in order, into `model_name_or_path`; write the result to `export_dir`.

    Merging is done in float32, a layer of a kernel at a time, and rounded to `infer_dtype` (default: the dtype of the
    stored base). The written model is read again, and its logits are compared with those of the base with its
    adapters. transformers, and all that read its checkpoints, read the folder; it appears only when it is complete.
    A reward model becomes a classifier of one label (`as_classifier`), and its scores are compared.

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
    read = partial(vocabulary.load_params, mesh=mesh, seed=config.training.seed)
    params = read(base, decoder=decoder, change=source.change)
    dtype = source.stored_dtype if args.infer_dtype == "auto" else jnp.dtype(args.infer_dtype)
    read_adapter = adapter_reader(args)
    for path in args.adapter_name_or_path:
        log.info("reading adapter %s", path)
        params, _ = read_adapter(params, decoder, path)
    head = None
    if scores(config):
        head = load_value_head(config, source.value_head, decoder.hidden_size, trains=False)
        params = {**params, VALUE_HEAD: head}
    elif (folder := head_beside(args, base)) is not None:
        log.warning("the value head in %s is left out: `stage: rm` exports the reward model", folder)
    before = sample(decoder, params)
    form = resolve_form(params, decoder, tokenizer, endings)
    with whole_or_absent(out) as unfinished:
        write_tokenizer(unfinished, tokenizer)
        missing = None if head is not None else write_for_text(unfinished, tokenizer, template, endings)
        manifest.write(unfinished, manifest.describe(config, base))
        size = args.export_size * 10**9
        hf.save_model(*form, unfinished, base=base, max_shard_bytes=size, dtype=dtype)
        decoder, is_labelled = form.decoder, is_classifier(form.config_json)
        del params, form  # there is room for one model
        params = read(unfinished, decoder=decoder, change=None)
        if head is not None:
            written = read_value_head(unfinished, decoder.hidden_size) if is_labelled else head
            params = {**params, VALUE_HEAD: {**written, "bias": head["bias"]}}
            save_value_head(head, unfinished)
        difference = np.abs(sample(decoder, params) - before).max()
        forget_tokenizer(out)
        forget_value_head(out)
    what = "logit" if head is None else "score"
    log.info(
        "%ss of the written model differ by at most %.3g from those of the base with its adapters; "
        "the largest %s is %.3g",
        what,
        difference,
        what,
        np.abs(before).max(),
    )
    log.info("wrote %s parameters in %s to %s", f"{count(params):,}", dtype.name, out)
    if missing:
        log.info("%s has no TEMPLATE: %s", out / serving.MODELFILE, missing)
    if head is None:
        log.info("to serve it, type one of these\n  %s", "\n  ".join(serving.next_commands(out)))
    elif is_labelled:
        log.info(
            "transformers.AutoModelForSequenceClassification reads it. Its scores lack the bias, %+.4g, which changes "
            "no comparison; %s holds it",
            float(head["bias"][0]),
            out / VALUE_HEAD_FILE,
        )
    return out


def resolve_form(params: Any, decoder: DecoderConfig, tokenizer: Any, endings: Endings) -> Form:
    """What is written: the model as it is; a reward model as a classifier, if transformers has one of its family.

    A token for padding that ends no text becomes that of `tokenizer`: a classifier looks for it.
    """
    body, head = split_head(params)
    causal = Form(body, decoder, endings.source)
    if head is None:
        return causal
    pad = padding_token(tokenizer, endings.eos)
    pad_id = None if pad is None else tokenizer.convert_tokens_to_ids(pad)
    form = as_classifier(params, decoder, endings.source, pad_id)
    if form is None:
        log.info(
            "transformers has no class that gives one score for model_type %s: the model is written as it is, with its "
            "value head in %s",
            endings.source["model_type"],
            VALUE_HEAD_FILE,
        )
        return causal
    if pad is None:
        log.warning("the tokenizer has no token for padding: transformers scores one text at a time")
    elif pad != tokenizer.pad_token:
        log.info("pad_token is %s: %s may end a text, and padding must not", pad, tokenizer.pad_token)
        tokenizer.pad_token = pad
    return form


def write_for_text(folder: Path, tokenizer: Any, template: Template | None, endings: Endings) -> str | None:
    """What programs that generate text look for beside the weights.

    Returns:
      Why there is no chat template in the Modelfile; None: there is one.
    """
    write_generation(folder, endings)
    stops = endings.eos if template is None else dict.fromkeys((*endings.eos, *template.stop_ids))
    form = None if template is None else template.form
    text, missing = serving.modelfile(form, tokenizer, tokenizer.convert_ids_to_tokens(list(stops)))
    (folder / serving.MODELFILE).write_text(text, encoding="utf-8")
    return missing


def sample(decoder: DecoderConfig, params: Any) -> np.ndarray:
    """Of a fixed sequence from all over the vocabulary, in float32: logits `[TOKENS, vocab]`, of a reward model scores
    `[TOKENS]`.
    """
    ids = np.linspace(0, decoder.vocab_size - 1, TOKENS).astype(np.int32)[None]
    model = CausalLM(decoder, dtype=jnp.float32)

    def of(params: Any) -> Any:
        if VALUE_HEAD in params:
            return score(model, params, hidden_states(model, params, ids).x)  # type: ignore[arg-type]
        return model.apply({"params": params}, ids)

    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(of)(params)[0])
