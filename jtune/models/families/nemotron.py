"""Nemotron and Minitron: LayerNorms whose scales start at zero, half of each head rotates, an MLP without a gate."""

from jtune.models.families.base import Asked, Family, Fields, biases, common, layer_norm


def read(c: Asked) -> Fields:
    return {
        **common(c),
        **biases(c),
        **layer_norm(c["norm_eps"]),
        "norm_offset": True,
        "mlp": "plain",
        "mlp_bias": bool(c["mlp_bias"]),
    }


FAMILY = Family(read)
