"""Training checkpoints: complete and verified, or invisible.

`output_dir/checkpoint-N/` holds the weights in Hugging Face's or PEFT's form, as a `Trainer` checkpoint does, and
beside them `state/` (Orbax: trainable parameters, optimizer state, step) and `resume.json` (digests, position, logs).
jtune writes everything to `checkpoint-N.tmp`. When Orbax has finished in the background, jtune verifies the folder,
syncs it to the disk and renames it. A run that is killed at any moment leaves the whole folder or none. A save that
fails is dropped. Of several processes, each writes its shards of `state/`; the first makes, renames and removes
folders, in a file system that all share. Orbax renames `state/` only when every process has written its shards.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from jtune.distributed import exchange, processes
from jtune.errors import CheckpointError
from jtune.train import files, resume_json
from jtune.train.checkpoint_folder import (
    Damaged,
    described_arrays,
    find_checkpoints,
    first_line,
    is_ours,
    read_meta,
    saved_by_us,
    state_folder,
    stored_arrays,
)
from jtune.train.digest import digests, named_leaves

log = logging.getLogger("jtune")


class _Pending(NamedTuple):
    """A checkpoint that is being written."""

    temporary: Path
    final: Path
    sizes: Mapping[str, int]  # file -> bytes, of the model's files, as the first process has written them
    arrays: Mapping[str, str] | None  # what `state` must hold (see `_described`)
    on_disk: Future[None] | None  # done when the model's files are synced


class Checkpointer:
    """Writes checkpoints in the background and keeps the newest few. A class: it owns writer threads."""

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
        described = None if arrays is None else described_arrays(arrays)
        self._pending = _Pending(temporary, final, {}, described, None)
        with self._dropped_if_it_fails():
            if processes.is_first():
                temporary.mkdir(parents=True)
            write_files(temporary)
            if arrays is not None:
                # The restore compares: Orbax must give back, bit for bit, what the devices held.
                content = meta | {"step": step, "digests": digests(arrays), "arrays": described}
                if processes.is_first():
                    (temporary / "resume.json").write_bytes(resume_json.encode(content))
            if processes.is_first():
                sizes = files.sizes(temporary)
                on_disk = self._syncing.submit(files.sync_files, temporary, list(sizes))
                self._pending = self._pending._replace(sizes=sizes, on_disk=on_disk)
            if arrays is not None:
                self._orbax.save(state_folder(temporary), args=ocp.args.StandardSave(arrays))
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
        """Wait until the checkpoint being written is complete and visible; raise what went wrong in the background."""
        if self._pending is None:  # errors that Orbax still has are of a checkpoint that was dropped
            with suppress(Exception):
                self._orbax.wait_until_finished()
            return
        with self._dropped_if_it_fails(background=True):
            self._orbax.wait_until_finished()
            if processes.is_first():
                self._publish(self._pending)
        self._pending = None

    def _publish(self, pending: _Pending) -> None:
        """Verify the files, give the folder its name, and only then remove older ones."""
        if pending.on_disk is not None:
            pending.on_disk.result()
        files.sync(pending.temporary)
        files.check_sizes(pending.temporary, pending.sizes)
        if pending.arrays is not None:
            meta = read_meta(pending.temporary)
            stored = stored_arrays(pending.temporary)
            if not meta["arrays"] == pending.arrays == stored:
                raise Damaged("its arrays are not those that were saved")
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
        """Drop the checkpoint being written if the block fails: it never becomes visible.

        Args:
          background: every error counts as one of writing. Otherwise only errors of storage do, and others are
            re-raised as they are: the model may be at fault.
        """
        try:
            yield
        except BaseException as error:
            pending, self._pending = self._pending, None
            if isinstance(error, Exception) and processes.count() == 1:  # with others, Orbax would wait for them
                with suppress(Exception):
                    self._orbax.wait_until_finished()  # else Orbax's late writes make the folder anew
            if pending is not None and processes.is_first():
                shutil.rmtree(pending.temporary, ignore_errors=True)
            if isinstance(error, Exception) and (background or files.is_storage(error)):
                raise self._failure(pending, error) from error
            raise

    def _failure(self, pending: _Pending | None, error: Exception) -> CheckpointError:
        what = pending.final if pending else "a checkpoint"
        return CheckpointError(
            f"writing {what} failed: {first_line(error)}{files.describe_room(self.output_dir)}\n"
            f"It is not kept. {_what_is_left(self.output_dir)}"
        )

    def close(self) -> None:
        self.wait()
        self._orbax.close()
        self._syncing.shutdown()
        exchange.barrier("checkpoints closed")  # now every process sees what the first has renamed


@contextmanager
def writing_model(folder: Path) -> Iterator[None]:
    """A block that writes the finished model.

    Raises:
      CheckpointError: the file system took no more: no space, no permission, or the like.
    """
    try:
        yield
    except Exception as error:
        if not files.is_storage(error):
            raise
        raise CheckpointError(
            f"writing the model to {folder} failed: {first_line(error)}{files.describe_room(folder)}\n"
            + _what_is_left(folder)
        ) from error


def _what_is_left(output_dir: Path) -> str:
    found = [path.name for path in find_checkpoints(output_dir)]
    if not found:
        return "There is no earlier checkpoint."
    return f"Earlier checkpoints are untouched ({', '.join(found)}): start the run again to go on from the newest."
