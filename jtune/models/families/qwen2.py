"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from jtune.models.families.base import Asked, Family, Fields, common, sliding


def read(c: Asked) -> Fields:
    return {**common(c), **sliding(c), "qkv_bias": True}


FAMILY = Family(read)
