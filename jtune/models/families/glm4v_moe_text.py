"""GLM-4.5V and GLM-4.6V, their text model: GLM-4.5 without norms on queries and keys."""

from jtune.models.families import glm4_moe
from jtune.models.families.base import Asked, Family, Fields


def read(c: Asked) -> Fields:
    return glm4_moe.read(c.also(use_qk_norm=False))


FAMILY = Family(read, glm4_moe.FAMILY.names)
