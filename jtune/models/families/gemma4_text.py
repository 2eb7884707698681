"""Gemma 4, its text model: two kinds of heads, norms on queries, keys and values, and three sizes with something more.

The small ones add to each layer a second embedding of the token, and their last layers reuse keys and values; in the
larger ones, keys of layers without a window are values, too; one has experts beside the MLP of each layer.
"""

from dataclasses import replace

from jtune.errors import DataError
from jtune.models.config import DecoderConfig, Experts, Layer
from jtune.models.families.base import Asked, Family, Fields, Names, activation, biases, common, windows

PATTERNS = (
    (r"\.router_scale$", ".router.scale"),
    (r"\.per_expert_scale$", ".router.per_expert_scale"),
    (r"\.experts\.(\w+)\.weight$", r".experts.\1"),
)
WORDS = {"moe": "", "gate": "router.proj"}


def read(c: Asked) -> Fields:
    if (seen := c.get("use_bidirectional_attention")) not in (None, False, "vision"):  # text is causal in any case
        raise DataError(f"config.json: use_bidirectional_attention {seen!r} is not supported")
    count, shared = c["num_hidden_layers"], c["num_kv_shared_layers"]
    of_layer = {int(i): options for i, options in (c.get("per_layer_config") or {}).items()}
    kinds, layers = windows(c), []
    last = {kind is not None: i for i, kind in enumerate(kinds[: count - shared])}  # with keys and values of its own
    for i, window in enumerate(kinds):
        reuses = i >= count - shared
        stores = bool(shared) and last[window is not None] == i
        layer = Layer(
            window,
            rope=int(window is not None),  # as in KINDS_OF_LAYER
            sparse=bool(c.get("enable_moe_block")),
            head_dim=of_layer.get(i, {}).get("head_dim"),
            num_key_value_heads=of_layer.get(i, {}).get("num_key_value_heads"),
            intermediate_size=2 * c["intermediate_size"] if c["use_double_wide_mlp"] and reuses else None,
            value_is_key=bool(c["attention_k_eq_v"]) and window is None,
            keys_values="reused" if reuses else "stored" if stores else "own",
        )
        layers.append(layer)
    fields = common(c)
    full = next((layer.head_dim for layer in layers if layer.window is None and layer.head_dim), c["head_dim"])
    turns = list(fields["ropes"])
    turns[0] = replace(turns[0], dim=full, turning=_turning(c, full)) if turns[0].kind == "proportional" else turns[0]
    return {
        **fields,
        **biases(c),
        "ropes": tuple(turns),
        "layers": tuple(layers),
        "hidden_act": activation(c, "hidden_activation"),
        "block": "around",
        "embedding_multiplier": c["hidden_size"] ** 0.5,
        "attention_scale": 1.0,
        "qk_norm": "head",
        "value_norm": True,
        "layer_scalar": True,
        "logit_softcap": c["final_logit_softcapping"],
        "per_layer_inputs": c.get("hidden_size_per_layer_input") or 0,
        "per_layer_vocab_size": c.get("vocab_size_per_layer_input") or 0,
        "experts": _experts(c),
    }


def _turning(c: Asked, head_dim: int) -> int:
    return int((c["rope_parameters"]["full_attention"].get("partial_rotary_factor") or 1.0) * head_dim // 2)


def _experts(c: Asked) -> Experts | None:
    if not c.get("enable_moe_block"):
        return None
    return Experts(c["num_experts"], c["top_k_experts"], c["moe_intermediate_size"], joined=True, beside=True)


def names(config: DecoderConfig) -> Names:
    return Names(words=WORDS if config.experts else {}, patterns=PATTERNS, stacked_experts=True)


FAMILY = Family(read, names)
