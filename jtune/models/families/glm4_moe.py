"""GLM-4.5 and later mixtures: experts as in DeepSeek-V3, ordinary attention of which half of each head rotates."""

from jtune.models.config import Layer
from jtune.models.families.base import Asked, Family, Fields, Names, common
from jtune.models.families.deepseek_v3 import PATTERNS, grouped_experts


def read(c: Asked) -> Fields:
    dense = c["first_k_dense_replace"]
    return {
        **common(c),
        "qkv_bias": bool(c["attention_bias"]),
        "qk_norm": "head" if c["use_qk_norm"] else None,
        "experts": grouped_experts(c),
        "layers": tuple(Layer(sparse=i >= dense) for i in range(c["num_hidden_layers"])),
    }


FAMILY = Family(read, lambda config: Names(patterns=PATTERNS))
