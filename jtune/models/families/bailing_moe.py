"""Ling 2.0: the layers of GLM-4.5, one kernel for queries, keys and values, half of each head rotates.

transformers has no class for its config. That of Sarvam, which is a copy of the model, knows its keys.
"""

from jtune.errors import DataError
from jtune.models.families import glm4_moe
from jtune.models.families.base import Asked, Family, Fields, Names

WORDS = {
    "embed_tokens": "word_embeddings",
    "self_attn": "attention",
    "qkv_proj": "query_key_value",
    "o_proj": "dense",
    "q_norm": "query_layernorm",
    "k_norm": "key_layernorm",
}
PATTERNS = ((r"\.mlp\.e_score_correction_bias$", ".mlp.gate.expert_bias"),)
# They repeat others, or say what is so in any case, or are of pretraining.
SAID = (
    "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor",
    "moe_shared_expert_intermediate_size",
    "mtp_loss_scaling_factor",
    "rotary_dim",
    "router_dtype",
    "use_rmsnorm",
)


def read(c: Asked) -> Fields:
    if c.get("score_function") != "sigmoid":  # as in the first Ling
        raise DataError(f"config.json: score_function {c.get('score_function')!r} is not supported; there is sigmoid")
    for key in SAID:
        c.get(key)
    return {**glm4_moe.read(c), "qkv": "joined", "o_bias": bool(c.get("use_bias"))}


FAMILY = Family(
    read,
    lambda config: Names(words=WORDS, patterns=PATTERNS),
    config_of="sarvam_moe",
    defaults={"partial_rotary_factor": 0.5},
)
