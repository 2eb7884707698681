"""The arguments that a folder of a model gives: `jtune chat FOLDER` in the place of a case."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from jtune.config.arguments import FIELDS, GeneratingArguments, ModelArguments
from jtune.errors import ConfigError, DataError
from jtune.files import read_object

COMMANDS = frozenset({"chat", "eval", "export"})  # that take a folder
MANIFEST = "jtune.json"
ADAPTER, MODEL = "adapter_config.json", "config.json"
# What a command that reads a trained model needs to know of how it was trained.
_TAKEN = (
    *(field.name for field in fields(ModelArguments)),
    *("template", "tool_format", "default_system", "enable_thinking", "preserve_thinking", "cutoff_len"),
    *("stage", "finetuning_type", "pure_bf16", "additional_target", "bf16", "fp16", "per_device_eval_batch_size"),
    *(field.name for field in fields(GeneratingArguments)),
)
_LEFT = ("adapter_name_or_path", "adapter_folder", "train_from_scratch", "export_dir", "print_param_status")


def arguments_of(folder: Path, command: str) -> tuple[dict[str, Any], str | None]:
    """The arguments with which `command` reads the model in a folder, and a note if it is not the folder's own.

    It may be the output folder of a run, finished or not, a checkpoint, an export, or what another program has written:
    a model, or an adapter that names its base.

    Raises:
      ConfigError: there is no model in it, or its files cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    adapter = trained_folder(folder, ADAPTER)
    found = adapter or trained_folder(folder, MODEL)
    if found is None:
        raise ConfigError(
            f"{folder} holds no model: neither {ADAPTER} nor {MODEL} is in it or in a checkpoint.\n"
            "Give the output_dir of a run, the folder of a model or an adapter, or a case (.yaml)."
        )
    was = _read(found / MANIFEST).get("arguments", {}) if (found / MANIFEST).exists() else {}
    was = was if isinstance(was, dict) else {}
    known = {name: was[name] for name in _TAKEN if name in was and name not in _LEFT and not _is_unset(name, was)}
    if command == "export":
        known.pop("quantization_bit", None)  # it merges into the stored model
    note = None if found == folder else f"{folder} holds a run that has not finished: this is its {found.name}"
    if adapter is None:
        return known | {"model_name_or_path": str(found)}, note
    base = known.get("model_name_or_path") or _read(adapter / ADAPTER).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{adapter / ADAPTER} names no base model: give model_name_or_path=FOLDER after the folder")
    before = list(was.get("adapter_name_or_path") or [])
    before = before if was.get("create_new_adapter") else before[:-1]  # the last one is what was trained
    adapters = {"adapter_name_or_path": [*before, str(adapter)], "finetuning_type": "lora"}
    return known | {"model_name_or_path": base} | adapters, note


def trained_folder(folder: Path, name: str) -> Path | None:
    """Where a run has left the model whose file `name` is: its output folder; of a run that was cut short, its newest
    checkpoint. None: nowhere.
    """
    named = [path for path in folder.glob("checkpoint-*") if _number(path).isdecimal()]
    saved = max((path for path in named if (path / name).is_file()), key=lambda path: int(_number(path)), default=None)
    whole = folder if (folder / name).is_file() else None
    return (saved or whole) if _was_cut_short(folder) else (whole or saved)


def _number(path: Path) -> str:
    return path.name.removeprefix("checkpoint-")


def _was_cut_short(folder: Path) -> bool:
    """Whether run.json says so: then a model in the folder itself is of an earlier run."""
    try:
        return read_object(folder / "run.json").get("finished") is False
    except (FileNotFoundError, DataError):
        return False


def _is_unset(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a value asks for nothing: the default, or a secret, which was blanked out."""
    default = FIELDS[name].default
    default = list(default) if isinstance(default, tuple) else default
    return values[name] == default or FIELDS[name].metadata["secret"]


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file") from error
    except DataError as error:
        raise ConfigError(str(error)) from error
