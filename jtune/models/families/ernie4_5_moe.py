"""ERNIE 4.5, its mixtures: experts chosen by a softmax and a bias, which its files keep as a row, and some for all."""

from jtune.models.config import Layer
from jtune.models.families import ernie4_5
from jtune.models.families.base import Asked, Family, Fields, Names, experts

FILES = ((r"\.mlp\.e_score_correction_bias$", ".mlp.moe_statics.e_score_correction_bias"),)


def read(c: Asked) -> Fields:
    mixture = experts(
        c,
        count="moe_num_experts",
        per_token="moe_k",
        correction_bias=True,
        correction_row=True,
        router_float32=True,
        shared_size=c["moe_intermediate_size"] * c["moe_num_shared_experts"],
    )
    step, first, last = c["moe_layer_interval"], c["moe_layer_start_index"], c["moe_layer_end_index"]
    is_sparse = lambda i: (i + 1) % step == 0 and first <= i <= last
    layers = tuple(Layer(sparse=is_sparse(i)) for i in range(c["num_hidden_layers"]))
    return {**ernie4_5.read(c), "head_bias": bool(c["use_bias"]), "experts": mixture, "layers": layers}


FAMILY = Family(read, lambda config: Names(patterns=FILES))
