"""Files that appear whole or not at all: they are written under another name, then renamed. And JSON of others."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jtune.errors import DataError


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


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that another program, or a person, has written.

    Raises:
      FileNotFoundError: there is no such file.
      DataError: it cannot be read, or holds something else; with the line.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path}: not JSON: {str(error).split(':')[0]}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
