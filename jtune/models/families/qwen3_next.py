"""Qwen3-Next: Qwen3.5's layers, their kernels joined, with many small experts and one for all tokens."""

from jtune.models.families.base import Asked, Family, Fields, Names, biases, common, delta, experts, sparse_layers


def read(c: Asked) -> Fields:
    mixture = experts(
        c,
        renormalise=bool(c["norm_topk_prob"]),
        shared_size=c["shared_expert_intermediate_size"],
        shared_gate=True,
    )
    linear = delta(c, joined=True)
    return {
        **common(c),
        **biases(c),
        **linear,
        "layers": sparse_layers(c, list(linear["layers"])),
        "qk_norm": "head",
        "norm_offset": True,
        "experts": mixture,
    }


FAMILY = Family(read, lambda config: Names(words={"shared_experts": "shared_expert"}))
