"""jtune: fine-tune large language models on JAX.

What a person wants in a REPL is here; each name is imported when it is first used, so `import jtune` is cheap.

>>> import jtune
>>> model, params = jtune.load_model("path/to/checkpoint", dtype="float32")   # doctest: +SKIP
>>> logits = model.apply({"params": params}, input_ids)                        # doctest: +SKIP
>>> jtune.show(jtune.lora.add(params, targets=("q_proj", "v_proj")))           # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jtune.data import get_template, load_tokenizer
    from jtune.generation import Sampling, generate
    from jtune.loading.inference import load_model
    from jtune.tuning import lora, trainable_mask
    from jtune.tuning.show import show, tensor

__version__ = "0.1.0"  # the only place that says it; pyproject.toml reads it from here
__all__ = [
    "Sampling",
    "generate",
    "get_template",
    "load_model",
    "load_tokenizer",
    "lora",
    "show",
    "tensor",
    "trainable_mask",
]

_HOME = {
    "Sampling": "jtune.generation",
    "generate": "jtune.generation",
    "get_template": "jtune.data",
    "load_model": "jtune.loading.inference",
    "load_tokenizer": "jtune.data",
    "lora": "jtune.tuning",
    "show": "jtune.tuning.show",
    "tensor": "jtune.tuning.show",
    "trainable_mask": "jtune.tuning",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'jtune' has no attribute {name!r}; it has {', '.join(__all__)}")
    module = import_module(_HOME[name])
    return getattr(module, name)
