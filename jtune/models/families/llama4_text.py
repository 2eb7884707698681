"""Llama 4, its text model: attention in chunks; layers without positions, which see all; experts, and one for all."""

from jtune.errors import DataError
from jtune.models.config import Layer, QueryScale
from jtune.models.families.base import Asked, Family, Fields, Names, biases, common, experts, ropes

WORDS = {"mlp": "feed_forward", "gate": "router", "shared_experts": "shared_expert"}
PATTERNS = ((r"(\.experts\.\w+)\.weight$", r"\1"),)
AS_IS = frozenset({"experts.gate_up_proj", "experts.down_proj"})


def read(c: Asked) -> Fields:
    fields = common(c)
    mixture = experts(
        c,
        width="intermediate_size",
        scoring="sigmoid",
        renormalise=False,
        scale_input=True,
        joined=True,
        shared_size=c["intermediate_size"],
    )
    c.get("router_jitter_noise")  # transformers does not read it either
    return {
        **fields,
        **biases(c),
        "intermediate_size": c["intermediate_size_mlp"],
        "ropes": ropes(c, fields["head_dim"], interleaved=True),
        "qk_norm": "rotated" if c["use_qk_norm"] else None,
        "experts": mixture,
        "layers": _layers(c),
    }


def _layers(c: Asked) -> tuple[Layer, ...]:
    for made in ("interleave_moe_layer_step", "no_rope_layer_interval"):
        c.get(made)  # what transformers made lists of
    kinds, chunk = c["layer_types"], c["attention_chunk_size"]
    unknown = set(kinds) - {"full_attention", *(["chunked_attention"] if chunk else [])}
    if unknown:
        raise DataError(f"config.json: layer_types: {min(unknown)!r} is not supported (attention_chunk_size: {chunk})")
    grows = QueryScale(c["attn_scale"], c["floor_scale"], offset=1)

    def layer(i: int, kind: str, turns: int) -> Layer:
        chunked = kind == "chunked_attention"
        return Layer(
            window=chunk if chunked else None,
            chunked=chunked,
            rope=0 if turns else None,
            query_scale=grows if c["attn_temperature_tuning"] and not turns else None,
            sparse=i in c["moe_layers"],
        )

    return tuple(layer(i, kind, c["no_rope_layers"][i]) for i, kind in enumerate(kinds))


NAMES = Names(words=WORDS, patterns=PATTERNS, stacked_experts=True, swapped_experts=True, as_is=AS_IS)
FAMILY = Family(read, lambda config: NAMES)
