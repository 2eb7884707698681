"""OLMo 2: norms after both halves of a layer, and over all queries and all keys at once."""

from jtune.models.families.base import Asked, Family, Fields, biases, common


def read(c: Asked) -> Fields:
    return {**common(c), **biases(c), "block": "after", "qk_norm": "all"}


FAMILY = Family(read)
