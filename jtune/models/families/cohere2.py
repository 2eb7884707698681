"""Cohere 2 (Command R7B, Command A): Cohere with windows; layers without a window have no positions."""

from jtune.models.config import Layer
from jtune.models.families import cohere
from jtune.models.families.base import Asked, Family, Fields, windows


def read(c: Asked) -> Fields:
    layers = tuple(Layer(window=window, rope=None if window is None else 0) for window in windows(c))
    return {**cohere.read(c), "layers": layers}


FAMILY = Family(read)
