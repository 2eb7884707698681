"""FlexOlmo: OLMo 2 with experts."""

from jtune.models.families import olmo2
from jtune.models.families.base import Asked, Family, Fields, experts


def read(c: Asked) -> Fields:
    mixture = experts(c, width="intermediate_size", renormalise=bool(c["norm_topk_prob"]))
    return {**olmo2.read(c), "experts": mixture}


FAMILY = Family(read)
