"""Image-text models: the text stack of each is a family of its own, under other names.

For text alone they compute what that family computes: their positions have three coordinates (mrope), which are equal
for text. Their other towers are not read, and come through to what is written unchanged.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jtune.errors import DataError
from jtune.models.families.base import Names


@dataclass(frozen=True)
class Place:
    """Where the text stack is among the tensors of a model."""

    prefix: str = "model.language_model"
    head: str = "lm_head"


INSIDE = Place()
OUTSIDE = Place("language_model.model", "language_model.lm_head")  # a whole causal LM inside of the model
PLAIN = Place("model", "lm_head")  # the other towers lie beside it
TEXT_MODEL = Place("model.text_model")
PLACES = (INSIDE, OUTSIDE, TEXT_MODEL, PLAIN)

# model_type -> the place of the text stack in the model of transformers. Files may have any of PLACES.
WRAPPERS: Mapping[str, Place] = {
    "exaone4_5": INSIDE,
    "gemma3": INSIDE,
    "gemma4": INSIDE,
    "gemma4_unified": INSIDE,
    "glm46v": INSIDE,
    "glm4v": INSIDE,
    "glm4v_moe": INSIDE,
    "glm_ocr": INSIDE,
    "idefics3": TEXT_MODEL,
    "internvl": INSIDE,
    "internvl_chat": OUTSIDE,
    "kimi_k25": INSIDE,
    "kimi_vl": OUTSIDE,
    "lfm2_vl": INSIDE,
    "llama4": OUTSIDE,
    "llava": INSIDE,
    "llava_next": INSIDE,
    "llava_onevision": INSIDE,
    "mistral3": INSIDE,
    "qwen2_5_vl": INSIDE,
    "qwen2_vl": INSIDE,
    "qwen3_5": INSIDE,
    "qwen3_5_moe": INSIDE,
    "qwen3_vl": INSIDE,
    "qwen3_vl_moe": INSIDE,
    "smolvlm": TEXT_MODEL,
}


def text_config(source: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text stack, as transformers reads it from the config.json of the whole model.

    Raises:
      DataError: an invalid value.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # slow to import

    if source["model_type"] not in CONFIG_MAPPING:  # its class comes with the model, and is not run
        return dict(text_part(source))
    try:
        content = {key: value for key, value in source.items() if key not in ("dtype", "torch_dtype")}
        whole = CONFIG_MAPPING[source["model_type"]].from_dict(content)
        text = whole.get_text_config().to_dict()
    except Exception as error:  # transformers raises its own classes for values of a wrong type
        raise DataError(f"config.json: {str(error).strip()}") from error
    if WRAPPERS[source["model_type"]] != OUTSIDE:  # the whole model says whether they are one; what is inside may not
        text["tie_word_embeddings"] = bool(whole.tie_word_embeddings)
    return text


def text_part(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json, of any model, that describes the text stack: `source` itself if nothing else does."""
    key = _key(source)
    return source if key is None else source[key]


def with_text(source: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json, of any model, with these changes to `text_part`."""
    key = _key(source)
    return {**source, **changes} if key is None else {**source, key: {**source[key], **changes}}


def _key(source: Mapping[str, Any]) -> str | None:
    """Where a config.json describes the text stack; None: at the top."""
    wraps = str(source.get("model_type")) in WRAPPERS
    return next((key for key in ("text_config", "llm_config") if wraps and isinstance(source.get(key), dict)), None)


def placed(names: Names, place: Place) -> Names:
    """The names of a family whose stack is at a place inside of another model."""
    return replace(names, prefix=place.prefix, words={**names.words, "lm_head": place.head})


def place_in(stored: Collection[str], wrapper: str, embedding: str) -> Place:
    """The place of the text stack among these tensors.

    Args:
      wrapper: the model_type of the whole model, whose place is the answer if none fits.
      embedding: the name of the embedding without the prefix: `embed_tokens.weight`.
    """
    return next((place for place in PLACES if f"{place.prefix}.{embedding}" in stored), WRAPPERS[wrapper])
