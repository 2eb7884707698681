"""GraniteMoE: Granite with experts, all in one tensor."""

from jtune.models.families.base import Asked, Family, Fields, Names, biases, common, experts
from jtune.models.families.granite import multipliers

PATTERNS = (
    (r"\.mlp\.gate\.", ".block_sparse_moe.router.layer."),
    (r"\.mlp\.experts\.gate_up_proj\.", ".block_sparse_moe.input_linear."),
    (r"\.mlp\.experts\.down_proj\.", ".block_sparse_moe.output_linear."),
)
# In the model of transformers.
MODULES = ((r"\.mlp\.gate\b", ".block_sparse_moe.router"), (r"\.mlp\b", ".block_sparse_moe"))


def read(c: Asked) -> Fields:
    mixture = experts(c, width="intermediate_size")
    return {**common(c), **biases(c), **multipliers(c), "mlp": "joined", "experts": mixture}


FAMILY = Family(
    read,
    lambda config: Names(patterns=PATTERNS, stacked_experts=True),
    modules=lambda config: Names(patterns=MODULES, stacked_experts=True),
)
