"""Reading a checkpoint: verified by its digests, or refused."""

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jtune.data.stream import Stream, check_position
from jtune.distributed import exchange, processes
from jtune.errors import CheckpointError
from jtune.train import files
from jtune.train.checkpoint_folder import (
    Damaged,
    described_arrays,
    find_checkpoints,
    first_line,
    read_meta,
    state_folder,
    stored_arrays,
)
from jtune.train.digest import digests, named_leaves

log = logging.getLogger("jtune")


class Restored(NamedTuple):
    """A checkpoint that has been read and verified."""

    path: Path
    state: Any
    meta: dict[str, Any]  # the content of `resume.json`


def check_stream(path: Path, meta: Mapping[str, Any], stream: Stream | None) -> None:
    """Check that a stream can go on from the position in a checkpoint of older code, which has no digest.

    Raises:
      Damaged: the stream cannot go on from there.
    """
    if stream is None or "arrays" in meta:
        return
    try:
        check_position(stream, meta.get("stream", {}))
    except ValueError as error:
        raise Damaged(f"{path} is damaged: resume.json: {first_line(error)}") from error


def _accept(path: Path, meta: Mapping[str, Any]) -> None:
    """Accept every checkpoint."""


Check = Callable[[Path, Mapping[str, Any]], None]


def restore(path: Path, like: Any) -> Any:
    """The state saved in `path`: see `restore_checked`."""
    return restore_checked(path, like).state


def restore_checked(path: Path, like: Any, check: Check = _accept) -> Restored:
    """The checkpoint in `path`, its state with the structure, dtypes and shardings of `like`, verified by its digests.

    Args:
      like: tree of `ShapeDtypeStruct` with shardings (or of arrays).
      check: called with the folder and the content of `resume.json` before arrays are read; raises `CheckpointError` if
        the run cannot go on from there, `Damaged` if the content is impossible.

    Raises:
      Damaged: the files are not those that were written.
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
            stored = stored_arrays(path)
            if expected and stored != expected:
                raise ValueError("the arrays in it are not those that were saved")
            if stored == described_arrays(wanted):
                arrays = reader.restore(state_folder(path), args=ocp.args.StandardRestore(wanted))
    except Exception as error:
        fault = f"{path} is damaged: {type(error).__name__}: {first_line(error)}"
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


def _refuse_differences(path: Path, stored: Mapping[str, str], wanted: Mapping[str, Any]) -> None:
    here = described_arrays(wanted)
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
