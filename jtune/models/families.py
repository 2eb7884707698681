"""What each family's config.json means: Hugging Face's config -> DecoderConfig.

transformers reads the config (it fills in the family's defaults and knows older spellings). What it then says is either
honoured here, of no consequence for training (`HARMLESS`), or refused by name when it is not the family's default.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jtune.errors import DataError
from jtune.models.config import DecoderConfig, Rope

# Options that say nothing about the computation of logits in training, or only name what is in the files anyway.
HARMLESS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "max_position_embeddings",
        "model_type",
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
        "max_window_layers",
    ]
)
HONOURED = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
    ]
)
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

Source = Mapping[str, Any]


class Family(NamedTuple):
    """How a family differs from Llama."""

    options: Callable[[Source], dict[str, Any]]  # of its config, as fields of DecoderConfig
    honoured: frozenset[str]  # the keys that `options` reads


def decoder_config(source: Source) -> DecoderConfig:
    """The decoder that a Hugging Face config.json (written by transformers 4 or 5) describes.

    Raises:
      DataError: an unknown family, or an option that the decoder does not honour, by name.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # slow to import

    family = _family(source.get("model_type"))
    if source.get("quantization_config"):
        method = source["quantization_config"].get("quant_method", "unknown")
        raise DataError(f"config.json: the weights are quantised ({method}); jtune reads bfloat16, float16 and float32")
    kind = CONFIG_MAPPING[source["model_type"]]
    try:
        full, defaults = kind.from_dict(dict(source)).to_dict(), kind().to_dict()
    except Exception as error:  # transformers raises its own kinds for values of a wrong type
        raise DataError(f"config.json: {str(error).strip()}") from error
    _refuse_what_is_not_honoured(source, full, defaults, family)
    heads = full["num_attention_heads"]
    return DecoderConfig(
        family=full["model_type"],
        vocab_size=full["vocab_size"],
        hidden_size=full["hidden_size"],
        intermediate_size=full["intermediate_size"],
        num_hidden_layers=full["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=full.get("num_key_value_heads") or heads,
        head_dim=full.get("head_dim") or full["hidden_size"] // heads,
        rms_norm_eps=full["rms_norm_eps"],
        tie_word_embeddings=bool(full["tie_word_embeddings"]),
        rope=rope(full["rope_parameters"], full["max_position_embeddings"]),
        **family.options(full),
    )


def _family(model_type: str | None) -> Family:
    if model_type is None:
        raise DataError("config.json: no model_type: is this the folder of a Hugging Face model?")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(model_type, FAMILIES, n=1)
    hint = f" The nearest is {near[0]}." if near else ""
    raise DataError(f"config.json: model_type {model_type!r} is not supported.{hint} There are: {', '.join(FAMILIES)}.")


def _refuse_what_is_not_honoured(source: Source, full: Source, defaults: Source, family: Family) -> None:
    known = HARMLESS | HONOURED | family.honoured
    differs = lambda key: full.get(key) != defaults[key] and bool(full.get(key) or defaults[key])  # null is false
    strange = [key for key in defaults if key not in known and differs(key)]
    if strange:
        found = ", ".join(f"{key}={full[key]!r} (usual: {defaults[key]!r})" for key in strange)
        raise DataError(f"config.json: jtune's {source['model_type']} does not know how to honour {found}")


def rope(parameters: Source, max_positions: int) -> Rope:
    """Rotary frequencies; refuses by name what is not honoured."""
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise DataError(f"config.json: rope_type {kind!r} is not supported; there are default, linear, llama3, yarn")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise DataError("config.json: partial_rotary_factor is not supported")
    factor = parameters.get("factor") or 1.0
    original = parameters.get("original_max_position_embeddings") or max_positions
    options: dict[str, Any] = {}
    if kind == "llama3":
        options = {key: parameters[key] for key in ("low_freq_factor", "high_freq_factor")}
    elif kind == "yarn":
        options = {
            "beta_fast": parameters.get("beta_fast") or 32.0,
            "beta_slow": parameters.get("beta_slow") or 1.0,
            "truncate": parameters.get("truncate", True),
            "attention_factor": _yarn_attention_factor(parameters, factor),
        }
    return Rope(parameters["rope_theta"], kind, factor, original, **options)


def _yarn_attention_factor(parameters: Source, factor: float) -> float:
    """Equation 22 of arXiv:2309.00071, and the variant with `mscale`."""
    if parameters.get("attention_factor") is not None:
        return parameters["attention_factor"]
    mscale = lambda m: 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return mscale(parameters["mscale"]) / mscale(parameters["mscale_all_dim"])
    return mscale(1.0)


def _act(full: Source, key: str = "hidden_act") -> str:
    if full[key] not in ACTIVATIONS:
        raise DataError(f"config.json: {key} {full[key]!r} is not supported; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[full[key]]


def _windows(full: Source) -> tuple[int | None, ...]:
    """A window for each layer; a window as long as any sequence is none."""
    window = full.get("sliding_window")
    if window is None or full.get("use_sliding_window") is False:
        return ()
    kinds = full.get("layer_types") or ["sliding_attention"] * full["num_hidden_layers"]
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise DataError(f"config.json: layer_types: {kind!r} is not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _llama(full: Source) -> dict[str, Any]:
    bias = bool(full["attention_bias"])
    return {"hidden_act": _act(full), "qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(full["mlp_bias"])}


def _qwen2(full: Source) -> dict[str, Any]:
    return {"hidden_act": _act(full), "qkv_bias": True, "windows": _windows(full)}


def _qwen3(full: Source) -> dict[str, Any]:
    bias = bool(full["attention_bias"])
    return {"hidden_act": _act(full), "qkv_bias": bias, "o_bias": bias, "qk_norm": True, "windows": _windows(full)}


def _mistral(full: Source) -> dict[str, Any]:
    return {"hidden_act": _act(full), "windows": _windows(full)}


def _gemma2(full: Source) -> dict[str, Any]:
    bias = bool(full["attention_bias"])
    return {
        "hidden_act": _act(full, "hidden_activation"),
        "qkv_bias": bias,
        "o_bias": bias,
        "windows": _windows(full),
        "norm_offset": True,
        "sandwich_norms": True,
        "scale_embeddings": True,
        "attention_scale": full["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": full["attn_logit_softcapping"],
        "logit_softcap": full["final_logit_softcapping"],
    }


def _mixtral(full: Source) -> dict[str, Any]:
    return {
        "hidden_act": _act(full),
        "windows": _windows(full),
        "num_experts": full["num_local_experts"],
        "num_experts_per_tok": full["num_experts_per_tok"],
    }


_SLIDING = frozenset({"sliding_window", "use_sliding_window", "layer_types"})
FAMILIES = {
    "llama": Family(_llama, frozenset({"hidden_act", "attention_bias", "mlp_bias"})),
    "qwen2": Family(_qwen2, _SLIDING | {"hidden_act"}),
    "qwen3": Family(_qwen3, _SLIDING | {"hidden_act", "attention_bias"}),
    "mistral": Family(_mistral, _SLIDING | {"hidden_act"}),
    "gemma2": Family(
        _gemma2,
        _SLIDING
        | {
            "hidden_activation",
            "attention_bias",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        },
    ),
    "mixtral": Family(_mixtral, _SLIDING | {"hidden_act", "num_local_experts", "num_experts_per_tok"}),
}
