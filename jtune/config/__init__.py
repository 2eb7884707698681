"""What the user may say: arguments by LLaMA-Factory's names, read, checked once, and frozen.

    argv ── parse ── {name: Given(value, where, text)} ── foreign ── check ── Config
            YAML,    what was said, and where            not ours:   types, choices,
            JSON,                                        noted or    ranges, what goes
            flags                                        refused     with what

`arguments.py` holds the fields with their defaults and meaning, `foreign.py` what LLaMA-Factory knows and jtune does
not do. All faults of a file are reported together, each with its line.
"""

from jtune.config.arguments import (
    DataArguments,
    FinetuningArguments,
    GeneratingArguments,
    ModelArguments,
    TrainingArguments,
)
from jtune.config.explain import explain
from jtune.config.load import Config, load_config

__all__ = [
    "Config",
    "DataArguments",
    "FinetuningArguments",
    "GeneratingArguments",
    "ModelArguments",
    "TrainingArguments",
    "explain",
    "load_config",
]
