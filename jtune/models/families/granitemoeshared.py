"""GraniteMoE with an MLP for all tokens beside the experts."""

from dataclasses import replace

from jtune.models.families import granitemoe
from jtune.models.families.base import Asked, Family, Fields, Names

SHARED = (
    (r"\.mlp\.shared_experts\.gate_up_proj\b", ".shared_mlp.input_linear"),
    (r"\.mlp\.shared_experts\.down_proj\b", ".shared_mlp.output_linear"),
)


def read(c: Asked) -> Fields:
    fields = granitemoe.read(c)
    return {**fields, "experts": replace(fields["experts"], shared_size=c["shared_intermediate_size"])}


FAMILY = Family(
    read,
    lambda config: Names(patterns=(*SHARED, *granitemoe.PATTERNS), stacked_experts=True),
    modules=lambda config: Names(patterns=(*SHARED, *granitemoe.MODULES), stacked_experts=True),
)
