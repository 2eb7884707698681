"""PEFT adapters: adapter_config.json and adapter_model.safetensors, read onto a tree and written from one."""

from jtune.interop.peft_options import CONFIG, EMBEDDINGS, PREFIX, WEIGHTS, read_options, selective, start_of
from jtune.interop.peft_read import has_own_head, load_adapter, trained_whole
from jtune.interop.peft_write import check_writable, save_adapter

__all__ = [
    "CONFIG",
    "EMBEDDINGS",
    "PREFIX",
    "WEIGHTS",
    "check_writable",
    "has_own_head",
    "load_adapter",
    "read_options",
    "save_adapter",
    "selective",
    "start_of",
    "trained_whole",
]
