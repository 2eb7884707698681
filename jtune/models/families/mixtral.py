"""Mixtral: Mistral with a few large experts."""

from jtune.models.config import Layer
from jtune.models.families.base import Asked, Family, Fields, Names, common, experts, windows

WORDS = {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def read(c: Asked) -> Fields:
    layers = tuple(Layer(window=window, sparse=True) for window in windows(c))
    return {**common(c), "experts": experts(c, width="intermediate_size"), "layers": layers}


FAMILY = Family(read, lambda config: Names(words=WORDS), modules=lambda config: Names())
