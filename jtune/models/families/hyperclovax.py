"""HyperCLOVA X: Granite, with norms around both halves of a layer."""

from jtune.models.config import DecoderConfig
from jtune.models.families import granite
from jtune.models.families.base import Asked, Family, Fields, Names

AROUND = {
    "post_attention_layernorm": "post_norm1",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_norm2",
}


def read(c: Asked) -> Fields:
    block = "around" if c["use_post_norm"] else "before"
    return {**granite.read(c), "logit_multiplier": float(c["logits_scaling"]), "block": block}


def names(config: DecoderConfig) -> Names:
    return Names(words=AROUND if config.block == "around" else {})


FAMILY = Family(read, names)
