"""Training checkpoints: complete and verified, or invisible.

`output_dir/checkpoint-N/` holds the weights in Hugging Face's or PEFT's form, as a `Trainer` checkpoint does, and
beside them `state/` (Orbax: trainable parameters, optimizer state, step) and `resume.json` (digests, position, logs).
Everything is written to `checkpoint-N.tmp` and renamed when Orbax has finished in the background, so a run that is
killed at any moment leaves either the whole folder or none. Of several processes each writes its part of `state/`;
the first makes, renames and removes folders, in one file system that all see.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jtune.errors import CheckpointError
from jtune.sharding import hosts
from jtune.train.digest import digests, named_leaves

log = logging.getLogger("jtune")
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_step(path: Path) -> int:
    """The N of `.../checkpoint-N`."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a training checkpoint: its name is not checkpoint-N")
    return int(match[1])


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in `output_dir` that a run can resume from, oldest first."""
    return [path for path in saved_by_us(output_dir) if (path / "resume.json").is_file()]


def saved_by_us(output_dir: Path) -> list[Path]:
    """jtune's checkpoints, those without training state too, oldest first: by step, never by time."""
    return [path for path in _named(output_dir) if is_ours(path)]


def saved_by_others(output_dir: Path) -> list[Path]:
    """What is called `checkpoint-N` and is another program's. It is never removed."""
    return [path for path in _named(output_dir) if not is_ours(path)]


def _named(output_dir: Path) -> list[Path]:
    return sorted((p for p in output_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name)), key=checkpoint_step)


def is_ours(path: Path) -> bool:
    """Whether jtune wrote this checkpoint.

    One without training state (`save_only_model`) is told by its trainer_state.json, which lacks the `total_flos` that
    transformers' has always had.
    """
    if (path / "resume.json").exists() or (path / "state").is_dir():
        return True
    try:
        fields = json.loads((path / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and "best_model_checkpoint" in fields and "total_flos" not in fields


def _set_aside(path: Path) -> None:
    names = (path.with_name(f"{path.name}.other{n or ''}") for n in range(10**6))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    log.warning("%s is another program's, and is now %s: this run saves under that name", path, aside.name)


class Checkpointer:
    """Writes checkpoints in the background and keeps the newest few. Owns Orbax's writer thread, hence a class."""

    def __init__(self, output_dir: Path, *, keep: int | None = None):
        self.output_dir, self.keep = output_dir, keep
        self.best: Path | None = None  # never deleted
        for leftover in output_dir.glob("checkpoint-*.tmp") if hosts.is_first() else ():
            log.info("removing %s, a checkpoint that was never finished", leftover)
            shutil.rmtree(leftover)
        self._pending: tuple[Path, Path] | None = None
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())

    def save(self, step: int, state: Any, meta: dict[str, Any], write_files: Callable[[Path], None]) -> Path:
        """Start writing `checkpoint-step`; returns once the devices' data has been copied.

        Args:
          state: any tree of arrays; None writes a model that cannot be resumed from (`save_only_model`).
          meta: JSON-able; `read_meta` gives it back.
          write_files: called with the folder, writes the model itself.
        """
        self.wait()
        final = self.output_dir / f"checkpoint-{step}"
        temporary = final.with_name(final.name + ".tmp")
        if hosts.is_first():
            temporary.mkdir(parents=True)
        write_files(temporary)
        self._pending = (temporary, final)
        if state is None:
            self.wait()
            return final
        arrays = named_leaves(state)
        # Read back by the restore: what Orbax stored must be, bit for bit, what the devices held.
        content = meta | {"step": step, "digests": digests(arrays)}
        if hosts.is_first():
            (temporary / "resume.json").write_text(json.dumps(content, indent=1) + "\n")
        self._orbax.save(temporary.absolute() / "state", args=ocp.args.StandardSave(arrays))
        return final

    def poll(self) -> None:
        """Between updates: make the checkpoint visible if its data is on disk; raise if writing it has failed."""
        try:
            self._orbax.check_for_errors()
        except Exception as error:
            raise self._failure(error) from error
        # Orbax renames its folder when it is done, so the name appears at once and whole.
        if self._pending is not None and (self._pending[0] / "state").is_dir():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint being written is complete and visible; raises what went wrong in the background."""
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error
        if self._pending is None:
            return
        temporary, final = self._pending
        self._pending = None
        if not hosts.is_first():
            return
        if final.exists() and not is_ours(final):
            _set_aside(final)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        self._forget_oldest(final)

    def _forget_oldest(self, newest: Path) -> None:
        if not self.keep or self.keep < 0:
            return
        spared = {newest, self.best}
        old = [p for p in saved_by_us(self.output_dir) if p not in spared]
        room = max(0, self.keep - len({p for p in spared if p is not None and p.exists()}))
        for path in old[: max(0, len(old) - room)]:
            shutil.rmtree(path)

    def _failure(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"writing {self._pending[1] if self._pending else 'a checkpoint'} failed: {error}\n"
            f"Earlier checkpoints in {self.output_dir} are intact: free some space there and start again to resume."
        )

    def close(self) -> None:
        self.wait()
        self._orbax.close()
        hosts.barrier("checkpoints closed")  # what the first process renames is there for all


def read_meta(path: Path) -> dict[str, Any]:
    """The `resume.json` of a checkpoint.

    Raises:
      CheckpointError: the folder is not a complete checkpoint.
    """
    try:
        return json.loads((path / "resume.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a complete jtune checkpoint: {error}") from error


def restore(path: Path, like: Any) -> Any:
    """The state saved in `path`, with the structure, dtypes and shardings of `like`, verified against its digests.

    Args:
      like: tree of `ShapeDtypeStruct` with shardings (or of arrays).

    Raises:
      CheckpointError: leaves are missing, new, or of another shape or dtype (the run is configured differently), or
        the stored data is damaged.
    """
    meta = read_meta(path)
    wanted = named_leaves(like)
    # The handler alone: a Checkpointer ends with a barrier, where those who can read would wait for one who cannot.
    reader = ocp.StandardCheckpointHandler()
    folder: Any = path.absolute() / "state"  # Orbax takes any path
    fault, arrays, differences = "", {}, []
    try:
        metadata: Any = reader.metadata(folder)
        differences = _differences(dict(metadata.items()), wanted)
        if not differences:
            arrays = reader.restore(folder, args=ocp.args.StandardRestore(wanted))
    except Exception as error:
        fault = f"{type(error).__name__}: {error}".splitlines()[0].partition(" See full TensorStore details")[0]
    faults = [x for x in hosts.exchange("restored", fault) if x]
    if faults:
        raise CheckpointError(f"{path} is damaged: {faults[0]}")
    if differences:
        shown = "\n  ".join(differences[:6]) + (f"\n  ... and {len(differences) - 6} more" if differences[6:] else "")
        raise CheckpointError(
            f"{path} was written by a run with another configuration:\n  {shown}\n"
            "Resume with the configuration it was written with, or give another output_dir."
        )
    damaged = [key for key, value in digests(arrays).items() if value != meta["digests"].get(key)]
    if damaged:
        raise CheckpointError(f"{path} is damaged: the stored data of {', '.join(damaged[:4])} is not what was saved")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[key] for key in wanted])


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    faults = [f"{key} is not in it" for key in wanted if key not in stored]
    faults += [f"{key} is in it, but not in this run" for key in stored if key not in wanted]
    for key in wanted:
        if key in stored:
            have, want = stored[key], wanted[key]
            if tuple(have.shape) != tuple(want.shape) or have.dtype != want.dtype:
                faults.append(
                    f"{key} is {have.dtype}{list(have.shape)} in it, {want.dtype}{list(want.shape)} in this run"
                )
    return faults


def restore_newest(output_dir: Path, like: Any) -> tuple[Path, Any] | None:
    """The newest checkpoint that is whole, or None if there is none. Damaged ones are set aside and said.

    Raises:
      CheckpointError: there are checkpoints, but every one is damaged. Starting from scratch is then the user's choice.
    """
    found = hosts.from_first("checkpoints", lambda: [str(path) for path in find_checkpoints(output_dir)])
    for path in map(Path, reversed(found)):
        try:
            return path, restore(path, like)
        except CheckpointError as error:
            if "damaged" not in str(error):
                raise
            aside = path.with_name(path.name + ".damaged")
            if not hosts.is_first():
                continue
            path.rename(aside)
            log.warning("%s. It is now %s; trying the one before it.", error, aside.name)
    if found:
        raise CheckpointError(
            f"no checkpoint in {output_dir} can be read. To start from scratch: overwrite_output_dir=true"
        )
    return None
