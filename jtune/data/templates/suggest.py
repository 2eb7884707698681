"""Which named template is the nearest for a model whose tokenizer has no chat template."""

import difflib
import json
from pathlib import Path
from typing import Any

from jtune.data.templates.table import TABLE

# Where the name of a model's type is not near to that of its template.
FAMILIES = {
    "bailing_moe": ("bailing_v2",),
    "deepseek_v2": ("deepseek",),
    "deepseek_v32": ("deepseek3",),
    "ernie4_5": ("ernie",),
    "ernie4_5_moe": ("ernie",),
    "deepseek_v3": ("deepseek3",),
    "gemma3_text": ("gemma3",),
    "glm": ("glm4",),
    "glm4_moe_lite": ("glm4_7",),
    "granitemoeshared": ("granite3",),
    "granitemoe": ("granite3",),
    "granite": ("granite3",),
    "hunyuan_v1_moe": ("hunyuan",),
    "internlm2": ("intern2",),
    "internlm3": ("intern2",),
    "lfm2_moe": ("lfm2",),
    "llama": ("llama3", "llama2"),
    "llama4_text": ("llama4",),
    "minicpm": ("cpm4",),
    "mixtral": ("mistral",),
    "phi3": ("phi", "phi4"),
    "phimoe": ("phi",),
    "qwen2": ("qwen",),
    "qwen2_moe": ("qwen",),
    "qwen3_moe": ("qwen3",),
    "qwen3_next": ("qwen3",),
    "qwen3_5_text": ("qwen3_5",),
    "qwen3_5_moe_text": ("qwen3_5",),
}
BY_VOCABULARY = ("llama3", "gemma", "phi", "chatml")  # told by the words that end an answer


def nearest(tokenizer: Any) -> tuple[str | None, str]:
    """The name of a template, and what it is near to; None where nothing is."""
    kind = _model_type(str(getattr(tokenizer, "name_or_path", "") or ""))
    vocabulary = tokenizer.get_vocab()
    knows = lambda name: all(word in vocabulary for word in TABLE[name].stop_words[:1])
    if kind:
        names = FAMILIES.get(kind) or difflib.get_close_matches(kind, TABLE, n=1, cutoff=0.7)
        for name in names:
            if name in TABLE and (knows(name) or name == names[-1]):
                return name, f"model_type {kind}"
    for name in BY_VOCABULARY:
        if TABLE[name].stop_words and knows(name):
            return name, "its vocabulary"
    return None, ""


def _model_type(path: str) -> str | None:
    """What the model's config.json says, where it is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    file: Any = Path(path) / "config.json"
    try:
        if not file.is_file():
            file = try_to_load_from_cache(path, "config.json")
        kind = json.loads(Path(file).read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kind if isinstance(kind, str) else None
