"""Llama: what the other families are told apart from."""

from jtune.models.families.base import Asked, Family, Fields, biases, common


def read(c: Asked) -> Fields:
    return {**common(c), **biases(c), "mlp_bias": bool(c["mlp_bias"])}


FAMILY = Family(read)
