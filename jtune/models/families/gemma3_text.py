"""Gemma 3, its text model: norms on queries and keys, and layers with a window that have a rotary base of their own."""

from jtune.models.config import Layer
from jtune.models.families import gemma2
from jtune.models.families.base import Asked, Family, Fields, rope, windows


def read(c: Asked) -> Fields:
    kinds, by_kind = c["layer_types"], c["rope_parameters"]
    head_dim = c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]
    order = ("full_attention", "sliding_attention")
    ropes = tuple(rope(by_kind[kind], c["max_position_embeddings"], head_dim) for kind in order)
    layers = tuple(Layer(window=window, rope=order.index(kind)) for window, kind in zip(windows(c), kinds, strict=True))
    plain = Asked({**c, "rope_parameters": by_kind["full_attention"]})
    fields = gemma2.read(plain)
    c.read |= plain.read
    # transformers reads attn_logit_softcapping and then does not apply it; the published models have none.
    fields["attention_softcap"] = None
    return {**fields, "qk_norm": "head", "ropes": ropes, "layers": layers}


FAMILY = Family(read)
