"""gpt-oss: attention sinks, windows on every other layer, experts with biases whose gate is clamped."""

from jtune.models.config import Layer
from jtune.models.families.base import Asked, Family, Fields, Names, biases, common, experts, windows

PATTERNS = (
    (r"\.mlp\.gate\b", ".mlp.router"),
    (r"\.experts\.(\w+)\.weight$", r".experts.\1"),
    (r"\.experts\.(\w+)\.bias$", r".experts.\1_bias"),
)


def read(c: Asked) -> Fields:
    mixture = experts(c, width="intermediate_size", router_bias=True, bias=True)
    return {
        **common(c),
        **biases(c),
        "sinks": True,
        "mlp": "interleaved",
        "hidden_act": "clamped",
        "clamp": (c["swiglu_limit"], c["swiglu_alpha"]),
        "experts": mixture,
        "layers": tuple(Layer(window=window, sparse=True) for window in windows(c)),
    }


AS_IS = frozenset({"gate_up_proj", "down_proj"})
FAMILY = Family(
    read,
    lambda config: Names(patterns=PATTERNS, stacked_experts=True, as_is=AS_IS),
    modules=lambda config: Names(words={"gate": "router"}, stacked_experts=True),
)
