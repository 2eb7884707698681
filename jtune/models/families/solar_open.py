"""Solar Open: Llama's attention with the experts of DeepSeek-V3 in all layers."""

from jtune.models.families.base import Asked, Family, Fields, Names, common
from jtune.models.families.deepseek_v3 import PATTERNS, grouped_experts


def read(c: Asked) -> Fields:
    return {**common(c), "qkv_bias": bool(c["attention_bias"]), "experts": grouped_experts(c)}


FAMILY = Family(read, lambda config: Names(patterns=PATTERNS))
