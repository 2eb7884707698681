"""The arguments of a run, by LLaMA-Factory's names: read, checked once, and frozen.

    argv ── parse ── {name: Given(value, where, text)} ── foreign ── check ── Config
            YAML,    the value, and where it was given   not ours:   types, choices,
            JSON,                                        noted or    ranges, rules between
            flags                                        refused     arguments

`arguments.py` holds the fields with their defaults and meaning. `foreign.py` holds the arguments of LLaMA-Factory that
jtune does not honour. All faults of a file are reported together, each with its line.
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
