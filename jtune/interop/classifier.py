"""A reward model as transformers' model for sequence classification with one label."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from jtune.interop.value_head import CLASSIFIER
from jtune.models import DecoderConfig
from jtune.models.families.wrapped import with_text
from jtune.models.value_head import split_head

# model_type -> the first part of the name of its class in transformers.
CLASSIFIERS = {
    "arcee": "Arcee",
    "bloom": "Bloom",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "exaone4": "Exaone4",
    "falcon": "Falcon",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "glm": "Glm",
    "glm4": "Glm4",
    "gpt2": "GPT2",
    "gpt_neox": "GPTNeoX",
    "gpt_oss": "GptOss",
    "helium": "Helium",
    "hunyuan_v1_dense": "HunYuanDenseV1",
    "hunyuan_v1_moe": "HunYuanMoEV1",
    "llama": "Llama",
    "minicpm3": "MiniCPM3",
    "ministral": "Ministral",
    "ministral3": "Ministral3",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "nemotron": "Nemotron",
    "olmo": "Olmo",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "phi": "Phi",
    "phi3": "Phi3",
    "phimoe": "Phimoe",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2Moe",
    "qwen3": "Qwen3",
    "qwen3_5_text": "Qwen3_5Text",
    "qwen3_moe": "Qwen3Moe",
    "qwen3_next": "Qwen3Next",
    "seed_oss": "SeedOss",
    "smollm3": "SmolLM3",
    "stablelm": "StableLm",
    "starcoder2": "Starcoder2",
}
# Tokens that models have for padding, or for nothing that ends a text.
PADDING = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|endoftext|>", "<unk>")


class Form(NamedTuple):
    """What is written of a model."""

    params: Any
    decoder: DecoderConfig
    config_json: dict[str, Any]


def as_classifier(
    params: Mapping[str, Any], decoder: DecoderConfig, config_json: Mapping[str, Any], pad_id: int | None
) -> Form | None:
    """The classifier that gives the scores of a reward model less its bias; None: transformers has no class for it.

    It has no head for words; that of `decoder` is its embedding.

    Args:
      params: with a value head.
      pad_id: the token by whose absence transformers finds the last one of a text.
    """
    name = CLASSIFIERS.get(str(config_json.get("model_type")))
    if name is None:
        return None
    rest, head = split_head(params)
    body = {key: value for key, value in rest.items() if key != "lm_head"}
    changes = {"tie_word_embeddings": True, "pad_token_id": pad_id}
    labels = {
        "architectures": [name + CLASSIFIER],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "problem_type": "regression",
    }
    written = {**with_text(config_json, changes), **changes, **labels}
    return Form({**body, "score": {"kernel": head["kernel"]}}, replace(decoder, tie_word_embeddings=True), written)


def padding_token(tokenizer: Any, ends: Collection[int]) -> str | None:
    """A token that pads texts and ends none, by which transformers finds the last token of a text; None: there is none.

    >>> class Tokenizer:
    ...     pad_token, unk_token, bos_token = "</s>", None, "<s>"
    ...     def get_vocab(self):
    ...         return {"<s>": 0, "</s>": 1}
    >>> padding_token(Tokenizer(), ends=[1])
    '<s>'

    Args:
      ends: tokens that end a text.
    """
    vocabulary = tokenizer.get_vocab()
    wanted = (tokenizer.pad_token, *PADDING, tokenizer.unk_token, tokenizer.bos_token)
    return next((token for token in wanted if token in vocabulary and vocabulary[token] not in ends), None)
