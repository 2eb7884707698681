"""Gemma 3, its text model: norms on queries and keys, and layers with a window that have a rotary base of their own."""

from jtune.models.families import gemma2
from jtune.models.families.base import Asked, Family, Fields


def read(c: Asked) -> Fields:
    # transformers reads attn_logit_softcapping and then does not apply it; the published models have none.
    return {**gemma2.read(c), "qk_norm": "head", "attention_softcap": None}


FAMILY = Family(read)
