"""Qwen3.5, its text model: three layers of the gated delta rule, then one of attention with a gate on what it gives."""

from jtune.models.families.base import Asked, Family, Fields, biases, common, delta


def read(c: Asked) -> Fields:
    return {**common(c), **biases(c), **delta(c, joined=False), "qk_norm": "head", "norm_offset": True}


FAMILY = Family(read)
