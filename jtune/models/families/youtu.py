"""Youtu-LLM: DeepSeek-V3's attention, and no experts."""

from jtune.models.families.base import Asked, Family, Fields
from jtune.models.families.deepseek_v3 import latent_attention


def read(c: Asked) -> Fields:
    c.get("embedding_initializer_range")
    return latent_attention(c, interleaved=c["rope_interleave"])


FAMILY = Family(read)
