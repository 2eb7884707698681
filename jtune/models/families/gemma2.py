"""Gemma 2: norms around both halves of a layer, windows on every other one, soft-caps."""

from jtune.models.families.base import Asked, Family, Fields, activation, biases, common, sliding


def read(c: Asked) -> Fields:
    return {
        **common(c),
        **biases(c),
        **sliding(c),
        "hidden_act": activation(c, "hidden_activation"),
        "norm_offset": True,
        "block": "around",
        "embedding_multiplier": c["hidden_size"] ** 0.5,
        "attention_scale": c["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": c["attn_logit_softcapping"],
        "logit_softcap": c["final_logit_softcapping"],
    }


FAMILY = Family(read)
