"""GLM-4.5V and GLM-4.6V, their text model: GLM-4.5 without norms on queries and keys."""

from jtune.models.families import glm4_moe
from jtune.models.families.base import Asked, Family, Fields


def read(c: Asked) -> Fields:
    full = Asked({**c, "use_qk_norm": False})
    fields = glm4_moe.read(full)
    c.read |= full.read
    return fields


FAMILY = Family(read, glm4_moe.FAMILY.names)
