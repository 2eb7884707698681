"""Phi-1.5 and Phi-2: attention and MLP in parallel from one LayerNorm, biases everywhere."""

from jtune.models.families.base import Asked, Family, Fields, Names, common, layer_norm

WORDS = {"o_proj": "dense", "up_proj": "fc1", "down_proj": "fc2", "norm": "final_layernorm"}


def read(c: Asked) -> Fields:
    return {
        **common(c),
        **layer_norm(c["layer_norm_eps"]),
        "block": "parallel",
        "qkv_bias": True,
        "o_bias": True,
        "mlp": "plain",
        "mlp_bias": True,
        "head_bias": True,
    }


FAMILY = Family(read, lambda config: Names(words=WORDS))
