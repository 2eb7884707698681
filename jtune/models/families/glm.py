"""GLM: half of each head rotates, in neighbouring pairs; one kernel for gate and up."""

from dataclasses import replace

from jtune.models.families.base import Asked, Family, Fields, common


def read(c: Asked) -> Fields:
    fields = common(c)
    turns = replace(fields["ropes"][0], interleaved=True)
    return {**fields, "ropes": (turns,), "qkv_bias": bool(c["attention_bias"]), "mlp": "joined"}


FAMILY = Family(read)
