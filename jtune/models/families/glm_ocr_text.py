"""GLM-OCR, its text model: GLM-4 (0414)."""

from jtune.models.families import glm4
from jtune.models.families.base import Asked, Family, Fields


def read(c: Asked) -> Fields:
    return glm4.read(c.also(attention_bias=False))


FAMILY = Family(read, glm4.FAMILY.names)
