"""Gemma: norms that multiply by 1 + scale, embeddings scaled by the square root of their width."""

from jtune.models.families.base import Asked, Family, Fields, biases, common


def read(c: Asked) -> Fields:
    return {**common(c), **biases(c), "norm_offset": True, "embedding_multiplier": c["hidden_size"] ** 0.5}


FAMILY = Family(read)
