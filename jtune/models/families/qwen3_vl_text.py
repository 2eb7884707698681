"""Qwen3-VL, its text model: Qwen3 without windows."""

from jtune.models.families.base import Asked, Family, Fields, biases, common


def read(c: Asked) -> Fields:
    return {**common(c), **biases(c), "qk_norm": "head"}


FAMILY = Family(read)
