"""StarCoder2: LayerNorms and biases, an MLP without a gate."""

from jtune.models.families.base import Asked, Family, Fields, Names, common, layer_norm, sliding

WORDS = {"up_proj": "c_fc", "down_proj": "c_proj"}


def read(c: Asked) -> Fields:
    bias = bool(c["use_bias"])
    return {
        **common(c),
        **layer_norm(c["norm_epsilon"]),
        **sliding(c),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp": "plain",
        "mlp_bias": bias,
    }


FAMILY = Family(read, lambda config: Names(words=WORDS))
