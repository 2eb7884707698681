"""MiniCPM, its first and fourth generation: Llama with multipliers of embeddings, residuals and logits.

transformers has no class for its config, which is Llama's but for these and for other defaults.
"""

from jtune.errors import DataError
from jtune.models.families import llama
from jtune.models.families.base import Asked, Family, Fields
from jtune.models.families.minicpm3 import multipliers

DEFAULTS = {"tie_word_embeddings": True, "scale_emb": 1, "scale_depth": 1, "dim_model_base": 1}


def read(c: Asked) -> Fields:
    if c.get("sparse_config"):
        raise DataError(
            f"config.json: sparse_config {c['sparse_config']!r} is not supported; without it attention is dense, as it "
            "is in the model for rows that are shorter than its dense_len"
        )
    c.get("mup_denominator")  # of the learning rate in its pretraining
    return {**llama.read(c), **multipliers(c)}


FAMILY = Family(read, config_of="llama", defaults=DEFAULTS)
