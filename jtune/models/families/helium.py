"""Helium: Llama whose neighbouring pairs rotate."""

from dataclasses import replace

from jtune.models.families.base import Asked, Family, Fields, common


def read(c: Asked) -> Fields:
    fields = common(c)
    turns = replace(fields["ropes"][0], interleaved=True)
    return {**fields, "qkv_bias": bool(c["attention_bias"]), "mlp_bias": bool(c["mlp_bias"]), "ropes": (turns,)}


FAMILY = Family(read)
