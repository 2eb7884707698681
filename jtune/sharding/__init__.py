"""Where arrays live: the device mesh and the table from logical axes to mesh axes."""

from jtune.sharding import arrays
from jtune.sharding.mesh import batch_shards, check_experts, check_row_length, make_mesh
from jtune.sharding.rules import (
    RULES,
    batch_sharding,
    constrain,
    describe_unsplit,
    divides,
    gather,
    named,
    only,
    replicated,
    spec,
    tree_shardings,
    unit_sharding,
    unsplit,
)

__all__ = [
    "RULES",
    "arrays",
    "batch_sharding",
    "batch_shards",
    "check_experts",
    "check_row_length",
    "constrain",
    "describe_unsplit",
    "divides",
    "gather",
    "make_mesh",
    "named",
    "only",
    "replicated",
    "spec",
    "tree_shardings",
    "unit_sharding",
    "unsplit",
]
