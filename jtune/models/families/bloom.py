"""BLOOM: alibi instead of positions, a norm on the embeddings, one kernel for each head's query, key and value."""

from jtune.models.config import Layer
from jtune.models.families import falcon
from jtune.models.families.base import Asked, Family, Fields, Names, layer_norm

WORDS = falcon.WORDS | {"embed_norm": "word_embeddings_layernorm"}


def read(c: Asked) -> Fields:
    width, heads = c["hidden_size"], c["n_head"]
    return {
        **layer_norm(c["layer_norm_epsilon"]),
        "vocab_size": c["vocab_size"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": c["n_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "tie_word_embeddings": bool(c["tie_word_embeddings"]),
        "embedding_norm": True,
        "ropes": (),
        "layers": (Layer(rope=None),) * c["n_layer"],
        "alibi": 1.0,
        "qkv": "grouped",
        "qkv_bias": True,
        "o_bias": True,
        "mlp": "plain",
        "mlp_bias": True,
        "hidden_act": "gelu_tanh",
    }


FAMILY = Family(read, lambda config: Names("transformer", WORDS))
