"""Qwen3.5-MoE, its text model: Qwen3.5 with Qwen3-Next's experts in every layer."""

from jtune.models.families import qwen3_5_text, qwen3_next
from jtune.models.families.base import Asked, Family, Fields


def read(c: Asked) -> Fields:
    every = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": None}
    full = c.also(**every, intermediate_size=c["shared_expert_intermediate_size"])
    return {**qwen3_next.read(full), "delta": qwen3_5_text.read(full)["delta"]}


FAMILY = Family(read, qwen3_next.FAMILY.names)
