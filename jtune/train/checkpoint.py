"""Training checkpoints: complete and verified, or invisible.

`output_dir/checkpoint-N/` holds the weights in Hugging Face's or PEFT's form, as a `Trainer` checkpoint does, and
beside them `state/` (Orbax: trainable parameters, optimizer state, step) and `resume.json` (digests, position, logs).
Everything is written to `checkpoint-N.tmp`. When Orbax has finished in the background, the folder is verified, brought
to the disk and renamed, so a run that is killed at any moment leaves either the whole folder or none. A save that fails
is dropped. Of several processes each writes its part of `state/`; the first makes, renames and removes folders, in one
file system that all see. Orbax renames `state/` only when every process has written its part.
"""

import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jtune.data.stream import Stream, check_position
from jtune.distributed import exchange, processes
from jtune.errors import CheckpointError, ConfigError
from jtune.train import files, resume_json
from jtune.train.digest import digests, named_leaves

log = logging.getLogger("jtune")
_NAME = re.compile(r"checkpoint-(\d+)")


class Damaged(CheckpointError):
    """A checkpoint is not what was written: the one before it may be whole."""


class Restored(NamedTuple):
    """A checkpoint that has been read and verified."""

    path: Path
    state: Any
    meta: dict[str, Any]  # the content of `resume.json`


def checkpoint_step(path: Path) -> int:
    """The N of `.../checkpoint-N`."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a training checkpoint: its name is not checkpoint-N")
    return int(match[1])


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in `output_dir` with training state, whole or damaged, oldest first.

    One that lacks either of `resume.json` and `state` counts, and so does a folder that cannot be looked into: such a
    folder is damaged, and must not look like a run that has saved nothing.
    """
    return [path for path in _named(output_dir) if _has_state(path)]


def _has_state(path: Path) -> bool:
    closed = path.is_dir() and not os.access(path, os.R_OK | os.X_OK)
    return closed or any(os.path.lexists(path / name) for name in ("resume.json", "state"))


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
    if _has_state(path):
        return True
    try:
        fields = json.loads((path / "trainer_state.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and "best_model_checkpoint" in fields and "total_flos" not in fields


class _Pending(NamedTuple):
    """A checkpoint that is being written."""

    temporary: Path
    final: Path
    sizes: Mapping[str, int]  # of the model's files, in bytes; as the first process has written them
    arrays: Mapping[str, str] | None  # what `state` must hold (see `_described`)
    on_disk: Future[None] | None  # the model's files are there


class Checkpointer:
    """Writes checkpoints in the background and keeps the newest few. Owns the writer threads, hence a class."""

    def __init__(self, output_dir: Path, *, keep: int | None = None):
        self.output_dir, self.keep = output_dir, keep
        self.best: Path | None = None  # never deleted
        if processes.is_first():
            files.clean(output_dir)
        self._pending: _Pending | None = None
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._syncing = ThreadPoolExecutor(1, thread_name_prefix="sync")

    def save(self, step: int, state: Any, meta: dict[str, Any], write_files: Callable[[Path], None]) -> Path:
        """Start writing `checkpoint-step`; returns once the devices' data has been copied.

        Args:
          state: any tree of arrays; None writes a model that cannot be resumed from (`save_only_model`).
          meta: JSON-able; `read_meta` gives it back.
          write_files: called with the folder, writes the model itself.

        Raises:
          CheckpointError: this one or the one before it could not be written. It is dropped.
        """
        self.wait()
        final = self.output_dir / f"checkpoint-{step}"
        temporary = final.with_name(final.name + files.UNFINISHED)
        arrays = None if state is None else named_leaves(state)
        described = None if arrays is None else _described(arrays)
        self._pending = _Pending(temporary, final, {}, described, None)
        with self._dropped_if_it_fails():
            if processes.is_first():
                temporary.mkdir(parents=True)
            write_files(temporary)
            if arrays is not None:
                # Read back by the restore: what Orbax stored must be, bit for bit, what the devices held.
                content = meta | {"step": step, "digests": digests(arrays), "arrays": described}
                if processes.is_first():
                    (temporary / "resume.json").write_bytes(resume_json.encode(content))
            if processes.is_first():
                sizes = files.sizes(temporary)
                on_disk = self._syncing.submit(files.sync_files, temporary, list(sizes))
                self._pending = self._pending._replace(sizes=sizes, on_disk=on_disk)
            if arrays is not None:
                self._orbax.save(_state_of(temporary), args=ocp.args.StandardSave(arrays))
        if arrays is None:
            self.wait()
        return final

    def poll(self) -> None:
        """Between updates: make the checkpoint visible if its data is on disk; raise if writing it has failed."""
        pending = self._pending
        if pending is None:
            return
        with self._dropped_if_it_fails(background=True):
            self._orbax.check_for_errors()
        # Orbax renames its folder when it is done, so the name appears at once and whole.
        if not (pending.temporary / "state").is_dir():
            return
        if pending.on_disk is None or pending.on_disk.done():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint being written is complete and visible; raises what went wrong in the background."""
        if self._pending is None:  # what Orbax may still say is of one that was dropped
            with suppress(Exception):
                self._orbax.wait_until_finished()
            return
        with self._dropped_if_it_fails(background=True):
            self._orbax.wait_until_finished()
            if processes.is_first():
                self._publish(self._pending)
        self._pending = None

    def _publish(self, pending: _Pending) -> None:
        """Verify what has been written, give it its name, and only then forget others."""
        if pending.on_disk is not None:
            pending.on_disk.result()
        files.sync(pending.temporary)
        files.check_sizes(pending.temporary, pending.sizes)
        if pending.arrays is not None:
            meta = read_meta(pending.temporary)
            stored = _stored(pending.temporary)
            if not meta["arrays"] == pending.arrays == stored:
                raise Damaged("the arrays in it are not those that were saved")
        if os.path.lexists(pending.final) and not is_ours(pending.final):
            files.set_aside(pending.final, "other", "another program's")
        files.replace(pending.temporary, pending.final)
        self._forget_oldest(pending.final)

    def _forget_oldest(self, newest: Path) -> None:
        if not self.keep or self.keep < 0:
            return
        spared = {newest, self.best}
        old = [p for p in saved_by_us(self.output_dir) if p not in spared]
        room = max(0, self.keep - len({p for p in spared if p is not None and p.exists()}))
        for path in old[: max(0, len(old) - room)]:
            files.remove(path)

    @contextmanager
    def _dropped_if_it_fails(self, *, background: bool = False) -> Iterator[None]:
        """What is done for the checkpoint being written: whatever fails, that one is never made visible.

        Args:
          background: every error is one of writing. Otherwise others are re-raised: the model may be at fault.
        """
        try:
            yield
        except BaseException as error:
            pending, self._pending = self._pending, None
            if isinstance(error, Exception) and processes.count() == 1:  # with others, Orbax would wait for them
                with suppress(Exception):
                    self._orbax.wait_until_finished()  # else what it still writes makes the folder anew
            if pending is not None and processes.is_first():
                shutil.rmtree(pending.temporary, ignore_errors=True)
            if isinstance(error, Exception) and (background or files.is_storage(error)):
                raise self._failure(pending, error) from error
            raise

    def _failure(self, pending: _Pending | None, error: Exception) -> CheckpointError:
        what = pending.final if pending else "a checkpoint"
        return CheckpointError(
            f"writing {what} failed: {_first_line(error)}{files.describe_room(self.output_dir)}\n"
            f"It is not kept. {_what_is_left(self.output_dir)}"
        )

    def close(self) -> None:
        self.wait()
        self._orbax.close()
        self._syncing.shutdown()
        exchange.barrier("checkpoints closed")  # what the first process renames is there for all


def read_meta(path: Path) -> dict[str, Any]:
    """The `resume.json` of a checkpoint, verified by its digest; without one, by its entries and their types.

    Raises:
      Damaged: the folder is not a complete checkpoint.
    """
    try:
        meta = resume_json.decode((path / "resume.json").read_bytes())
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} is damaged: resume.json: {_first_line(error)}") from error
    if not isinstance(meta.get("digests"), dict):
        raise Damaged(f"{path} is damaged: resume.json has no digests")
    if _NAME.fullmatch(path.name) and meta["step"] != checkpoint_step(path):
        raise Damaged(f"{path} is damaged: resume.json is of update {meta['step']}")
    return meta


def check_folder(output_dir: Path) -> None:
    """Refuse a folder that Orbax would not write to, but to another.

    Raises:
      ConfigError: its name has a backslash, which TensorStore takes for a slash.
    """
    if "\\" in str(output_dir.absolute()):
        raise ConfigError(f"output_dir: {output_dir.absolute()}: a folder for checkpoints must have no backslash in it")


def check_stream(path: Path, meta: Mapping[str, Any], stream: Stream | None) -> None:
    """See that a stream can go on from what a checkpoint of older code says, which has no digest.

    Raises:
      Damaged: it cannot.
    """
    if stream is None or "arrays" in meta:
        return
    try:
        check_position(stream, meta.get("stream", {}))
    except ValueError as error:
        raise Damaged(f"{path} is damaged: resume.json: {_first_line(error)}") from error


@contextmanager
def writing_model(folder: Path) -> Iterator[None]:
    """What is done to write the finished model.

    Raises:
      CheckpointError: it could not be written, for want of space or for another reason of the file system.
    """
    try:
        yield
    except Exception as error:
        if not files.is_storage(error):
            raise
        raise CheckpointError(
            f"writing the model to {folder} failed: {_first_line(error)}{files.describe_room(folder)}\n"
            + _what_is_left(folder)
        ) from error


def _what_is_left(output_dir: Path) -> str:
    found = [path.name for path in find_checkpoints(output_dir)]
    if not found:
        return "No checkpoint was saved before."
    return f"What was saved before is untouched ({', '.join(found)}): to go on from there, start it again."


def _accept(path: Path, meta: Mapping[str, Any]) -> None:
    """No checkpoint is refused."""


Check = Callable[[Path, Mapping[str, Any]], None]


def restore(path: Path, like: Any) -> Any:
    """The state saved in `path`: see `restore_checked`."""
    return restore_checked(path, like).state


def restore_checked(path: Path, like: Any, check: Check = _accept) -> Restored:
    """The checkpoint in `path`, its state with the structure, dtypes and shardings of `like`, verified by its digests.

    Args:
      like: tree of `ShapeDtypeStruct` with shardings (or of arrays).
      check: called with the folder and the content of `resume.json` before arrays are read; raises `CheckpointError` if
        the run cannot go on from there, `Damaged` if what it says cannot be.

    Raises:
      Damaged: it is not what was written.
      CheckpointError: leaves are missing, new, or of another shape or dtype: the run is configured differently.
    """
    meta, fault = {}, ""
    try:
        meta = read_meta(path)
    except Damaged as error:
        fault = str(error)
    _raise_together("notes read", fault)
    check(path, meta)
    wanted = named_leaves(like)
    expected: Mapping[str, str] = meta.get("arrays", {})  # checkpoints of older code do not say it
    _refuse_differences(path, expected, wanted)
    # The handler alone: a Checkpointer ends with a barrier, where those who can read would wait for one who cannot.
    reader = ocp.StandardCheckpointHandler()
    arrays: dict[str, Any] = {}
    stored: dict[str, str] = {}
    try:
        with _without_late_echoes():
            stored = _stored(path)
            if expected and stored != expected:
                raise ValueError("the arrays in it are not those that were saved")
            if stored == _described(wanted):
                arrays = reader.restore(_state_of(path), args=ocp.args.StandardRestore(wanted))
    except Exception as error:
        fault = f"{path} is damaged: {type(error).__name__}: {_first_line(error)}"
    _raise_together("restored", fault)
    _refuse_differences(path, stored, wanted)
    damaged = [key for key, value in digests(arrays).items() if value != meta["digests"].get(key)]
    if damaged:
        raise Damaged(f"{path} is damaged: the stored data of {', '.join(damaged[:4])} is not what was saved")
    return Restored(path, jax.tree.unflatten(jax.tree.structure(like), [arrays[key] for key in wanted]), meta)


@contextmanager
def _without_late_echoes() -> Iterator[None]:
    """If reading one array fails, Orbax closes the loop in which the others are awaited, and each of them comes back
    with a traceback on stderr. They are not shown, however late.
    """
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if not re.search("Event loop is closed|while reading array index", str(found.exc_value)):
            before(found)

    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    yield
    sys.unraisablehook = before  # only after a success: nothing is awaited any more


def _raise_together(name: str, fault: str) -> None:
    faults = [x for x in exchange.all_gather(name, fault) if x]
    if faults:
        raise Damaged(faults[0])


def _state_of(path: Path) -> Any:
    return files.Literal(path.absolute() / "state")


def _described(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Dtype and shape of each array, as text."""
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()}


def _stored(path: Path) -> dict[str, str]:
    """What `state` holds, by its own account. No data is read."""
    metadata: Any = ocp.StandardCheckpointHandler().metadata(_state_of(path))
    return _described(dict(metadata.items()))


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError | Damaged) and str(error):
        return str(error).splitlines()[0]
    if "No space left on device" in str(error):  # TensorStore says it at length
        return "No space left on device"
    return (str(error) or type(error).__name__).splitlines()[0].partition(" See full TensorStore details")[0]


def _refuse_differences(path: Path, stored: Mapping[str, str], wanted: Mapping[str, Any]) -> None:
    here = _described(wanted)
    if not stored or stored == here:
        return
    faults = [f"{key} is not in it" for key in here if key not in stored]
    faults += [f"{key} is in it, but not in this run" for key in stored if key not in here]
    faults += [
        f"{key} is {stored[key]} in it, {here[key]} in this run"
        for key in here
        if key in stored and stored[key] != here[key]
    ]
    shown = "\n  ".join(faults[:6]) + (f"\n  ... and {len(faults) - 6} more" if faults[6:] else "")
    raise CheckpointError(
        f"{path} was written by a run with another configuration:\n  {shown}\n"
        "Resume with the configuration it was written with, or give another output_dir."
    )


def restore_newest(output_dir: Path, like: Any, check: Check = _accept) -> Restored | None:
    """The newest checkpoint that is whole, or None if there is none. Newer ones, all damaged, are set aside and said.

    Args:
      like, check: see `restore_checked`. What `check` refuses is not damaged: no older one is tried.

    Raises:
      CheckpointError: there are checkpoints, but every one is damaged. Starting from scratch is then the user's choice,
        and all of them stay where they are.
    """
    found = exchange.from_first("checkpoints", lambda: [str(path) for path in find_checkpoints(output_dir)])
    damaged: list[Damaged] = []
    for path in map(Path, reversed(found)):
        try:
            restored = restore_checked(path, like, check)
        except Damaged as error:
            damaged.append(error)
            log.warning("%s. The one before it is tried.", error)
            continue
        if processes.is_first():
            for newer in list(map(Path, reversed(found)))[: len(damaged)]:
                files.set_aside(newer)
        return restored
    if found:
        faults = "\n  ".join(map(str, damaged))
        raise CheckpointError(
            f"no checkpoint in {output_dir} can be read:\n  {faults}\n"
            "To start from scratch: overwrite_output_dir=true, or another output_dir"
        )
    return None
