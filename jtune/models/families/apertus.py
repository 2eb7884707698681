"""Apertus: norms on queries and keys, an MLP without a gate, whose activation has parameters."""

from jtune.models.families.base import Asked, Family, Fields, Names, biases, common

WORDS = {"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"}


def read(c: Asked) -> Fields:
    return {**common(c), **biases(c), "qk_norm": "head", "mlp": "plain"}


FAMILY = Family(read, lambda config: Names(words=WORDS))
