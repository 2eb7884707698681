"""Phi-3 and Phi-4: one kernel for queries, keys and values, one for gate and up."""

from jtune.models.families.base import Asked, Family, Fields, common, sliding


def read(c: Asked) -> Fields:
    return {**common(c), **sliding(c), "qkv": "joined", "mlp": "joined"}


FAMILY = Family(read)
