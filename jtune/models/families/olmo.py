"""OLMo: LayerNorms without parameters, and queries, keys and values that are clipped."""

from jtune.models.families.base import Asked, Family, Fields, biases, common, layer_norm

EPS = 1e-5  # the config does not say


def read(c: Asked) -> Fields:
    return {**common(c), **biases(c), **layer_norm(EPS, scale=False, bias=False), "clip_qkv": c["clip_qkv"]}


FAMILY = Family(read)
