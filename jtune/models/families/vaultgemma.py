"""VaultGemma: Gemma 2 without the norms after the halves of a layer."""

from jtune.models.families import gemma2
from jtune.models.families.base import Asked, Family, Fields, Names

WORDS = {"post_attention_layernorm": "pre_feedforward_layernorm"}


def read(c: Asked) -> Fields:
    return {**gemma2.read(c), "block": "before"}


FAMILY = Family(read, lambda config: Names(words=WORDS))
