"""Granite: Llama with a multiplier at each place."""

from jtune.models.families.base import Asked, Family, Fields, biases, common


def read(c: Asked) -> Fields:
    return {**common(c), **biases(c), **multipliers(c), "mlp_bias": bool(c["mlp_bias"])}


def multipliers(c: Asked) -> Fields:
    return {
        "embedding_multiplier": float(c["embedding_multiplier"]),
        "residual_multiplier": float(c["residual_multiplier"]),
        "attention_scale": float(c["attention_multiplier"]),
        "logit_multiplier": 1 / c["logits_scaling"],
    }


FAMILY = Family(read)
