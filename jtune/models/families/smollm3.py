"""SmolLM3: Llama, every fourth layer without positions."""

from jtune.models.config import Layer
from jtune.models.families.base import Asked, Family, Fields, biases, common, windows


def read(c: Asked) -> Fields:
    turning = c["no_rope_layers"]  # 1: the layer has them
    c.get("no_rope_layer_interval")  # what transformers made the list of
    layers = tuple(
        Layer(window=window, rope=0 if turns else None) for window, turns in zip(windows(c), turning, strict=True)
    )
    return {**common(c), **biases(c), "mlp_bias": bool(c["mlp_bias"]), "layers": layers}


FAMILY = Family(read)
