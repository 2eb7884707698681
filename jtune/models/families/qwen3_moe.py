"""Qwen3-MoE: Qwen3 with many small experts."""

from jtune.models.config import Layer
from jtune.models.families.base import Asked, Family, Fields, biases, common, experts, sparse_layers, windows


def read(c: Asked) -> Fields:
    mixture = experts(c, renormalise=bool(c["norm_topk_prob"]))
    layers = sparse_layers(c, [Layer(window=window) for window in windows(c)])
    return {**common(c), **biases(c), "qk_norm": "head", "experts": mixture, "layers": layers}


FAMILY = Family(read)
