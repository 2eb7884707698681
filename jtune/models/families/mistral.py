"""Mistral: Llama with a window."""

from jtune.models.families.base import Asked, Family, Fields, common, sliding


def read(c: Asked) -> Fields:
    return {**common(c), **sliding(c)}


FAMILY = Family(read)
