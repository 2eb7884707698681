"""The configuration of a run: five frozen records, and where each value was given."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jtune.config import run_folder, trackers
from jtune.config.arguments import (
    FIELDS,
    SECTIONS,
    DataArguments,
    FinetuningArguments,
    GeneratingArguments,
    ModelArguments,
    TrainingArguments,
)
from jtune.config.check import check
from jtune.config.parse import Fault, parse
from jtune.config.renamed import current
from jtune.config.stages import rules_of
from jtune.config.translate import translate
from jtune.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """All arguments of a run, checked, with the defaults filled in."""

    model: ModelArguments
    data: DataArguments
    finetuning: FinetuningArguments
    training: TrainingArguments
    generating: GeneratingArguments
    notes: tuple[str, ...] = ()  # one line for each argument that is ignored
    origins: Mapping[str, str] = field(default_factory=dict)  # given argument -> "case.yaml:7" or "command line"

    def to_dict(self) -> dict[str, Any]:
        """All values in one flat dict that JSON and YAML can hold; secrets are blanked out."""
        values: dict[str, Any] = {}
        for section in SECTIONS:
            values |= vars(getattr(self, section))
        return {name: _plain(name, value) for name, value in values.items()}

    def given(self) -> dict[str, Any]:
        """The part of `to_dict` that the user gave with a value other than the default."""
        return {
            name: value
            for name, value in self.to_dict().items()
            if name in self.origins and value != _plain(name, FIELDS[name].default)
        }


def _plain(name: str, value: Any) -> Any:
    if FIELDS[name].metadata["secret"] and value is not None:
        return f"<{name.upper()}>"
    return list(value) if isinstance(value, tuple) else value


def load_config(argv: Sequence[str], command: str = "train") -> Config:
    """Read the configuration from the words after `jtune COMMAND`.

    Args:
      argv: `CASE.yaml key=value ...`, `CASE.json ...`, `--key value ...`, or a file followed by either.
      command: "train", "data", "plan", "inspect", "export", "chat", ... Every command accepts every argument, and
        requires only its own. "chat", "eval" and "export" also take a folder with a model in the place of a file.

    Raises:
      ConfigError: one line for each fault, those of the file first, then those of the command line.

    >>> load_config(["model_name_or_path=m", "dataset=a,b", "do_train=true"]).data.dataset
    ('a', 'b')
    """
    note = beneath = None
    if argv and command in run_folder.COMMANDS and Path(argv[0]).is_dir():
        beneath, note = run_folder.arguments_of(Path(argv[0]), command)
    parsed = parse(argv, beneath)
    given, conflicts, translated = translate(parsed.given)
    unread = frozenset(current(fault.name) for fault in (*parsed.faults, *conflicts))
    values, faults, notes = check(given, parsed.origin, command, unread)
    faults = sorted([*parsed.faults, *conflicts, *faults], key=lambda fault: fault.origin)
    if faults:
        raise ConfigError(_message(faults))
    notes += [note] if note else []
    values = _filled_in(values)
    sections = {
        name: section(**{f.name: values[f.name] for f in dataclasses.fields(section) if f.name in values})
        for name, section in SECTIONS.items()
    }
    origins = {name: str(origin) for name, (_, origin) in given.items()}
    return Config(**sections, notes=(*translated, *notes), origins=origins)


def _filled_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in defaults that depend on an argument of another section. (`__post_init__` does those within a section.)"""
    values = dict(values)
    if values.get("packing") is None and rules_of(values.get("stage", "sft")).has_prompts:
        # Stage pt keeps None: it packs by default, with rows a token longer than with packing: true, as LLaMA-Factory.
        values["packing"] = False
    if rules_of(values.get("stage", "sft")).has_reference:
        values["lora_dropout"] = 0.0  # a model is compared with its reference: both are computed alike
    if values.get("disable_shuffling") or values.get("train_sampling_strategy") == "sequential":
        values |= {"disable_shuffling": True, "train_sampling_strategy": "sequential"}
    if any(values.get(f"use_{name}") and values.get(f"{name}_layerwise") for name in ("galore", "apollo")):
        values["max_grad_norm"] = 0.0
    values["report_to"] = trackers.chosen(values.get("report_to", ()), values.get("use_swanlab", False))
    return values


def _message(faults: Sequence[Fault]) -> str:
    lines = [f"{fault.origin}: {fault.message}" for fault in faults]
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} errors in the configuration\n" + "\n".join(f"  {line}" for line in lines)
