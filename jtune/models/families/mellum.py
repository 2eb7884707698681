"""Mellum 2: Qwen3-MoE, with a rotation of their own for layers with a window. Lists say which layers have what."""

from jtune.models.families.base import Asked, Family, Fields, biases, common, experts, listed_sparse, sliding


def read(c: Asked) -> Fields:
    for key in ("num_mtp_layers", "mtp_layer_types", "mtp_mlp_layer_types"):
        c.get(key)  # heads that predict tokens after the next
    mixture = experts(c, renormalise=bool(c["norm_topk_prob"]))
    layers = listed_sparse(c, sliding(c)["layers"])
    return {**common(c), **biases(c), "qk_norm": "head", "experts": mixture, "layers": layers}


FAMILY = Family(read)
