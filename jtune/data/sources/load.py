"""Rows of a dataset as an Arrow table on disk, read by `datasets`; and, where that fails, what is wrong and where."""

import difflib
import glob
import json
import logging
import lzma
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import config as datasets_config

from jtune.config.stages import RULES, StageRules
from jtune.data.cache.shards import arrow_column
from jtune.data.sources.registry import OPENAI_TAGS, Columns, Entry, Tags
from jtune.data.sources.rows import (
    LATE,
    check_utf8,
    column_names,
    is_array,
    kind_of,
    open_bytes,
    reader,
    say_late,
    value_of,
)
from jtune.errors import DataError

# Otherwise `datasets` tells a counter on the internet of each reading, of local files, too.
datasets_config.HF_UPDATE_DOWNLOAD_COUNTS = False

log = logging.getLogger("jtune")

# File extension -> the reader: our own (jtune.data.sources.rows) of "json" and "csv", that of `datasets` of the others.
READERS = {"json": "json", "jsonl": "json", "ndjson": "json", "csv": "csv", "tsv": "csv"}
READERS |= {"parquet": "parquet", "arrow": "arrow", "txt": "text"}
OURS = ("json", "csv")
NO_DATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "requirements.txt",
    "LICENSE.txt",
)
# Columns that are text for the model under these names.
USUAL = ("instruction", "input", "output", "prompt", "query", "question", "completion", "response", "answer", "text")
USUAL += (
    "content",
    "system",
    "history",
    "tools",
    "messages",
    "conversations",
    "chosen",
    "rejected",
    "label",
    "kto_tag",
)
PREFERENCES = ("chosen", "rejected", "label", "kto_tag")  # other stages learn from them
KEYS = {"instruction": "prompt", "input": "query", "output": "response", "conversations": "messages"}
KEYS |= {"question": "prompt", "completion": "response", "answer": "response"}


class Hub(NamedTuple):
    """How data sets are downloaded, and where they are kept."""

    cache_dir: str | None = None
    token: str | None = None


def load_table(entry: Entry, hub: Hub = Hub(), *, num_proc: int | None = None) -> datasets.Dataset:
    """All rows of one dataset, unchanged.

    Raises:
      DataError: nothing is there, the file is damaged (with file and line), or it has no rows.
    """
    try:
        if entry.source == "hub":
            table = datasets.load_dataset(entry.path, **_hub_options(entry, hub), num_proc=num_proc)
        else:
            files = data_files(entry)
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
    return table


def open_table(entry: Entry, hub: Hub = Hub()) -> tuple[datasets.IterableDataset, list[str], Mapping[str, Any]]:
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
                typed = kind == "json" and not any(map(is_array, files))  # as positions in checkpoints were written
                builder = reader(_literal(files, entry), _read_columns(names, entry), hub.cache_dir, typed=typed)
                table: Any = builder.as_streaming_dataset(split=entry.split)
            else:
                how: dict[str, Any] = {"split": entry.split, "cache_dir": hub.cache_dir}
                table = datasets.load_dataset(kind, data_files=_literal(files, entry), streaming=True, **how)
        first = next(iter(table), None)
    except Exception as error:
        raise unreadable([entry], error) from error
    if first is None:
        raise _no_rows(entry)
    return table, names or list(first), first


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
    return DataError(f"cannot read dataset {names}: {_deepest(error)}")


def _hub_options(entry: Entry, hub: Hub) -> dict[str, Any]:
    """The options of `datasets.load_dataset` for a set on the hub."""
    where = {"name": entry.subset, "data_dir": entry.folder, "revision": entry.revision, "token": hub.token}
    return where | {"split": entry.split, "cache_dir": hub.cache_dir}


def _read_columns(names: Sequence[str], entry: Entry) -> list[str]:
    """The columns that are read: those of the first rows, and those of use, which may first come later."""
    known = [*filter(None, astuple(entry.columns)), *USUAL]
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
        files = [str(f) for f in listed if f.is_file() and kind_of(f.name) in READERS and f.name not in NO_DATA]
        if not files:
            kinds = ", ".join(f".{kind}" for kind in READERS)
            raise DataError(f"dataset {entry.name!r}: the folder {path} holds no files of data ({kinds})")
        left = [f.name + "/" * f.is_dir() for f in listed if str(f) not in files]
        if left:
            _note(f"dataset {entry.name!r}: not read from {path}: {', '.join(left)}")
        return files
    if not os.path.isfile(path):
        siblings = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise DataError(f"dataset {entry.name!r}: no file {path}." + (f" There is {near[0]!r}." if near else ""))
    return [str(path)]


@cache
def _note(text: str, level: int = logging.INFO) -> None:
    """Say something once, though a run looks at its sets several times."""
    log.log(level, "%s", text)


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
        if READERS.get(kind_of(path)) != "json" or is_array(path):
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


def resolve_format(
    entry: Entry, found: Sequence[str], stage: StageRules = RULES["sft"], first: Mapping[str, Any] | None = None
) -> Entry:
    """For a dataset without an entry: tell its format from its columns, and from the names in its first row.

    `messages` is OpenAI's form, `conversations` ShareGPT's, or the one whose names the messages have; a table of `text`
    (or `content`) alone is for stage pt; else alpaca, with a question and an answer under one of their usual names.
    `system`, `tools`, `history`, `chosen`, `rejected` and `kto_tag` are what they are called, the last three in the
    stages that learn from them.
    """
    if entry.formatting is not None:
        return entry
    has = set(found)
    columns = Columns(system="system", tools="tools")
    if stage.rows == "pair" and {"chosen", "rejected"} <= has:
        entry = replace(entry, ranking=True)
        columns = replace(columns, chosen="chosen", rejected="rejected")
    if stage.rows == "feedback":
        columns = replace(columns, kto_tag=next((name for name in ("kto_tag", "label") if name in has), None))
    for name in ("messages", "conversations"):
        if name in has:
            openai = _has_roles((first or {}).get(name), default=name == "messages")
            tags, formatting = (OPENAI_TAGS, "openai") if openai else (Tags(), "sharegpt")
            return replace(entry, formatting=formatting, columns=replace(columns, messages=name), tags=tags)
    present = lambda *names: next((name for name in names if name in has), names[0])
    prompt = present("instruction", "prompt", "question", "query")
    response = present("output", "response", "completion", "answer")
    document = next((name for name in ("text", "content") if name in has), None)
    asked = "instruction" if stage.rows == "text" else prompt
    if document and asked not in has and not entry.ranking:
        columns = Columns(prompt=document, query=None, response=None)
        return replace(entry, formatting="alpaca", columns=columns)
    query = "query" if "input" not in has and "query" in has and prompt != "query" else "input"
    history = None if stage.rows == "text" else "history"  # whose first question would be the text
    columns = replace(columns, prompt=prompt, query=query, response=response, history=history)
    return replace(entry, formatting="alpaca", columns=columns)


def _has_roles(turns: Any, default: bool) -> bool:
    """Whether messages have OpenAI's names, `role` and `content`, rather than ShareGPT's."""
    turn = turns[0] if isinstance(turns := value_of(turns), list) and turns else None
    if not isinstance(turn, Mapping) or ("role" in turn) == ("from" in turn):
        return default
    return "role" in turn


def say_unused(entry: Entry, found: Sequence[str], stage: StageRules) -> None:
    """Name the columns that are not read, once; those that are usually text for the model with a warning."""
    unread = {"response", "system", "tools"} if stage.rows == "text" else set()
    own = {"prompt", "query", "response", "history"}
    unread |= {"messages"} if entry.formatting == "alpaca" else own
    unread |= {"response"} if entry.ranking else {"chosen", "rejected"}
    used = {getattr(entry.columns, field.name) for field in fields(Columns) if field.name not in unread}
    if stage.rows == "text" and (entry.formatting != "alpaca" or entry.columns.history in found):
        _note(f"dataset {entry.name!r}: stage pt learns the first message of a row only", logging.WARNING)
    unused = [name for name in found if name not in used]
    if not unused:
        return
    text = [name for name in unused if name in USUAL and name not in PREFERENCES]
    if text and stage.rows != "text":
        key = KEYS.get(text[0], text[0])
        _note(
            f"dataset {entry.name!r}: {', '.join(map(repr, text))} {'is' if len(text) == 1 else 'are'} usually text "
            f'for the model, but not used. To use it, say what it is in dataset_info.json: "columns": {{"{key}": '
            f'"{text[0]}"}}',
            logging.WARNING,
        )
    _note(f"dataset {entry.name!r}: columns not used: {', '.join(unused)}")


def _say_late(entry: Entry, table: datasets.Dataset) -> None:
    """Name the columns that no row had when their names were looked up (see `rows.LATE`)."""
    column = arrow_column(table, LATE)
    rows = np.flatnonzero(pc.call_function("is_valid", [column]).to_numpy())
    if len(rows):
        cells, first = column.take(pa.array(rows)).to_pylist(), int(rows[0])
        names = dict.fromkeys(name for cell in cells for name in json.loads(cell))
        say_late(entry.name, _places(entry, [first])[first], tuple(names))


def check_columns(entry: Entry, found: list[str], stage: StageRules) -> None:
    """Columns that the entry names, and those without which nothing can be read, must exist.

    Raises:
      DataError: with the columns that there are.
    """
    columns = entry.columns
    needed = set(entry.listed) - ({"response"} if stage.rows == "prompt" else set())
    if entry.formatting == "alpaca":
        needed.add("prompt" if columns.prompt else "query")
        needed |= {"response"} if stage.rows not in ("text", "prompt") and not entry.ranking else set()
    else:
        needed.add("messages")
    needed |= {"chosen", "rejected"} if entry.ranking else set()
    needed |= {"kto_tag"} if stage.rows == "feedback" else set()
    for key in sorted(needed):
        column = getattr(columns, key)
        if column is None or column not in found:
            if key == "response" and column is None:
                raise DataError(
                    f"dataset {entry.name!r} ({entry.path}) has texts ({columns.prompt}) without answers: they are for "
                    f"stage pt, not {stage.name}. Its columns are {', '.join(found)}"
                )
            near = difflib.get_close_matches(column or key, found, n=1, cutoff=0.5)
            suggestion = near[0] if near else "the_column"
            raise DataError(
                f"dataset {entry.name!r} ({entry.path}), row 1: no column {column or key!r} for the {key}. "
                f"Its columns are {', '.join(found)}. In dataset_info.json, say which one it is: "
                f'"columns": {{"{key}": "{suggestion}"}}'
            )


def check_stage(entry: Entry, stage: StageRules) -> None:
    """Raise a DataError for sets that are not for `stage`."""
    kind = "ranking" if entry.ranking else "kto_tag" if entry.columns.kto_tag else ""
    if kind and not (stage.rows == "text" and kind == "kto_tag"):
        wanted = "pair" if kind == "ranking" else "feedback"
        if stage.rows != wanted:
            stages = " and ".join(name for name, rules in RULES.items() if rules.rows == wanted)
            raise DataError(
                f"dataset {entry.name!r} holds preferences ({kind}): it is for stage {stages}, not {stage.name}"
            )
    elif stage.has_preferences:
        wanted = '"columns": {"kto_tag": "..."}' if stage.rows == "feedback" else '"ranking": true'
        raise DataError(
            f"dataset {entry.name!r} holds no preferences, and stage {stage.name} learns from them: {wanted}"
        )
    media = [key for key in ("images", "videos", "audios") if getattr(entry.columns, key)]
    if media:
        raise DataError(f"dataset {entry.name!r} has {', '.join(media)}; jtune trains on text")


def _reader(files: list[str], entry: Entry) -> str:
    kinds = {kind_of(f) for f in files}
    unknown = sorted(kinds - set(READERS))
    if unknown:
        example = next(f for f in files if kind_of(f) == unknown[0])
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
