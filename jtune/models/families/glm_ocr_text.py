"""GLM-OCR, its text model: GLM-4 (0414)."""

from jtune.models.families import glm4
from jtune.models.families.base import Asked, Family, Fields


def read(c: Asked) -> Fields:
    full = Asked({**c, "attention_bias": False})
    fields = glm4.read(full)
    c.read |= full.read
    return fields


FAMILY = Family(read, glm4.FAMILY.names)
