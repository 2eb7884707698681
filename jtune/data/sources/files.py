"""Files of rows as bytes: decompressed, without a byte order mark, and UTF-8."""

import codecs
import hashlib
import io
import os
from typing import IO, Any

import fsspec
import pyarrow as pa

from jtune.errors import DataError

SHOWN = 80  # characters of a faulty line
COMPRESSED = ("gz", "bz2", "xz", "zst")
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def kind_of(path: str) -> str:
    """
    >>> kind_of("a/rows.JSONL.gz"), kind_of("b.csv"), kind_of("LICENSE"), kind_of("https://host/c.json?download=true")
    ('jsonl', 'csv', '', 'json')
    """
    name = path.lower().partition("?")[0] if "://" in path else path.lower()
    stem, extension = os.path.splitext(name)
    if extension.lstrip(".") in COMPRESSED:
        extension = os.path.splitext(stem)[1]
    return extension.lstrip(".")


def open_bytes(path: str) -> IO[bytes]:
    """A file, decompressed, at the first byte after a byte order mark.

    Raises:
      DataError: it is UTF-16.
    """
    file: Any
    if path.lower().endswith(".zst"):  # fsspec reads it with a library that few have
        raw: Any = fsspec.open(path, "rb")
        file = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw.open()), "zstd"))  # pyright: ignore[reportArgumentType]
    else:
        opened: Any = fsspec.open(path, "rb", compression="infer")
        file = io.BufferedReader(opened.open())
    start = file.peek(3)[:3]
    if start[:2] in UTF16 or (len(start) > 1 and 0 in start[:2]):
        raise DataError(f"{path}: UTF-16, expected UTF-8: iconv -f utf-16 -t utf-8 {path}")
    if start == codecs.BOM_UTF8:
        file.read(3)
    return file


def sha1(path: str) -> str:
    """The SHA-1 of a file as it lies there, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(usedforsecurity=False)).hexdigest()


def decoded(line: bytes, path: str, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line: {line[:SHOWN]!r}. "
            f"If it is Latin-1: iconv -f latin1 -t utf8 {path}"
        ) from error


def check_utf8(path: str) -> None:
    """Raise a DataError, with the line, where a file is not UTF-8."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            decoded(line, path, number)
