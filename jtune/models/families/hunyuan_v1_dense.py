"""Hunyuan, its dense models: norms on queries and keys after they are rotated, and a base stretched by `alpha`."""

from dataclasses import replace

from jtune.models.families.base import Asked, Family, Fields, Names, biases, common

WORDS = {"q_norm": "query_layernorm", "k_norm": "key_layernorm"}


def read(c: Asked) -> Fields:
    fields = common(c)
    turns, alpha = fields["ropes"][0], c["rope_parameters"].get("alpha")
    if alpha and turns.kind == "dynamic":  # called so, but it is the same for all lengths
        dim = fields["head_dim"]
        turns = replace(turns, kind="default", theta=turns.theta * alpha ** (dim / (dim - 2)))
    return {**fields, **biases(c), "ropes": (turns,), "qk_norm": "head", "qk_norm_after_rope": True}


FAMILY = Family(read, lambda config: Names(words=WORDS))
