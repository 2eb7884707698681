"""Trinity (AFMoE): gated attention, positions only where there is a window, experts chosen by sigmoids."""

from jtune.models.config import Layer
from jtune.models.families.base import Asked, Family, Fields, Names, biases, common, experts, windows
from jtune.models.families.hy_v3 import PATTERNS

WORDS = {
    "gate": "router.gate",
    "pre_feedforward_layernorm": "pre_mlp_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}


def read(c: Asked) -> Fields:
    mixture = experts(
        c,
        scoring="sigmoid",
        scale=float(c["route_scale"]),
        correction_bias=True,
        shared_size=c["moe_intermediate_size"] * c["num_shared_experts"],
    )
    c.get("global_attn_every_n_layers")  # what transformers made the list of
    kinds, dense = c["layer_types"], c["num_dense_layers"]
    return {
        **common(c),
        **biases(c),
        "block": "around",
        "embedding_multiplier": c["hidden_size"] ** 0.5 if c["mup_enabled"] else 1.0,
        "qk_norm": "head",
        "attention_gate_proj": True,
        "experts": mixture,
        "layers": tuple(
            Layer(window=window, rope=0 if kind == "sliding_attention" else None, sparse=i >= dense)
            for i, (kind, window) in enumerate(zip(kinds, windows(c), strict=True))
        ),
    }


FAMILY = Family(read, lambda config: Names(words=WORDS, patterns=PATTERNS))
