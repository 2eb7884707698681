"""Seed-OSS: Llama with biases on queries, keys and values."""

from jtune.models.families.base import Asked, Family, Fields, common


def read(c: Asked) -> Fields:
    bias = {"qkv_bias": bool(c["attention_bias"]), "o_bias": bool(c["attention_out_bias"])}
    return {**common(c), **bias, "mlp_bias": bool(c["mlp_bias"])}


FAMILY = Family(read)
