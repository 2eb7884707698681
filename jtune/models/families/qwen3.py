"""Qwen3: norms on queries and keys."""

from jtune.models.families.base import Asked, Family, Fields, biases, common, sliding


def read(c: Asked) -> Fields:
    return {**common(c), **sliding(c), **biases(c), "qk_norm": "head"}


FAMILY = Family(read)
