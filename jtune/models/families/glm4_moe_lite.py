"""GLM-4.7-Flash: the layers of DeepSeek-V3; a list says which of them have experts."""

from jtune.models.families.base import Asked, Family, Fields, Names, listed_sparse
from jtune.models.families.deepseek_v3 import PATTERNS, grouped_experts, latent_attention


def read(c: Asked) -> Fields:
    attention = latent_attention(c, interleaved=c["rope_interleave"])
    return {**attention, "experts": grouped_experts(c), "layers": listed_sparse(c)}


FAMILY = Family(read, lambda config: Names(patterns=PATTERNS))
