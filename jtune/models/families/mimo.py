"""MiMo: Qwen2. transformers has no class for its config, which is Qwen2's."""

from jtune.models.families import qwen2
from jtune.models.families.base import Asked, Family, Fields


def read(c: Asked) -> Fields:
    c.get("attention_bias")  # Qwen2's layers have these biases in any case
    return qwen2.read(c)


FAMILY = Family(read, config_of="qwen2")
