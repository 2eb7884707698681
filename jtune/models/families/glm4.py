"""GLM-4 (0414): GLM with norms around both halves of a layer."""

from jtune.models.families import glm
from jtune.models.families.base import Asked, Family, Fields, Names

WORDS = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}


def read(c: Asked) -> Fields:
    return {**glm.read(c), "block": "around"}


FAMILY = Family(read, lambda config: Names(words=WORDS))
