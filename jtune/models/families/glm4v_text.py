"""GLM-4.1V and GLM-4.6V-Flash, their text model: GLM-4 (0414), with biases on queries, keys and values."""

from jtune.models.families import glm4
from jtune.models.families.base import Asked, Family, Fields


def read(c: Asked) -> Fields:
    return glm4.read(c.also(attention_bias=True))


FAMILY = Family(read, glm4.FAMILY.names)
