"""Families of models: Hugging Face's config.json -> DecoderConfig.

transformers reads the config, fills in the defaults of the family, and knows older spellings. Each option is then read
by the file of the family, or does not matter for training (`HARMLESS`), or is refused by name if it is not the default.
`docs/adding-a-model.md` shows how to add a family.
"""

import difflib
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from jtune.errors import DataError
from jtune.models.config import DecoderConfig
from jtune.models.families.base import Asked, Family, Names
from jtune.models.families.wrapped import WRAPPERS, placed, text_config, text_part

log = logging.getLogger("jtune")

# Options that do not affect the logits of training, or only repeat what the files contain.
HARMLESS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eod_token_id",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "max_position_embeddings",
        "max_tokenizer_truncation",
        "model_type",
        "num_nextn_predict_layers",  # heads that predict tokens after the next: `jtune.models.names.further_heads`
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "tokenizer_class",
        "router_aux_loss_coef",
        "sep_token_id",
        "max_window_layers",
        "original_max_position_embeddings",
        "_sliding_window_pattern",
        "slow_but_exact",
        "head_dim",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
        "classifier_dropout",
    ]
)

SIZES = re.compile(r"^(num|n)_|_(size|dim|heads|layers)$")  # keys that count something
MOST, MOST_LAYERS = 10**8, 10_000

# A family is a file of this package, under its model_type.
FAMILIES: dict[str, Family] = {
    name: import_module(f"{__name__}.{name}").FAMILY
    for _, name, _ in iter_modules(__path__)
    if name not in ("base", "wrapped")
}
# Other model_types whose layers and names are those of a family: their own class of transformers says so, or, where it
# has none, the code in their checkpoints. What their config.json has beyond that of the family is refused.
SAME_AS = {
    "aquila": "llama",
    "internlm3": "llama",
    "iquestcoder": "llama",
    "sarvam_mla": "deepseek_v3",
    "xverse": "llama",
}
FAMILIES |= {name: FAMILIES[family]._replace(config_of=family) for name, family in SAME_AS.items()}


def decoder_config(source: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a Hugging Face config.json, written by transformers 4 or 5; of an image-text model its text stack.

    Raises:
      DataError: an unknown family, or an option that the decoder does not honour, by name.
    """
    if (wrapper := str(source.get("model_type"))) in WRAPPERS:
        _check_sizes(text_part(source))
        return replace(decoder_config(text_config(source)), wrapper=wrapper)
    kind, family = _family(source)
    full, defaults = full_config(source)
    asked = Asked(full)
    try:
        decoder = DecoderConfig(family=kind, **family.read(asked))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"config.json: its values do not fit together, or are of another kind ({what})") from error
    _refuse_what_is_not_honoured(kind, full, defaults, asked.read)
    return decoder


def full_config(source: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config.json as transformers reads it, with all defaults filled in; and the family's defaults.

    Raises:
      DataError: an unknown family, or an invalid value.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # slow to import

    kind, family = _family(source)
    config_class = CONFIG_MAPPING[kind if kind in CONFIG_MAPPING else str(family.config_of)]
    _check_sizes(source)
    # What weights are stored in is read elsewhere; for some values of it ("auto") transformers has none.
    content = {key: value for key, value in source.items() if key not in ("dtype", "torch_dtype")}
    try:
        given = config_class.from_dict({**family.defaults, **content})
        return given.to_dict(), config_class.from_dict(dict(family.defaults)).to_dict()
    except Exception as error:  # transformers raises its own classes for values of a wrong type
        raise DataError(f"config.json: {str(error).strip()}") from error


def file_names(config: DecoderConfig) -> Names:
    """The names of tensors in the files of a model; of an image-text model, as transformers has them."""
    names = FAMILIES[config.family].names(config)
    return names if config.wrapper is None else placed(names, WRAPPERS[config.wrapper])


def module_names(config: DecoderConfig) -> Names:
    """The names of modules in the model of transformers, which adapters use."""
    family = FAMILIES[config.family]
    names = (family.modules or family.names)(config)
    return names if config.wrapper is None else placed(names, WRAPPERS[config.wrapper])


def _check_sizes(source: Mapping[str, Any]) -> None:
    """Refuse sizes that no model has, before lists of so many layers are made."""
    for key, value in source.items():
        if isinstance(value, int) and SIZES.search(key):
            most = MOST_LAYERS if "layer" in key else MOST
            if not 0 <= value <= most:
                raise DataError(f"config.json: {key} is {str(value)[:40]}, expected 0 to {most}")


def _family(source: Mapping[str, Any]) -> tuple[str, Family]:
    model_type = source.get("model_type")
    if model_type is None:
        raise DataError("config.json: model_type is missing: is this the folder of a Hugging Face model?")
    model_type = str(model_type)
    if model_type in FAMILIES:
        return model_type, FAMILIES[model_type]
    known = sorted({*FAMILIES, *WRAPPERS})
    near = difflib.get_close_matches(model_type, known, n=1)
    hint = f" The nearest is {near[0]}." if near else ""
    if source.get("auto_map"):
        hint = f" Only code of its repository makes it, which jtune never runs (trust_remote_code has no effect).{hint}"
    raise DataError(f"config.json: model_type {model_type!r} is not supported.{hint} There are: {', '.join(known)}.")


def _refuse_what_is_not_honoured(
    kind: str, full: Mapping[str, Any], defaults: Mapping[str, Any], read: set[str]
) -> None:
    known = HARMLESS | read
    usual = defaults.get
    differs = lambda key: full.get(key) != usual(key) and bool(full.get(key) or usual(key))  # null is false
    # The class of another family keeps keys that it does not know; in this one they may matter.
    borrowed = usual("model_type") != kind
    strange = [key for key in {**defaults, **(full if borrowed else {})} if key not in known and differs(key)]
    if strange:
        values = ", ".join(f"{key}={full[key]!r} (usual: {usual(key)!r})" for key in strange)
        raise DataError(f"config.json: jtune's {kind} does not support {values}")
    dropped = [key for key in full if key.endswith(("dropout", "pdrop")) and key not in known and full[key]]
    if dropped:
        log.info("%s: the config asks for %s, which jtune does not apply", kind, ", ".join(dropped))
