"""Files of checkpoints: on the disk before they are named, replaced without a gap, removed without a half."""

import errno
import glob
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath

from jtune.errors import CheckpointError

log = logging.getLogger("jtune")

UNFINISHED = ".tmp"  # being written
_REPLACED = ".replaced"  # the former holder of a name, while another takes it
_REMOVED = ".removed"  # being deleted
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_Path: Any = type(epath.Path("folder"))


class Literal(_Path):
    """A path for Orbax, whose `glob` reads the folder's own name as a pattern: with a `[` in it nothing is found."""

    def glob(self, pattern: str) -> Iterator["Literal"]:
        for found in glob.glob(os.path.join(glob.escape(str(self)), pattern)):
            yield self._new(found)


# ---------------------------------------------------------------------- written


def sizes(folder: Path) -> dict[str, int]:
    """The bytes of each file below `folder`."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def check_sizes(folder: Path, expected: Mapping[str, int]) -> None:
    """See that files are as long as they were.

    Raises:
      OSError: one is not there, or shorter or longer.
    """
    for name, size in expected.items():
        found = (folder / name).stat().st_size
        if found != size:
            raise OSError(f"{folder / name} holds {found} bytes of {size}")


def sync(folder: Path) -> None:
    """Return when every file below `folder`, and every folder, is on the disk.

    Raises:
      OSError: it cannot be written.
    """
    for where, _, names in os.walk(folder):
        for name in names:
            _sync(Path(where, name))
        _sync_folder(Path(where))


def sync_files(folder: Path, names: Iterable[str]) -> None:
    """Return when these files are on the disk. Others may come and go in `folder` meanwhile."""
    for name in names:
        _sync(folder / name)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in _NO_SYNC:  # some network file systems have it for files only
            raise


def is_storage(error: BaseException) -> bool:
    """Whether an error says that something could not be written. Libraries in Rust give it as text."""
    return isinstance(error, OSError) or "os error" in str(error)


def describe_room(folder: Path) -> str:
    """How much is free where `folder` lies, for messages."""
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there)"
    except OSError:
        return ""


@contextmanager
def full_disk_explained() -> Iterator[None]:
    """What a full disk or quota breaks off, wherever it is met.

    Raises:
      CheckpointError: in the place of the system's error, which names no cause that a person could act on.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        where = f": {error.filename}{describe_room(Path(error.filename).parent)}" if error.filename else ""
        raise CheckpointError(
            f"{error.strerror}{where}\nThe checkpoints are complete: make room, and start the same command again."
        ) from error


# ---------------------------------------------------------------------- named and removed


def replace(temporary: Path, final: Path) -> None:
    """Rename a folder. What had the name before is removed afterwards, and has it again if the renaming fails."""
    former = final.with_name(final.name + _REPLACED)
    _delete(former)
    if taken := os.path.lexists(final):
        final.rename(former)
    try:
        temporary.rename(final)
    except OSError:
        if taken:
            former.rename(final)
        raise
    _sync_folder(final.parent)
    _delete(former)


def remove(path: Path) -> None:
    """Delete a checkpoint: its name goes first, so that a half of it is never taken for one that is damaged."""
    doomed = path.with_name(path.name + _REMOVED)
    _delete(doomed)
    try:
        path.rename(doomed)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error.strerror)
        return
    _delete(doomed)


def set_aside(path: Path, suffix: str = "damaged", why: str = "damaged") -> None:
    """Rename a checkpoint that is in the way, to a name that is free."""
    names = (path.with_name(f"{path.name}.{suffix}{n or ''}") for n in range(10**6))
    aside = next(name for name in names if not os.path.lexists(name))
    try:
        path.rename(aside)
        log.warning("%s is %s, and is now %s", path, why, aside.name)
    except OSError as error:
        log.warning("%s cannot be renamed to %s: %s", path, aside.name, error.strerror)


def clean(output_dir: Path) -> None:
    """Take away what a killed run has left half written or half removed; give a replaced checkpoint its name again."""
    for former in output_dir.glob(f"checkpoint-*{_REPLACED}"):
        name = former.with_name(former.name.removesuffix(_REPLACED))
        if os.path.lexists(name):
            _delete(former)
        else:
            former.rename(name)
    for leftover in output_dir.glob(f"checkpoint-*{UNFINISHED}"):
        log.info("removing %s, a checkpoint that was never finished", leftover)
        _delete(leftover)
    for leftover in output_dir.glob(f"checkpoint-*{_REMOVED}"):
        _delete(leftover)


def _delete(path: Path) -> None:
    """Delete a file, a link or a folder; say so if that fails."""
    if not os.path.lexists(path):
        return
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error.strerror)
