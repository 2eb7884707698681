"""dots.llm1: Qwen3's attention with the experts of DeepSeek-V3."""

from jtune.models.config import Layer
from jtune.models.families.base import Asked, Family, Fields, Names, biases, common, windows
from jtune.models.families.deepseek_v3 import PATTERNS, grouped_experts


def read(c: Asked) -> Fields:
    dense = c["first_k_dense_replace"]
    layers = tuple(Layer(window=window, sparse=i >= dense) for i, window in enumerate(windows(c)))
    return {**common(c), **biases(c), "qk_norm": "head", "experts": grouped_experts(c), "layers": layers}


FAMILY = Family(read, lambda config: Names(patterns=PATTERNS))
