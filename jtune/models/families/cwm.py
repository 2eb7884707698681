"""CWM: Llama, with a window in three layers of four."""

from jtune.models.families.base import Asked, Family, Fields, common, sliding


def read(c: Asked) -> Fields:
    return {**common(c), **sliding(c), "mlp_bias": bool(c["mlp_bias"])}


FAMILY = Family(read)
