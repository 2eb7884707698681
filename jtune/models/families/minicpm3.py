"""MiniCPM3: latent attention, and multipliers of embeddings, residuals and logits."""

import math

from jtune.models.families.base import Asked, Family, Fields
from jtune.models.families.deepseek_v3 import latent_attention


def read(c: Asked) -> Fields:
    return {**latent_attention(c, interleaved=False), "mlp_bias": bool(c["mlp_bias"]), **multipliers(c)}


def multipliers(c: Asked) -> Fields:
    """Those of arXiv:2404.06395, section 3.1."""
    return {
        "embedding_multiplier": float(c["scale_emb"]),
        "residual_multiplier": c["scale_depth"] / math.sqrt(c["num_hidden_layers"]),
        "logit_multiplier": c["dim_model_base"] / c["hidden_size"],
    }


FAMILY = Family(read)
