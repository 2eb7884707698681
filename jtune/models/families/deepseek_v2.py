"""DeepSeek-V2: latent attention, experts chosen by a softmax, from all or from the best groups."""

from jtune.errors import DataError
from jtune.models.config import Layer
from jtune.models.families.base import Asked, Family, Fields, experts
from jtune.models.families.deepseek_v3 import latent_attention


def read(c: Asked) -> Fields:
    dense = c["first_k_dense_replace"]
    return {
        **latent_attention(c, interleaved=True),
        "mlp_bias": bool(c["mlp_bias"]),
        "experts": experts(
            c,
            renormalise=False,
            scale=float(c["routed_scaling_factor"]),
            router_float32=True,
            shared_size=c["moe_intermediate_size"] * c["n_shared_experts"],
            **_groups(c),
        ),
        "layers": tuple(Layer(sparse=i >= dense) for i in range(c["num_hidden_layers"])),
    }


def _groups(c: Asked) -> Fields:
    method, groups = c["topk_method"], {"groups": c["n_group"], "top_groups": c["topk_group"], "best_of_group": 1}
    if method == "greedy":  # from all experts, whatever the groups are
        return {}
    if method == "group_limited_greedy":
        return groups
    raise DataError(
        f"config.json: topk_method {method!r} is not supported for deepseek_v2; there are greedy, group_limited_greedy"
    )


FAMILY = Family(read)
