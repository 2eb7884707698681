"""OLMoE: OLMo's clipped queries, keys and values, norms over all queries and all keys at once, many small experts."""

from jtune.models.families.base import Asked, Family, Fields, biases, common, experts


def read(c: Asked) -> Fields:
    mixture = experts(c, width="intermediate_size", renormalise=bool(c["norm_topk_prob"]))
    return {**common(c), **biases(c), "clip_qkv": c["clip_qkv"], "qk_norm": "all", "experts": mixture}


FAMILY = Family(read)
