"""Rows of JSON, JSON lines, CSV and TSV as Arrow columns of text, a block at a time: nothing is guessed from values.

The readers of `datasets` guess types: "2031-05-09" becomes a timestamp, `NA` nothing, 007 a 7, and what is guessed from
the first block breaks on a later one. Here a text stays as it is written, null and an empty cell are null, and a number
or a truth value becomes its literal. A list or an object is kept as JSON behind `NESTED`; `value_of` gives it back.
"""

import codecs
import csv
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

import datasets
import fsspec
import pandas
import pyarrow as pa
import xxhash
from datasets.builder import Key

from jtune.errors import DataError

log = logging.getLogger("jtune")

NESTED = "\x00json\x00"  # begins a cell that holds a list or an object, as JSON
LATE = "(late columns)"  # a column of the names of columns that are not read, as a JSON list where they first come up
BLOCK = 4 << 20  # characters of a block of rows, about
BLOCK_ROWS = 10_000
CELLS = 1000  # rows whose columns are looked at before all are read
CHUNK = 1 << 20  # characters of a JSON array that are read at once
SHOWN = 80  # characters of a faulty line
MOST_NAMES = 8  # columns that are named in a line
DELIMITERS = {"csv": ",", "tsv": "\t"}
COMPRESSED: tuple[str, ...] = ("gz", "bz2", "xz", "zst")
Compression = Literal["gzip", "bz2", "xz", "zstd"] | None
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def kind_of(path: str) -> str:
    """
    >>> kind_of("a/rows.JSONL.gz"), kind_of("b.csv"), kind_of("LICENSE")
    ('jsonl', 'csv', '')
    """
    stem, extension = os.path.splitext(path.lower())
    if extension.lstrip(".") in COMPRESSED:
        extension = os.path.splitext(stem)[1]
    return extension.lstrip(".")


def open_bytes(path: str) -> IO[bytes]:
    """A file, decompressed, at the first byte after a byte order mark.

    Raises:
      DataError: it is UTF-16.
    """
    opened: Any = fsspec.open(path, "rb", compression="infer")
    file = opened.open()
    start = file.read(3)
    if start[:2] in UTF16:
        raise DataError(f"{path}: UTF-16, expected UTF-8: iconv -f utf-16 -t utf-8 {path}")
    file.seek(3 if start == codecs.BOM_UTF8 else 0)
    return file


def is_array(path: str) -> bool:
    """Whether a JSON file is one array of rows, and not a row a line."""
    with open_bytes(path) as file:
        return next((byte for line in file for byte in line.split()), b"")[:1] == b"["


def column_names(paths: Sequence[str]) -> list[str]:
    """The columns of the first rows of each file."""
    names: dict[str, None] = {}
    for path in paths:
        if kind_of(path) in DELIMITERS:
            names |= dict.fromkeys(_header(path))
            continue
        for (_, row), _ in zip(json_rows(path), range(CELLS)):
            names |= dict.fromkeys(row)
    return list(names)


def value_of(cell: Any) -> Any:
    """What a cell stands for: the list or the object that it holds, else itself."""
    if not isinstance(cell, str) or not cell.startswith(NESTED):
        return cell
    try:
        return json.loads(cell[len(NESTED) :])
    except ValueError:  # a text of someone else that begins so
        return cell


def reader(
    paths: Sequence[str], columns: Sequence[str], cache_dir: str | None, *, typed: bool = True
) -> datasets.ArrowBasedBuilder:
    """The builder of `datasets` that reads files into the cache, or streams them: columns of text, null where none.

    Args:
      typed: `datasets` is told the columns before it reads. A stream's position depends on whether it was.
    """
    code = xxhash.xxh64(Path(__file__).read_bytes()).hexdigest()
    how: dict[str, Any] = {"columns": tuple(columns), "typed": typed}
    return TextRows(cache_dir=cache_dir, dataset_name="rows", hash=code, data_files=list(paths), **how)


@dataclass
class TextConfig(datasets.BuilderConfig):
    columns: tuple[str, ...] = ()
    typed: bool = True


class TextRows(datasets.ArrowBasedBuilder):
    BUILDER_CONFIG_CLASS = TextConfig
    config: Any

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self._features() if self.config.typed else None)

    def _features(self) -> datasets.Features:
        return datasets.Features({name: datasets.Value("string") for name in self.config.columns})

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        files: Any = self.config.data_files
        return [datasets.SplitGenerator(name=name, gen_kwargs={"files": list(found)}) for name, found in files.items()]

    def _generate_shards(self, files: Sequence[str]) -> Iterator[str]:
        yield from files

    def _generate_tables(self, files: Sequence[str]) -> Iterator[tuple[Key, pa.Table]]:
        schema = self._features().arrow_schema
        for shard, path in enumerate(files):
            tables = _csv_tables if kind_of(path) in DELIMITERS else _json_tables
            for number, table in enumerate(tables(path, schema)):
                yield Key(shard, number), table


# ---------------------------------------------------------------------- JSON


def json_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a JSON array or of JSON lines, each with its place.

    Raises:
      DataError: at the first that is no row, with file and line.
    """
    for place, row, _ in _json_values(path):
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected an object, one row, found {kind(row)}: {json.dumps(row)[:SHOWN]}")
        yield place, row


def _json_tables(path: str, schema: pa.Schema) -> Iterator[pa.Table]:
    cells: dict[str, list[str | None]] = {name: [] for name in schema.names}
    names, known = [name for name in schema.names if name != LATE], set(schema.names)
    count = size = 0
    for place, row, text in _json_values(path):
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected an object, one row, found {kind(row)}: {text[:SHOWN]}")
        literals: dict[str, Any] | None = None
        for name in names:
            value = row.get(name)
            if value is not None and not isinstance(value, str):
                if isinstance(value, list | dict):
                    value = NESTED + json.dumps(value, ensure_ascii=False)
                elif isinstance(value, bool):
                    value = "true" if value else "false"
                else:  # 1.10 stays 1.10
                    literals = literals or json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
                    value = str((literals or {})[name])
            cells[name].append(value)
        late = None
        if not row.keys() <= known:
            late = [name for name in row if name not in known]
            known.update(late)
            if LATE not in cells:
                say_late(path, place, tuple(late))
        if LATE in cells:
            cells[LATE].append(json.dumps(late) if late else None)
        size, count = size + len(text), count + 1
        if "\\u" in text:
            _check_surrogates(row, place)
        if size > BLOCK or count == BLOCK_ROWS:
            yield _table(cells, schema, path)
            cells, size, count = {name: [] for name in schema.names}, 0, 0
    if count:
        yield _table(cells, schema, path)


@cache
def say_late(dataset: str, place: str, names: Sequence[str]) -> None:
    """Name, once, columns that come up in a later row and are not read."""
    shown = ", ".join(names[:MOST_NAMES]) + f" and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES)
    log.info("dataset %r: columns not used: %s (first: %s)", os.path.basename(dataset), shown, os.path.basename(place))


def _check_surrogates(row: Mapping[str, Any], place: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        found = ascii(error.object[error.start])
        raise DataError(f"{place}: {found} is half a character (a lone surrogate), which is no text") from error


def _table(cells: Mapping[str, Sequence[str | None]], schema: pa.Schema, path: str) -> pa.Table:
    return pa.Table.from_arrays([pa.array(cells[name], pa.string()) for name in schema.names], schema=schema)


def _json_values(path: str) -> Iterator[tuple[str, Any, str]]:
    """Each value with its place and its text."""
    if is_array(path):
        yield from _array_values(path)
        return
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            text = decoded(line, path, number).rstrip("\r\n")
            try:
                value = json.loads(text)
            except (json.JSONDecodeError, RecursionError, ValueError) as error:
                hint = ""
                if number == 1 and text.lstrip().startswith("{") and kind_of(path) == "json":
                    hint = ". Expected an array of rows, [{...}, ...], or a row on each line"
                raise DataError(f"{path}:{number}: not JSON: {_said(error)}: {text.strip()[:SHOWN]}{hint}") from error
            yield f"{path}:{number}", value, text


def _array_values(path: str) -> Iterator[tuple[str, Any, str]]:
    """The elements of a JSON array, of which a part is in memory."""
    decoder, number, line = json.JSONDecoder(), 0, 1
    with open_bytes(path) as file:
        decode = codecs.getincrementaldecoder("utf-8")()
        text, at, wanted, ended = "", 0, CHUNK, False

        def more() -> None:
            nonlocal text, at, ended, wanted, line
            piece = file.read(wanted)
            ended = not piece
            try:
                added = decode.decode(piece, final=ended)
            except UnicodeDecodeError as error:
                check_utf8(path)
                raise DataError(f"{path}: not UTF-8: {error}") from error
            line += text.count("\n", 0, at)
            text, at = text[at:] + added, 0
            wanted = max(CHUNK, len(text))  # as much again: an element that is longer is not read many times

        def skip() -> str:
            """The next character that is no space; "" at the end."""
            nonlocal at
            while True:
                while at < len(text) and text[at] in " \t\r\n":
                    at += 1
                if at < len(text) or ended:
                    return text[at : at + 1]
                more()

        def fault(error: str, where: int) -> DataError:
            found = line + text.count("\n", 0, where)
            shown = text[text.rfind("\n", 0, where) + 1 :].split("\n", 1)[0].strip()[:SHOWN]
            return DataError(f"{path}:{found}: not JSON: {error}: {shown}")

        skip()
        at += 1
        while skip() != "]":
            if number and text[at : at + 1] != ",":
                raise fault("Expecting ',' delimiter", at)
            if number:
                at += 1
                skip()
            while True:
                try:
                    value, stop = decoder.raw_decode(text, at)
                    if stop < len(text) or ended:
                        break
                except json.JSONDecodeError as error:
                    if ended:
                        raise fault(error.msg, error.pos) from error
                except (RecursionError, ValueError) as error:
                    raise fault(_said(error), at) from error
                more()
            number += 1
            yield f"{path} row {number}", value, text[at:stop]
            at = stop
        at += 1
        if skip():
            raise fault("Extra data", at)


def _said(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error).split(":")[0]


def kind(value: Any) -> str:
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null" if value is None else type(value).__name__)


# ---------------------------------------------------------------------- CSV


def _csv_tables(path: str, schema: pa.Schema) -> Iterator[pa.Table]:
    header, start = _header(path), 0
    texts: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""]}
    try:
        with open_bytes(path) as file:
            blocks = pandas.read_csv(file, sep=DELIMITERS[kind_of(path)], chunksize=BLOCK_ROWS, **texts)
            for block in blocks:
                if not isinstance(block.index, pandas.RangeIndex):
                    raise DataError(f"{path}: rows have more fields than the header, which has {len(header)}")
                start += len(block)
                arrays = [
                    pa.array(block[name], pa.string(), from_pandas=True)
                    if name in block
                    else pa.nulls(len(block), pa.string())
                    for name in schema.names
                ]
                yield pa.Table.from_arrays([_whole(array) for array in arrays], schema=schema)
    except UnicodeDecodeError as error:
        check_utf8(path)
        raise DataError(f"{path}: not UTF-8: {error}") from error
    except pandas.errors.ParserError as error:
        raise _ragged(path, str(error), header) from error


def _whole(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    return array.combine_chunks().cast(pa.string()) if isinstance(array, pa.ChunkedArray) else array


def _ragged(path: str, said: str, header: Sequence[str]) -> DataError:
    words = said.replace(",", " ").split()
    if "Expected" in words and "saw" in words:
        line, fields = words[words.index("line") + 1], words[words.index("saw") + 1]
        return DataError(
            f"{path}:{line}: {fields} fields, but the header has {len(header)} ({', '.join(header)}). "
            "Put text that holds the separator between double quotes"
        )
    return DataError(f"{path}: {said.strip().splitlines()[-1]}")


def _header(path: str) -> list[str]:
    with open_bytes(path) as file:
        first = (decoded(line, path, number) for number, line in enumerate(file, start=1))
        names = next((row for row in csv.reader(first, delimiter=DELIMITERS[kind_of(path)]) if row), [])
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: column {twice[0]!r} is there {names.count(twice[0])} times: name each once")
    return [name or f"Unnamed: {number}" for number, name in enumerate(names)]


# ---------------------------------------------------------------------- UTF-8


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
