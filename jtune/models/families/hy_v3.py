"""Hunyuan 3: norms on queries and keys, experts chosen by sigmoids and one for all tokens."""

from jtune.models.families.base import Asked, Family, Fields, Names, biases, common, experts, listed_sparse

WORDS = {"gate": "router.gate", "shared_experts": "shared_mlp"}
PATTERNS = ((r"\.mlp\.e_score_correction_bias$", ".mlp.expert_bias"),)


def read(c: Asked) -> Fields:
    mixture = experts(
        c,
        scoring="sigmoid",
        scale=float(c["router_scaling_factor"]),
        correction_bias=True,
        shared_size=c["moe_intermediate_size"] * c["num_shared_experts"],
    )
    c.get("enable_moe_fp32_combine")  # the sum of two numbers, which one rounding gives in any case
    return {
        **common(c),
        **biases(c),
        "mlp_bias": bool(c["mlp_bias"]),
        "qk_norm": "head",
        "experts": mixture,
        "layers": listed_sparse(c),
    }


FAMILY = Family(read, lambda config: Names(words=WORDS, patterns=PATTERNS), modules=lambda config: Names())
