"""MiniMax-M2: Mixtral with many experts, chosen by sigmoids, and norms over all queries and all keys at once."""

from jtune.models.families.base import Asked, Family, Fields, Names, common, experts
from jtune.models.families.mixtral import WORDS


def read(c: Asked) -> Fields:
    mixture = experts(c, width="intermediate_size", scoring="sigmoid", correction_bias=True)
    return {**common(c), "qk_norm": "all", "experts": mixture}


FAMILY = Family(read, lambda config: Names(words=WORDS), modules=lambda config: Names())
