"""What is tuned, as transforms of the parameter tree: params -> (params', what trains)."""

from jtune.tuning import lora, quantize
from jtune.tuning.axes import prepared_axes
from jtune.tuning.freeze import freeze
from jtune.tuning.masks import combine, decay_mask, full_mask, partition, trainable_mask
from jtune.tuning.nodes import (
    Node,
    adapter_mask,
    count,
    has_dropout,
    is_adapter,
    is_node,
    kernels,
    map_fields,
    replace,
    select,
)
from jtune.tuning.prepare import describe_trainable, prepare

__all__ = [
    "Node",
    "adapter_mask",
    "combine",
    "count",
    "decay_mask",
    "describe_trainable",
    "freeze",
    "full_mask",
    "has_dropout",
    "is_adapter",
    "is_node",
    "kernels",
    "lora",
    "map_fields",
    "partition",
    "prepare",
    "prepared_axes",
    "quantize",
    "replace",
    "select",
    "trainable_mask",
]
