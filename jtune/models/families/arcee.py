"""Arcee (AFM): Llama whose MLP squares what is above zero, and has no gate."""

from jtune.models.families import llama
from jtune.models.families.base import Asked, Family, Fields


def read(c: Asked) -> Fields:
    return {**llama.read(c), "mlp": "plain"}


FAMILY = Family(read)
