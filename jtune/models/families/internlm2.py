"""InternLM2: Llama with one kernel for each key head's queries, key and value.

transformers has no class for its config, which is Llama's but for `bias`.
"""

from jtune.models.families.base import Asked, Family, Fields, Names, common

WORDS = {
    "embed_tokens": "tok_embeddings",
    "self_attn": "attention",
    "qkv_proj": "wqkv",
    "o_proj": "wo",
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}


def read(c: Asked) -> Fields:
    bias = bool(c.get("bias"))
    return {**common(c), "qkv": "grouped", "qkv_bias": bias, "o_bias": bias}


FAMILY = Family(read, lambda config: Names(words=WORDS), config_of="llama")
