"""Rows of a dataset as an Arrow table on disk, read by `datasets`; and, where that fails, what is wrong and where."""

import difflib
import glob
import json
import logging
import lzma
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import config as datasets_config

from jtune.data.cache.shards import arrow_column
from jtune.data.sources.columns import MEDIA_COLUMNS, USUAL, note_once
from jtune.data.sources.files import check_utf8, kind_of, open_bytes, sha1
from jtune.data.sources.json_values import layout
from jtune.data.sources.registry import Entry
from jtune.data.sources.rows import LATE, column_names, reader, say_late
from jtune.errors import DataError

# Otherwise `datasets` tells a counter on the internet of each reading, of local files, too.
datasets_config.HF_UPDATE_DOWNLOAD_COUNTS = False

# File extension -> the reader: our own (jtune.data.sources.rows) of "json" and "csv", that of `datasets` of the others.
READERS = {"json": "json", "jsonl": "json", "ndjson": "json", "csv": "csv", "tsv": "csv"}
READERS |= {"parquet": "parquet", "arrow": "arrow", "txt": "text"}
OURS = ("json", "csv")
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Texts of these names, in any case, tell of the data.
ABOUT = ("readme", "license", "licence", "notice", "changelog", "citation", "copying", "authors", "requirements")
ARCHIVES = ("zip", "tar", "tgz", "rar", "7z")
# What reads an address, where the package that fsspec needs has another name than its module.
PACKAGES = {"google": "gcsfs", "botocore": "s3fs", "boto3": "s3fs", "azure": "adlfs", "smbprotocol": "smbprotocol"}


class Hub(NamedTuple):
    """How data sets are downloaded, and where they are kept."""

    cache_dir: str | None = None
    token: str | None = None


PUBLIC = Hub()  # no token, the cache of `datasets`


def load_table(entry: Entry, hub: Hub = PUBLIC, *, num_proc: int | None = None) -> datasets.Dataset:
    """All rows of one dataset, unchanged.

    Raises:
      DataError: nothing is there, the file is damaged (with file and line), or it has no rows.
    """
    try:
        if entry.source == "hub":
            table = datasets.load_dataset(entry.path, **_hub_options(entry, hub), num_proc=num_proc)
        else:
            files = data_files(entry)
            _compare_sha1(files, entry)
            # datasets cannot split fewer files than processes, and says so each time
            processes = min(num_proc or 1, len(files)) if len(files) > 1 else None
            kind = _reader(files, entry)
            if kind in OURS:
                names = column_names(files)
                builder = reader(_literal(files, entry), [*_read_columns(names, entry), LATE], hub.cache_dir)
                builder.download_and_prepare(num_proc=processes)
                table: Any = builder.as_dataset(split=entry.split)
                _say_late(entry, table)
                others = set(table.column_names) - set(names)
                columns = table.data.column
                unread = (x for x in others if x == LATE or columns(x).null_count == len(columns(x)))
                table = table.remove_columns(sorted(unread))
            else:
                how: dict[str, Any] = {"split": entry.split, "cache_dir": hub.cache_dir}
                table = datasets.load_dataset(kind, data_files=_literal(files, entry), num_proc=processes, **how)
    except Exception as error:
        raise unreadable([entry], error) from error
    if len(table) == 0:
        raise _no_rows(entry)
    return table.cast(_undecoded(table.features)) if _decodes(table.features) else table


def open_table(entry: Entry, hub: Hub = PUBLIC) -> tuple[datasets.IterableDataset, list[str], Mapping[str, Any]]:
    """The rows of one dataset, unchanged, read as they are iterated over; the names of its columns; its first row.

    Raises:
      DataError: as `load_table`, of the first rows.
    """
    try:
        names: list[str] = []
        if entry.source == "hub":
            table = datasets.load_dataset(entry.path, **_hub_options(entry, hub), streaming=True)
        else:
            files = data_files(entry)
            kind = _reader(files, entry)
            if kind in OURS:
                names = column_names(files)
                typed = kind == "json" and {layout(file) for file in files} == {
                    "lines"
                }  # as positions in checkpoints were written
                builder = reader(_literal(files, entry), _read_columns(names, entry), hub.cache_dir, typed=typed)
                table: Any = builder.as_streaming_dataset(split=entry.split)
            else:
                how: dict[str, Any] = {"split": entry.split, "cache_dir": hub.cache_dir}
                table = datasets.load_dataset(kind, data_files=_literal(files, entry), streaming=True, **how)
        table = table.decode(False) if table.features and _decodes(table.features) else table
        first = next(iter(table), None)
    except Exception as error:
        raise unreadable([entry], error) from error
    if first is None:
        raise _no_rows(entry)
    return table, names or list(first), first


def _decodes(feature: Any) -> bool:
    """Whether `datasets` decodes images, videos or audio in rows as they are read, which needs libraries and time."""
    if isinstance(feature, Mapping | list):
        return any(map(_decodes, feature.values() if isinstance(feature, Mapping) else feature))
    return bool(getattr(feature, "decode", False)) or _decodes(getattr(feature, "feature", []))


def _undecoded(feature: Any) -> Any:
    """`feature`, of a table, so that nothing is decoded."""
    if isinstance(feature, Mapping):
        return datasets.Features({name: _undecoded(inner) for name, inner in feature.items()})
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    changes = {"decode": False} if getattr(feature, "decode", False) else {}
    changes |= {"feature": _undecoded(feature.feature)} if hasattr(feature, "feature") else {}
    return replace(feature, **changes) if changes else feature


def unreadable(entries: Sequence[Entry], error: Exception) -> DataError:
    """What to say of an error that came up while rows of `entries` were read: file and line where they have one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DataError):
            return DataError(str(cause))  # another one: it is raised from `error`, of which this is a cause
        cause = cause.__cause__ or cause.__context__
    [*_, entry] = entries
    if len(entries) == 1 and "corresponds to no data" in str(error):
        return _no_rows(entry)
    for entry in entries:
        if entry.source == "file":
            try:
                _diagnose(data_files(entry), entry)
            except DataError as found:
                return found
            except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error):  # damaged compression
                continue
    names = ", ".join(f"{entry.name!r} ({entry.path})" for entry in entries)
    return DataError(f"cannot read dataset {names}: {_missing_package(error) or _deepest(error)}")


def _missing_package(error: BaseException | None) -> str | None:
    """What to install, where an error is that a package which reads a kind of address is not there."""
    while error is not None:
        if isinstance(error, ImportError):
            module = (error.name or "").split(".")[0]
            package = PACKAGES.get(module, module)
            return f"such an address is read with {package}: pip install {package}" if package else str(error)
        error = error.__cause__ or error.__context__
    return None


def _hub_options(entry: Entry, hub: Hub) -> dict[str, Any]:
    """The options of `datasets.load_dataset` for a set on the hub."""
    where = {"name": entry.subset, "data_dir": entry.folder, "revision": entry.revision, "token": hub.token}
    return where | {"split": entry.split, "cache_dir": hub.cache_dir}


def _read_columns(names: Sequence[str], entry: Entry) -> list[str]:
    """The columns that are read: those of the first rows, and those of use, which may first come later."""
    known = [*filter(None, astuple(entry.columns)), *USUAL, *MEDIA_COLUMNS]
    return list(dict.fromkeys([*names, *known]))


def _literal(files: list[str], entry: Entry) -> list[str]:
    """Names that `datasets` does not take for patterns: with a "[" in it no file is found, or another one."""
    return [glob.escape(file) for file in files] if entry.source == "file" else files


def _no_rows(entry: Entry) -> DataError:
    empty = entry.source == "file" and all(os.path.getsize(file) == 0 for file in data_files(entry))
    return DataError(f"dataset {entry.name!r} ({entry.path}) has 0 rows" + ": the file is empty" * empty)


def data_files(entry: Entry) -> list[str]:
    """The files of an entry: itself, or what lies in the folder, in alphabetical order (hidden files are left out)."""
    if entry.source == "url":
        return [entry.path]
    path = Path(entry.path)
    if os.path.isdir(path):
        listed = sorted(f for f in path.iterdir() if not f.name.startswith("."))
        files = [str(f) for f in listed if f.is_file() and kind_of(f.name) in READERS and not _tells_of_data(f)]
        if not files:
            kinds = ", ".join(f".{kind}" for kind in READERS)
            inner = [f.name for f in listed if f.is_dir()]
            hint = f": name one of its folders, {', '.join(inner[:6])}" if inner else ""
            raise DataError(f"dataset {entry.name!r}: the folder {path} holds no files of data ({kinds}){hint}")
        left = [f.name + "/" * f.is_dir() for f in listed if str(f) not in files]
        if left:
            note_once(f"dataset {entry.name!r}: not read from {path}: {', '.join(left)}")
        return files
    if not os.path.isfile(path):
        siblings = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise DataError(f"dataset {entry.name!r}: no file {path}." + (f" There is {near[0]!r}." if near else ""))
    return [str(path)]


def _tells_of_data(file: Path) -> bool:
    return file.name in NO_DATA or (kind_of(file.name) == "txt" and file.stem.lower() in ABOUT)


def _compare_sha1(files: Sequence[str], entry: Entry) -> None:
    """Warn where the file is not the one that the entry's `file_sha1` is of, as LLaMA-Factory did."""
    if entry.file_sha1 is None or entry.source != "file":
        return
    if len(files) > 1:
        note_once(
            f"dataset {entry.name!r}: file_sha1 is of one file, but {entry.path} holds {len(files)}: not compared"
        )
    elif (found := sha1(files[0])) != entry.file_sha1.lower():
        note_once(
            f"dataset {entry.name!r}: {files[0]} is not the file that file_sha1 is of: {found}, not {entry.file_sha1}",
            logging.WARNING,
        )


def places(entries: Sequence[Entry] | Mapping[int, Entry], rows: datasets.Dataset) -> tuple[str, ...]:
    """Where aligned or encoded rows come from, for messages: "file:line" in JSON lines, else "file row 3", from 1."""
    wanted: dict[int, list[int]] = {}
    origins = list(zip(rows["dataset"][:], rows["row"][:]))
    for dataset, row in origins:
        wanted.setdefault(dataset, []).append(row)
    found = {dataset: _places(entries[dataset], numbers) for dataset, numbers in wanted.items()}
    return tuple(found[dataset][row] for dataset, row in origins)


def _places(entry: Entry, rows: Sequence[int]) -> dict[int, str]:
    name = Path(entry.path).name if entry.source == "file" else entry.path
    found = {row: f"{name} row {row + 1}" for row in rows}
    if entry.source != "file":
        return found
    left, first = sorted(set(rows), reverse=True), 0
    for path in data_files(entry):
        if READERS.get(kind_of(path)) != "json" or layout(path) != "lines":
            break  # how many rows it has is not told by its lines
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                if not left:
                    return found
                if not line.strip():
                    continue
                if first == left[-1]:
                    found[left.pop()] = f"{Path(path).name}:{number}"
                first += 1
    return found


def _say_late(entry: Entry, table: datasets.Dataset) -> None:
    """Name the columns that no row had when their names were looked up (see `rows.LATE`)."""
    column = arrow_column(table, LATE)
    rows = np.flatnonzero(pc.call_function("is_valid", [column]).to_numpy())
    if len(rows):
        cells, first = column.take(pa.array(rows)).to_pylist(), int(rows[0])
        names = dict.fromkeys(name for cell in cells for name in json.loads(cell))
        say_late(entry.name, _places(entry, [first])[first], tuple(names))


def _reader(files: list[str], entry: Entry) -> str:
    kinds = {kind_of(f) for f in files}
    unknown = sorted(kinds - set(READERS))
    if unknown:
        example = next(f for f in files if kind_of(f) == unknown[0])
        if unknown[0] in ARCHIVES:
            raise DataError(f"dataset {entry.name!r}: {example} is an archive: unpack it, and name the file or folder")
        raise DataError(f"dataset {entry.name!r}: {example} is none of {', '.join(READERS)}")
    readers = {READERS[kind] for kind in kinds}
    if len(readers) > 1:
        raise DataError(
            f"dataset {entry.name!r}: {entry.path} holds files of several kinds ({', '.join(sorted(kinds))}): "
            "make them one kind, or one entry each"
        )
    return readers.pop()


def _deepest(error: BaseException) -> str:
    """The last line of the error that began it all: readers wrap it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1][:300]


# ---------------------------------------------------------------------- what is wrong with a file


def not_utf8(entry: Entry, error: UnicodeDecodeError) -> DataError:
    """What to say of text that is not UTF-8; readers pass it on, and it shows when a row is looked at."""
    if entry.source == "file":
        try:
            for path in data_files(entry):
                check_utf8(path)
        except DataError as found:
            return found
    return DataError(f"dataset {entry.name!r} ({entry.path}): not UTF-8: {error}")


def _diagnose(files: list[str], entry: Entry) -> None:
    """Raise a DataError with file and line for the faults that have one; return if none is found."""
    if all(os.path.getsize(f) == 0 for f in files):
        raise DataError(f"dataset {entry.name!r} ({entry.path}) has 0 rows: the file is empty")
    for path in files:
        if READERS[kind_of(path)] in ("json", "csv", "text"):
            check_utf8(path)
