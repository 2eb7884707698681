"""ERNIE 4.5, its dense models: Llama whose neighbouring pairs rotate."""

from dataclasses import replace

from jtune.models.families.base import Asked, Family, Fields, biases, common


def read(c: Asked) -> Fields:
    fields = common(c)
    turns = replace(fields["ropes"][0], interleaved=True)
    return {**fields, **biases(c, key="use_bias"), "mlp_bias": bool(c["use_bias"]), "ropes": (turns,)}


FAMILY = Family(read)
