"""Cohere (Command R): attention and MLP in parallel from one LayerNorm, neighbouring pairs rotate, scaled logits."""

from dataclasses import replace

from jtune.models.families.base import Asked, Family, Fields, biases, common, layer_norm


def read(c: Asked) -> Fields:
    fields = common(c)
    return {
        **fields,
        **biases(c),
        **layer_norm(c["layer_norm_eps"], bias=False),
        "ropes": (replace(fields["ropes"][0], interleaved=True),),
        "block": "parallel",
        "qk_norm": "heads" if c.get("use_qk_norm") else None,
        "logit_multiplier": float(c["logit_scale"]),
    }


FAMILY = Family(read)
