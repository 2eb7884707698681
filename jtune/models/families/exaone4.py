"""EXAONE 4: norms after both halves of a layer and on queries and keys; layers without a window have no positions."""

from jtune.models.config import Layer
from jtune.models.families.base import Asked, Family, Fields, common, windows


def read(c: Asked) -> Fields:
    found = windows(c)
    hybrid = c["sliding_window"] is not None
    layers = tuple(Layer(window=window, rope=None if hybrid and window is None else 0) for window in found)
    c.get("sliding_window_pattern")  # what transformers made the list of
    return {**common(c), "block": "after", "qk_norm": "head", "layers": layers}


FAMILY = Family(read)
