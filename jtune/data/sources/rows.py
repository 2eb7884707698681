"""Rows of JSON, JSON lines, CSV and TSV as Arrow columns of text, a block at a time: nothing is guessed from values.

The readers of `datasets` guess types: "2031-05-09" becomes a timestamp, `NA` nothing, 007 a 7, and what is guessed from
the first block breaks on a later one. Here a text stays as it is written, null and an empty cell are null, and a number
or a truth value becomes its literal. A list or an object is kept as JSON behind `NESTED`; `value_of` gives it back.
"""

import csv
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import xxhash
from datasets.builder import Key

from jtune.data.sources.files import check_utf8, decoded, kind_of, open_bytes
from jtune.data.sources.json_values import check_row, json_rows, json_values
from jtune.errors import DataError

log = logging.getLogger("jtune")

NESTED = "\x00json\x00"  # begins a cell that holds a list or an object, as JSON
CODE = ("files.py", "json_values.py", "rows.py")  # what the rows that are read depend on
LATE = "(late columns)"  # a column of the names of columns that are not read, as a JSON list where they first come up
BLOCK = 4 << 20  # characters of a block of rows, about
BLOCK_ROWS = 10_000
CELLS = 1000  # rows whose columns are looked at before all are read
MOST_NAMES = 8  # columns that are named in a line
DELIMITERS = {"csv": ",", "tsv": "\t"}
OTHERS = ";\t|"  # that a header may have instead, as programs in other countries write


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
    code = xxhash.xxh64(b"".join((Path(__file__).parent / name).read_bytes() for name in CODE)).hexdigest()
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


def _json_tables(path: str, schema: pa.Schema) -> Iterator[pa.Table]:
    cells: dict[str, list[str | None]] = {name: [] for name in schema.names}
    names, known = [name for name in schema.names if name != LATE], set(schema.names)
    count = size = 0
    for place, row, text in json_values(path):
        check_row(place, row, text)
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


# ---------------------------------------------------------------------- CSV


def _csv_tables(path: str, schema: pa.Schema) -> Iterator[pa.Table]:
    header, start = _header(path), 0
    how = _dialect(path)
    texts: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""]}
    try:
        with open_bytes(path) as file:
            blocks = pandas.read_csv(file, chunksize=BLOCK_ROWS, **how, **texts)
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
        names = next((row for row in csv.reader(first, **_dialect(path)) if row), [])
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: column {twice[0]!r} is there {names.count(twice[0])} times: name each once")
    return [name or f"Unnamed: {number}" for number, name in enumerate(names)]


def _dialect(path: str) -> dict[str, Any]:
    """How the header says that the file is written: what separates the fields, and whether spaces follow it."""
    separator = DELIMITERS[kind_of(path)]
    with open_bytes(path) as file:
        header = decoded(next((line for line in file if line.strip()), b""), path, 1).strip("\r\n")
    found = next((other for other in OTHERS if other in header), None)
    if separator not in header and found is not None and len(next(csv.reader([header], delimiter=found))) > 1:
        say_separator(os.path.basename(path), found)
        separator = found
    spaced = any(name.startswith(" ") for name in next(csv.reader([header], delimiter=separator), []))
    return {"delimiter": separator, "skipinitialspace": spaced}


@cache
def say_separator(name: str, separator: str) -> None:
    """Say, once, that a file's fields are not separated as its kind says."""
    log.info("%s: fields are separated by %r, as its header is", name, separator)
