"""OLMo 3: OLMo 2 with windows on most layers, which have a rotation of their own."""

from jtune.models.families import olmo2
from jtune.models.families.base import Asked, Family, Fields, sliding


def read(c: Asked) -> Fields:
    return {**olmo2.read(c), **sliding(c)}


FAMILY = Family(read)
