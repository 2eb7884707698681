"""Folders of checkpoints: their names, their owners, and the notes in each."""

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jtune.errors import CheckpointError, ConfigError
from jtune.train import files, resume_json

log = logging.getLogger("jtune")
_NAME = re.compile(r"checkpoint-(\d+)")


class Damaged(CheckpointError):
    """A checkpoint is not what was written: the one before it may be whole."""


def checkpoint_step(path: Path) -> int:
    """The N of `.../checkpoint-N`."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a training checkpoint: its name is not checkpoint-N")
    return int(match[1])


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in `output_dir` with training state, whole or damaged, oldest first.

    A folder counts as a (damaged) checkpoint if it lacks one of `resume.json` and `state`, or cannot be read: it must
    not look like a run that has saved nothing.
    """
    return [path for path in _named(output_dir) if _has_state(path)]


def _has_state(path: Path) -> bool:
    closed = path.is_dir() and not os.access(path, os.R_OK | os.X_OK)
    return closed or any(os.path.lexists(path / name) for name in ("resume.json", "state"))


def saved_by_us(output_dir: Path) -> list[Path]:
    """jtune's checkpoints, those without training state too, oldest first: by step, never by time."""
    return [path for path in _named(output_dir) if is_ours(path)]


def saved_by_others(output_dir: Path) -> list[Path]:
    """Folders called `checkpoint-N` that another program wrote. jtune never removes them."""
    return [path for path in _named(output_dir) if not is_ours(path)]


def _named(output_dir: Path) -> list[Path]:
    return sorted((p for p in output_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name)), key=checkpoint_step)


def is_ours(path: Path) -> bool:
    """Whether jtune wrote this checkpoint.

    A checkpoint without training state (`save_only_model`) has a trainer_state.json without `total_flos`, which that of
    transformers has always had.
    """
    if _has_state(path):
        return True
    try:
        fields = json.loads((path / "trainer_state.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and "best_model_checkpoint" in fields and "total_flos" not in fields


def read_meta(path: Path) -> dict[str, Any]:
    """The `resume.json` of a checkpoint, verified by its digest; without one, by its entries and their types.

    Raises:
      Damaged: the folder is not a complete checkpoint.
    """
    try:
        meta = resume_json.decode((path / "resume.json").read_bytes())
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} is damaged: resume.json: {first_line(error)}") from error
    if not isinstance(meta.get("digests"), dict):
        raise Damaged(f"{path} is damaged: resume.json has no digests")
    if _NAME.fullmatch(path.name) and meta["step"] != checkpoint_step(path):
        raise Damaged(f"{path} is damaged: resume.json is of update {meta['step']}")
    return meta


def check_folder(output_dir: Path) -> None:
    """Refuse a folder in whose place Orbax would write to another.

    Raises:
      ConfigError: its name has a backslash, which TensorStore takes for a slash.
    """
    if "\\" in str(output_dir.absolute()):
        raise ConfigError(
            f"output_dir: {output_dir.absolute()}: a folder for checkpoints must have no backslash in its name"
        )


def state_folder(path: Path) -> Any:
    return files.Literal(path.absolute() / "state")


def described_arrays(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Dtype and shape of each array, as text."""
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()}


def stored_arrays(path: Path) -> dict[str, str]:
    """What `state` holds, by its own account. No data is read."""
    metadata: Any = ocp.StandardCheckpointHandler().metadata(state_folder(path))
    return described_arrays(dict(metadata.items()))


def first_line(error: Exception) -> str:
    if isinstance(error, OSError | Damaged) and str(error):
        return str(error).splitlines()[0]
    if "No space left on device" in str(error):  # TensorStore says it at length
        return "No space left on device"
    return (str(error) or type(error).__name__).splitlines()[0].partition(" See full TensorStore details")[0]
