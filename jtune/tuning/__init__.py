"""What is tuned, as transforms of the parameter tree: params -> (params', what trains)."""

from jtune.tuning import lora
from jtune.tuning.axes import prepared_axes
from jtune.tuning.freeze import freeze
from jtune.tuning.masks import adapter_mask, combine, decay_mask, full_mask, partition, trainable_mask
from jtune.tuning.prepare import describe, prepare

__all__ = [
    "adapter_mask",
    "combine",
    "decay_mask",
    "describe",
    "freeze",
    "full_mask",
    "lora",
    "partition",
    "prepare",
    "prepared_axes",
    "trainable_mask",
]
