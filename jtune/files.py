"""Files that appear whole or not at all: they are written under another name, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to; the file takes the name `path` when the block ends without an error.

    Until then a file of that name stays as it was. After an error nothing of the new file is left.

    Args:
      shared: several processes may write this file at once, each under a name of its own.

    Raises:
      OSError: the file cannot be renamed.
    """
    owner = f"{os.uname().nodename}.{os.getpid()}" if shared else "partial"
    partial = path.with_name(f".{path.name}.{owner}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_or_absent(folder: Path) -> Iterator[Path]:
    """A new folder inside of a model's, whose files move to it when the block has ended well, config.json last.

    Until then a model that was there stays; what fails or is killed leaves no config.json beside half of its weights.
    """
    unfinished = folder / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for old in [folder / "config.json", *folder.glob("model*.safetensors*")]:
            old.unlink(missing_ok=True)
        for new in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
            if (folder / new.name).is_dir():
                shutil.rmtree(folder / new.name)
            new.replace(folder / new.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
