"""Orion: Llama with LayerNorms. transformers has no class for its config, which is Llama's."""

from jtune.models.families import llama
from jtune.models.families.base import Asked, Family, Fields, layer_norm


def read(c: Asked) -> Fields:
    c.get("max_sequence_length")  # max_position_embeddings, again
    return {**llama.read(c), **layer_norm(c["rms_norm_eps"])}


FAMILY = Family(read, config_of="llama")
