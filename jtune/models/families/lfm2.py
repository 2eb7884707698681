"""LFM2: short gated convolutions on most layers, attention on the others."""

from jtune.errors import DataError
from jtune.models.config import Layer, ShortConv
from jtune.models.families.base import Asked, Family, Fields, Names, common

WORDS = {
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "input_layernorm": "operator_norm",
    "post_attention_layernorm": "ffn_norm",
    "norm": "embedding_norm",
    "q_norm": "q_layernorm",
    "k_norm": "k_layernorm",
    "o_proj": "out_proj",
}


def read(c: Asked) -> Fields:
    c.get("full_attn_idxs")  # what transformers made layer_types of
    return {**convolutional(c), "intermediate_size": _width(c)}


def convolutional(c: Asked) -> Fields:
    """What the dense model and the mixture have in common."""
    kinds = c["layer_types"]
    if not kinds:
        raise DataError("config.json: layer_types is missing: which layers have attention, and which a convolution?")
    for kind in kinds:
        if kind not in ("conv", "full_attention"):
            raise DataError(f"config.json: layer_types: {kind!r} is not supported")
    return {
        **common(c),
        "norm_eps": c["norm_eps"],
        "qk_norm": "head",
        "short_conv": ShortConv(c["conv_L_cache"], bool(c["conv_bias"])),
        "layers": tuple(Layer(conv=kind == "conv") for kind in kinds),
    }


def _width(c: Asked) -> int:
    """Two thirds of the width that the config names, times a factor, rounded up."""
    width, factor, multiple = c["intermediate_size"], c["block_ffn_dim_multiplier"], c["block_multiple_of"]
    if not c["block_auto_adjust_ff_dim"]:
        return width
    width = int(2 * width / 3)
    return width if factor is None else -(-int(factor * width) // multiple) * multiple


FAMILY = Family(read, lambda config: Names(words=WORDS))
