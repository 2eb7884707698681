"""Jais 2: Llama with LayerNorms, and an MLP without a gate."""

from jtune.models.families import llama
from jtune.models.families.base import Asked, Family, Fields, layer_norm


def read(c: Asked) -> Fields:
    return {**llama.read(c), **layer_norm(c["layer_norm_eps"]), "mlp": "plain"}


FAMILY = Family(read)
