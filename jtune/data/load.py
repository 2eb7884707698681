"""Rows of a dataset as an Arrow table on disk, read by `datasets`; and, where that fails, what is wrong and where."""

import difflib
import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from jtune.data.registry import OPENAI_TAGS, Columns, Entry
from jtune.errors import DataError

# Otherwise `datasets` tells a counter on the internet of each reading, of local files, too.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

# File extension -> the reader of `datasets`.
READERS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet", "arrow": "arrow", "txt": "text"}
SHOWN = 80  # characters of a faulty line


def load_table(
    entry: Entry, *, cache_dir: str | None = None, token: str | None = None, num_proc: int | None = None
) -> datasets.Dataset:
    """All rows of one dataset, unchanged.

    Raises:
      DataError: nothing is there, the file is damaged (with file and line), or it has no rows.
    """
    reader, options = _reading(entry, cache_dir, token)
    if entry.source == "hub":
        options |= {"num_proc": num_proc}
    else:  # datasets cannot split fewer files than processes, and says so each time
        files = len(options["data_files"])
        options |= {"num_proc": min(num_proc or 1, files) if files > 1 else None}
    try:
        table = datasets.load_dataset(reader, **options)
    except Exception as error:
        raise unreadable([entry], error) from error
    if len(table) == 0:
        raise _no_rows(entry)
    return table


def open_table(
    entry: Entry, *, cache_dir: str | None = None, token: str | None = None
) -> tuple[datasets.IterableDataset, list[str]]:
    """The rows of one dataset, unchanged, read as they are iterated over; and the names of its columns.

    Raises:
      DataError: as `load_table`, of the first rows.
    """
    reader, options = _reading(entry, cache_dir, token)
    try:
        table = datasets.load_dataset(reader, streaming=True, **options)
        first = next(iter(table), None)
    except Exception as error:
        raise unreadable([entry], error) from error
    if first is None:
        raise _no_rows(entry)
    return table, list(first)


def unreadable(entries: Sequence[Entry], error: Exception) -> DataError:
    """What to say of an error that came up while rows of `entries` were read: file and line where they have one."""
    if isinstance(error, DataError):
        return error
    [*_, entry] = entries
    if len(entries) == 1 and "corresponds to no data" in str(error):
        return _no_rows(entry)
    for entry in entries:
        if entry.source == "file":
            try:
                _diagnose(data_files(entry), entry)
            except DataError as found:
                return found
    names = ", ".join(f"{entry.name!r} ({entry.path})" for entry in entries)
    return DataError(f"cannot read dataset {names}: {_deepest(error)}")


def _reading(entry: Entry, cache_dir: str | None, token: str | None) -> tuple[str, dict[str, Any]]:
    """The reader of `datasets` for an entry, and what it is told."""
    options: dict[str, Any] = {"split": entry.split, "cache_dir": cache_dir}
    if entry.source == "hub":
        options |= {"name": entry.subset, "data_dir": entry.folder, "revision": entry.revision, "token": token}
        return entry.path, options
    files = data_files(entry)
    # datasets takes a name for a pattern: with a "[" in it no file is found, or another one.
    patterns = [glob.escape(file) for file in files] if entry.source == "file" else files
    return _reader(files, entry), options | {"data_files": patterns}


def _no_rows(entry: Entry) -> DataError:
    return DataError(f"dataset {entry.name!r} ({entry.path}) has 0 rows")


def data_files(entry: Entry) -> list[str]:
    """The files of an entry: itself, or what lies in the folder, in alphabetical order (hidden files are left out)."""
    if entry.source == "url":
        return [entry.path]
    path = Path(entry.path)
    if path.is_dir():
        files = sorted(str(f) for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
        if not files:
            raise DataError(f"dataset {entry.name!r}: the folder {path} holds no files")
        return files
    if not path.is_file():
        siblings = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise DataError(f"dataset {entry.name!r}: no file {path}." + (f" There is {near[0]!r}." if near else ""))
    return [str(path)]


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
        if os.path.splitext(path)[1].lower() not in (".json", ".jsonl") or _is_array(path):
            break  # how many rows it has is not told by its lines
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not left:
                    return found
                if not line.strip():
                    continue
                if first == left[-1]:
                    found[left.pop()] = f"{Path(path).name}:{number}"
                first += 1
    return found


def _is_array(path: str) -> bool:
    """Whether a JSON file is one array of rows, and not a row a line."""
    with open(path, "rb") as file:
        return next((byte for line in file for byte in line.split()), b"")[:1] == b"["


def resolve_format(entry: Entry, found: list[str]) -> Entry:
    """For a dataset without an entry: tell its format from its columns.

    `messages` is OpenAI's form, `conversations` ShareGPT's; a table of `text` alone is for stage pt; else alpaca.
    """
    if entry.formatting is not None:
        return entry
    if "messages" in found:
        return replace(entry, formatting="openai", columns=Columns(messages="messages"), tags=OPENAI_TAGS)
    if "conversations" in found:
        return replace(entry, formatting="sharegpt")
    if "text" in found and "instruction" not in found:
        return replace(entry, formatting="alpaca", columns=Columns(prompt="text", query=None, response=None))
    return replace(entry, formatting="alpaca")


def check_columns(entry: Entry, found: list[str], stage: str) -> None:
    """Columns that the entry names, and those without which nothing can be read, must exist.

    Raises:
      DataError: with the columns that there are.
    """
    columns = entry.columns
    needed = set(entry.listed)
    if entry.formatting == "alpaca":
        needed.add("prompt" if columns.prompt else "query")
        needed |= {"response"} if stage != "pt" and not entry.ranking else set()
    else:
        needed.add("messages")
    needed |= {"chosen", "rejected"} if entry.ranking else set()
    needed |= {"kto_tag"} if stage == "kto" else set()
    for key in sorted(needed):
        column = getattr(columns, key)
        if column is None or column not in found:
            near = difflib.get_close_matches(column or key, found, n=1, cutoff=0.5)
            suggestion = near[0] if near else "the_column"
            raise DataError(
                f"dataset {entry.name!r} ({entry.path}), row 1: no column {column or key!r} for the {key}. "
                f"Its columns are {', '.join(found)}. In dataset_info.json, say which one it is: "
                f'"columns": {{"{key}": "{suggestion}"}}'
            )


def check_stage(entry: Entry, stage: str) -> None:
    """Raise a DataError for sets that are not for `stage`."""
    kind = "ranking" if entry.ranking else "kto_tag" if entry.columns.kto_tag else ""
    if kind and not (stage == "pt" and kind == "kto_tag"):
        stages = ("rm", "dpo") if kind == "ranking" else ("kto",)
        if stage not in stages:
            holds = f"dataset {entry.name!r} holds preferences ({kind})"
            raise DataError(f"{holds}: it is for stage {' and '.join(stages)}, not {stage}")
    elif stage in ("rm", "dpo", "kto"):
        wanted = '"columns": {"kto_tag": "..."}' if stage == "kto" else '"ranking": true'
        raise DataError(f"dataset {entry.name!r} holds no preferences, and stage {stage} learns from them: {wanted}")
    media = [key for key in ("images", "videos", "audios") if getattr(entry.columns, key)]
    if media:
        raise DataError(f"dataset {entry.name!r} has {', '.join(media)}; jtune trains on text")


def _reader(files: list[str], entry: Entry) -> str:
    kinds = {os.path.splitext(f)[1].lstrip(".").lower() for f in files}
    unknown = sorted(kinds - set(READERS))
    if unknown:
        example = next(f for f in files if f.lower().endswith(unknown[0]))
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
                _check_utf8(path)
        except DataError as found:
            return found
    return DataError(f"dataset {entry.name!r} ({entry.path}): not UTF-8: {error}")


def _diagnose(files: list[str], entry: Entry) -> None:
    """Raise a DataError with file and line for the faults that have one; return if none is found."""
    if all(os.path.getsize(f) == 0 for f in files):
        raise DataError(f"dataset {entry.name!r} ({entry.path}) has 0 rows: the file is empty")
    for path in files:
        kind = READERS[os.path.splitext(path)[1].lstrip(".").lower()]
        if kind in ("json", "csv", "text"):
            _check_utf8(path)
        if kind == "json":
            _check_types(path, _parsed(path))


def _check_utf8(path: str) -> None:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line: {line[:SHOWN]!r}. "
                    f"If it is Latin-1: iconv -f latin1 -t utf8 {path}"
                ) from error


def _parsed(path: str) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON array or of JSON lines, each with its place. Raises DataError at the first that is none."""
    with open(path, encoding="utf-8") as file:
        if _is_array(path):
            text = file.read()
            try:
                rows = json.loads(text)
            except json.JSONDecodeError as error:
                line = text.splitlines()[error.lineno - 1] if error.lineno <= text.count("\n") + 1 else ""
                raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}: {line.strip()[:SHOWN]}") from error
            yield from ((f"{path} row {i + 1}", row) for i, row in enumerate(rows))
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line.rstrip("\r\n"))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON: {error.msg}: {line.strip()[:SHOWN]}") from error


def _check_types(path: str, rows: Iterator[tuple[str, Any]]) -> None:
    """Rows must be objects, and a column of one type."""
    first: dict[str, tuple[str, str]] = {}
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected an object, one row, found {_kind(row)}: {json.dumps(row)[:SHOWN]}")
        for key, value in row.items():
            if value is None:
                continue
            kind = _kind(value)
            known, where = first.setdefault(key, (kind, place))
            if kind != known:
                raise DataError(
                    f"{place}: {key!r} is {kind}, but {known} in {where}: a column has one type "
                    "(jtune takes tools and function calls as JSON text, too)"
                )


def _kind(value: Any) -> str:
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)
