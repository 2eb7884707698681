"""Falcon, all three generations: with alibi (RW), with one key head (7B), and with groups of heads (40B and later)."""

from jtune.errors import DataError
from jtune.models.config import DecoderConfig, Layer
from jtune.models.families.base import Asked, Family, Fields, Names, activation, layer_norm, rope

WORDS = {
    "layers": "h",
    "self_attn": "self_attention",
    "qkv_proj": "query_key_value",
    "o_proj": "dense",
    "up_proj": "dense_h_to_4h",
    "down_proj": "dense_4h_to_h",
    "embed_tokens": "word_embeddings",
    "norm": "ln_f",
}
TWO_NORMS = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}


def read(c: Asked) -> Fields:
    heads, new, parallel = c["num_attention_heads"], c["new_decoder_architecture"], c["parallel_attn"]
    head_dim = c["hidden_size"] // heads
    groups = c["num_kv_heads"]  # means something in the new architecture only
    norms = c["num_ln_in_parallel_attn"] or (2 if new else 1)
    if new and not parallel:
        raise DataError("config.json: falcon with new_decoder_architecture and parallel_attn=False is not supported")
    return {
        **layer_norm(c["layer_norm_epsilon"]),
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "intermediate_size": c["ffn_hidden_size"],
        "num_hidden_layers": c["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": groups if new else 1 if c["multi_query"] else heads,
        "head_dim": head_dim,
        "tie_word_embeddings": bool(c["tie_word_embeddings"]),
        "ropes": (rope(c["rope_parameters"], c["max_position_embeddings"], head_dim),) if not c["alibi"] else (),
        "layers": (Layer(rope=None if c["alibi"] else 0),) * c["num_hidden_layers"],
        "alibi": head_dim**-0.5 if c["alibi"] else None,
        "alibi_dtype": "bfloat16",
        "block": "before" if not parallel else "parallel_two" if new and norms == 2 else "parallel",
        "qkv": "grouped",
        "qkv_bias": bool(c["bias"]),
        "o_bias": bool(c["bias"]),
        "mlp": "plain",
        "mlp_bias": bool(c["bias"]),
        "hidden_act": activation(c, "activation"),
    }


def names(config: DecoderConfig) -> Names:
    return Names("transformer", WORDS | (TWO_NORMS if config.block == "parallel_two" else {}))


FAMILY = Family(read, names)
