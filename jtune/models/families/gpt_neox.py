"""GPT-NeoX and Pythia: attention and MLP in parallel from two LayerNorms, a quarter of each head rotates."""

from jtune.models.families.base import Asked, Family, Fields, Names, common, layer_norm

WORDS = {
    "self_attn": "attention",
    "qkv_proj": "query_key_value",
    "o_proj": "dense",
    "up_proj": "dense_h_to_4h",
    "down_proj": "dense_4h_to_h",
    "embed_tokens": "embed_in",
    "norm": "final_layer_norm",
    "lm_head": "embed_out",
}


def read(c: Asked) -> Fields:
    return {
        **common(c),
        "num_key_value_heads": c["num_attention_heads"],
        **layer_norm(c["layer_norm_eps"]),
        "block": "parallel_two" if c["use_parallel_residual"] else "before",
        "qkv": "grouped",
        "qkv_bias": bool(c["attention_bias"]),
        "o_bias": bool(c["attention_bias"]),
        "mlp": "plain",
        "mlp_bias": True,
    }


FAMILY = Family(
    read,
    lambda config: Names("gpt_neox", WORDS),
    modules=lambda config: Names("gpt_neox", {**WORDS, "lm_head": "lm_head"}),
)
