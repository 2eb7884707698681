"""GPT-2: learned positions, LayerNorms, kernels stored as [in, out]."""

from jtune.errors import DataError
from jtune.models.config import Layer
from jtune.models.families.base import Asked, Family, Fields, Names, activation, layer_norm

WORDS = {
    "layers": "h",
    "self_attn": "attn",
    "qkv_proj": "c_attn",
    "o_proj": "c_proj",
    "up_proj": "c_fc",
    "down_proj": "c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "norm": "ln_f",
}
AS_IS = frozenset({"qkv_proj", "o_proj", "up_proj", "down_proj"})


def read(c: Asked) -> Fields:
    width, heads = c["n_embd"], c["n_head"]
    if c["scale_attn_by_inverse_layer_idx"]:
        raise DataError("config.json: scale_attn_by_inverse_layer_idx is not supported")
    c.get("reorder_and_upcast_attn")  # attention scores are float32 here anyway
    return {
        **layer_norm(c["layer_norm_epsilon"]),
        "vocab_size": c["vocab_size"],
        "hidden_size": width,
        "intermediate_size": c["n_inner"] or 4 * width,
        "num_hidden_layers": c["n_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "tie_word_embeddings": bool(c["tie_word_embeddings"]),
        "learned_positions": c["n_positions"],
        "ropes": (),
        "layers": (Layer(rope=None),) * c["n_layer"],
        "qkv": "joined",
        "qkv_bias": True,
        "o_bias": True,
        "attention_scale": (width // heads) ** -0.5 if c["scale_attn_weights"] else 1.0,
        "mlp": "plain",
        "mlp_bias": True,
        "hidden_act": activation(c, "activation_function"),
    }


FAMILY = Family(read, lambda config: Names("transformer", WORDS, as_is=AS_IS))
