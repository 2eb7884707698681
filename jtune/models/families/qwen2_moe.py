"""Qwen2-MoE: many small experts, and one for all tokens, weighted by a gate."""

from jtune.models.config import Layer
from jtune.models.families.base import Asked, Family, Fields, Names, common, experts, sparse_layers, windows


def read(c: Asked) -> Fields:
    mixture = experts(
        c,
        renormalise=bool(c["norm_topk_prob"]),
        shared_size=c["shared_expert_intermediate_size"],
        shared_gate=True,
    )
    layers = sparse_layers(c, [Layer(window=window) for window in windows(c)])
    return {**common(c), "qkv_bias": bool(c["qkv_bias"]), "experts": mixture, "layers": layers}


FAMILY = Family(read, lambda config: Names(words={"shared_experts": "shared_expert"}))
