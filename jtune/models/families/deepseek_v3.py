"""DeepSeek-V3 and R1: latent attention, experts chosen from groups by sigmoids, one expert for all tokens."""

from jtune.models.config import Latent, Layer
from jtune.models.families.base import Asked, Family, Fields, Names, biases, common, experts, rope, yarn_scale


def read(c: Asked) -> Fields:
    dense = c["first_k_dense_replace"]
    return {
        **latent_attention(c, interleaved=c["rope_interleave"]),
        "experts": grouped_experts(c),
        "layers": tuple(Layer(sparse=i >= dense) for i in range(c["num_hidden_layers"])),
    }


def latent_attention(c: Asked, *, interleaved: bool) -> Fields:
    """The fields of `common`, with latent attention."""
    parameters = c["rope_parameters"]
    latent = Latent(c["kv_lora_rank"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], c["q_lora_rank"])
    scale = (latent.nope_dim + latent.rope_dim) ** -0.5
    if parameters.get("rope_type", "default") != "default" and parameters.get("mscale_all_dim"):
        scale *= yarn_scale(parameters["factor"], parameters["mscale_all_dim"]) ** 2
    c.get("qk_head_dim")  # the sum of two others
    return {
        **common(c),
        **biases(c),
        "head_dim": latent.nope_dim + latent.rope_dim,
        "ropes": (rope(parameters, c["max_position_embeddings"], latent.rope_dim, interleaved=interleaved),),
        "latent": latent,
        "attention_scale": scale,
    }


def grouped_experts(c: Asked, *, shared: str = "n_shared_experts"):
    """Experts chosen by sigmoids, from the best groups.

    Args:
      shared: the key of how many experts all tokens share.
    """
    return experts(
        c,
        scoring="sigmoid",
        renormalise=bool(c["norm_topk_prob"]),
        scale=float(c["routed_scaling_factor"]),
        correction_bias=True,
        groups=c["n_group"],
        top_groups=c["topk_group"],
        shared_size=c["moe_intermediate_size"] * c[shared],
    )


# Its files call the bias of the choice a part of the router.
PATTERNS = ((r"\.mlp\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),)
FAMILY = Family(read, lambda config: Names(patterns=PATTERNS))
