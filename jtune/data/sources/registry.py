"""dataset_info.json: what a name in `dataset:` stands for, where it lies and which columns mean what.

LLaMA-Factory's file, with three differences:
  - where `columns` or `tags` are given, keys that are not listed keep their defaults (there they become nothing, so
    that `columns: {prompt: q}` loses the answers). Only of `prompt` and `query`, one listed means no other, so that
    an entry that works there means the same here;
  - a file, a folder, an address or a hub id can be named in `dataset:` without an entry;
  - in `formatting: openai`, the defaults of columns and tags are OpenAI's (messages, role, content, user, tool ...).
"""

import difflib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jtune.data.sources.files import UTF16
from jtune.errors import DataError

log = logging.getLogger("jtune")

INFO = "dataset_info.json"
FORMATTINGS = ("alpaca", "sharegpt", "openai")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Columns:
    """Which column holds what; None: no column does."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    messages: str | None = "conversations"
    system: str | None = None
    tools: str | None = None
    images: str | None = None
    videos: str | None = None
    audios: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None
    margin: str | None = None  # of pairs: by how much the chosen answer is better (arXiv:2307.09288)


@dataclass(frozen=True)
class Tags:
    """What roles and contents are called inside a conversation."""

    role_tag: str | None = "from"
    content_tag: str | None = "value"
    user_tag: str | None = "human"
    assistant_tag: str | None = "gpt"
    observation_tag: str | None = "observation"
    function_tag: str | None = "function_call"
    system_tag: str | None = "system"


OPENAI_TAGS = Tags("role", "content", "user", "assistant", "tool", "function", "system")


@dataclass(frozen=True)
class Entry:
    """One dataset. `source` is "file" (a path), "hub" (a repository) or "url" (what fsspec reads)."""

    name: str
    source: str
    path: str
    formatting: str | None = "alpaca"  # None: to be told from the columns (a dataset without an entry)
    ranking: bool = False
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    revision: str | None = None
    num_samples: int | None = None
    file_sha1: str | None = None
    columns: Columns = field(default_factory=Columns)
    listed: tuple[str, ...] = ()  # keys of `columns` that the entry names: these columns must exist
    tags: Tags = field(default_factory=Tags)


def find_datasets(
    names: Sequence[str], dataset_dir: str | Mapping[str, Any], *, allow_outside: bool = False
) -> list[Entry]:
    """Look up each name: in dataset_info.json, else as a file or folder, else as a hub id.

    Args:
      dataset_dir: a folder; "ONLINE" (every name is a hub id); "REMOTE:repo" (that repository's dataset_info.json); or
        the content of a dataset_info.json.
      allow_outside: what an entry names may lie outside the folder, and links in it may lead out.

    Raises:
      DataError: a name means nothing, its entry is faulty, or what it names lies outside.
    """
    if not names:
        return []
    if dataset_dir == "ONLINE":
        return [Entry(name, "hub", _hub(name, f"dataset {name!r}", None, allow_outside)) for name in names]
    info, where, folder = _read_info(dataset_dir)
    return [_find(name, info, where, folder, allow_outside) for name in names]


def entry_of(
    name: str,
    info: Mapping[str, Any],
    *,
    where: str = INFO,
    folder: Path = Path("data"),
    allow_outside: bool = False,
) -> Entry:
    """The entry `name` of a dataset_info.json as an `Entry`.

    >>> entry_of("a", {"a": {"file_name": "a.json", "columns": {"prompt": "q", "response": "a"}}}).columns.prompt
    'q'
    """
    about = f"{where}, entry {name!r}"
    row: Any = info[name]
    if not isinstance(row, dict):
        raise DataError(f"{about}: expected an object with file_name or hf_hub_url, found {json.dumps(row)[:80]}")
    _check_entry_keys(row, about)
    row = {key: value for key, value in row.items() if value is not None or key in _SOURCE_KEYS}
    _check_types(row, about)
    source, path = _source(row, about, folder, allow_outside)
    formatting = row.get("formatting", "alpaca")
    if formatting not in FORMATTINGS:
        raise DataError(f"{about}: formatting {formatting!r} is not one of {', '.join(FORMATTINGS)}")
    if row.get("num_samples", 0) < 0:
        raise DataError(f"{about}: num_samples is {row['num_samples']}, expected a number of rows")
    unused = [key for key in _OF_A_HUB if key in row] if source != "hub" else []
    if unused:
        log.info("%s: %s: only read with hf_hub_url", about, ", ".join(unused))
    openai = formatting == "openai"
    given = row.get("columns", {})
    return Entry(
        name=name,
        source=source,
        path=path,
        formatting=formatting,
        ranking=row.get("ranking", False),
        subset=row.get("subset"),
        split=row.get("split", "train"),
        folder=row.get("folder"),
        revision=row.get("revision"),
        num_samples=row.get("num_samples") or None,  # as there, 0 means all
        file_sha1=row.get("file_sha1"),
        columns=_columns(given, about, Columns(messages="messages") if openai else Columns()),
        listed=tuple(key for key, column in given.items() if column),
        tags=_tags(row.get("tags", {}), about, OPENAI_TAGS if openai else Tags()),
    )


_SOURCE_KEYS = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_KEYS = (
    *_SOURCE_KEYS,
    "formatting",
    "ranking",
    "subset",
    "split",
    "folder",
    "revision",
    "num_samples",
    "columns",
    "tags",
    "file_sha1",
)
_OF_A_HUB = ("subset", "folder", "revision")
_TYPES: dict[str, tuple[type, str]] = {
    "ranking": (bool, "true or false"),
    "num_samples": (int, "a number"),
    "columns": (Mapping, "an object"),
    "tags": (Mapping, "an object"),
}


def _read_info(dataset_dir: str | Mapping[str, Any]) -> tuple[Mapping[str, Any], str, Path]:
    """The content of dataset_info.json (empty where there is none), what to call it, and the folder of its files."""
    if isinstance(dataset_dir, Mapping):
        return dataset_dir, INFO, Path()
    if dataset_dir.startswith("REMOTE:"):
        from huggingface_hub import hf_hub_download

        repository = dataset_dir.removeprefix("REMOTE:")
        try:
            path = Path(hf_hub_download(repo_id=repository, filename=INFO, repo_type="dataset"))
        except Exception as error:
            raise DataError(f"dataset_dir: cannot get {INFO} of {repository!r} from the hub: {error}") from error
        folder = path.parent
    else:
        folder = Path(dataset_dir)
        path = folder / INFO
    if not path.is_file():
        return {}, str(path), folder
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        utf16 = path.read_bytes()[:2] in UTF16
        hint = f": it is UTF-16: iconv -f utf-16 -t utf-8 {path}" if utf16 else f" at byte {error.start}"
        raise DataError(f"{path}: not UTF-8{hint}") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path}: not JSON: {str(error).split(':')[0]}") from error
    if not isinstance(info, Mapping):
        raise DataError(f'{path}: expected an object, as in {{"my_data": {{"file_name": "my_data.json"}}}}')
    return info, str(path), folder


def _find(name: str, info: Mapping[str, Any], where: str, folder: Path, allow_outside: bool) -> Entry:
    if name in info:
        return entry_of(name, info, where=where, folder=folder, allow_outside=allow_outside)
    for path in (folder / name, Path(name)):
        if os.path.exists(path):  # False where the name is none for the system
            # A path that leads out by its words is the user's own; where a link inside leads, its maker chose.
            if path == folder / name and not _leads_out(name) and not allow_outside:
                _check_links(path, folder, f"dataset {name!r}")
            return Entry(name, "file", str(path), formatting=None)
    if _is_remote(name):
        return Entry(name, "url", name, formatting=None)
    near = difflib.get_close_matches(name, info, n=3)
    if HUB_ID.fullmatch(name) and not near and not Path(name).suffix:
        return Entry(name, "hub", name, formatting=None)
    beside = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    near = near or difflib.get_close_matches(name, beside, n=3, cutoff=0.8)
    if near:
        hint = f"Did you mean {' or '.join(near)}?"
    elif info:
        hint = f"It holds {', '.join(list(info)[:12])}{' ...' if len(info) > 12 else ''}."
    else:
        hint = f"There is no {INFO}: set dataset_dir to the folder that has one, or name a data file."
    raise DataError(f"dataset {name!r} is neither in {where} nor a file or folder. {hint}")


def _source(row: Mapping[str, Any], about: str, folder: Path, allow_outside: bool) -> tuple[str, str]:
    """Where the rows are; a hub comes before a script, a URL, a file, as in LLaMA-Factory."""
    for key in (*_SOURCE_KEYS, "folder"):
        if key in row and not (isinstance(row[key], str) and row[key]) and not (key == "folder" and row[key] is None):
            raise DataError(f"{about}: {key} must be text, found {json.dumps(row[key])[:80]}")
    if "hf_hub_url" in row:
        return "hub", _hub(row["hf_hub_url"], f"{about}: hf_hub_url", row.get("folder"), allow_outside)
    for key in ("ms_hub_url", "om_hub_url"):
        if key in row:
            raise DataError(f"{about}: {key} is not supported: give hf_hub_url, or download it and give file_name")
    if "script_url" in row:
        raise DataError(
            f"{about}: script_url is refused: datasets runs no loading scripts any more (they are code from others). "
            "Convert the data to jsonl or parquet once, and give file_name"
        )
    if "cloud_file_name" in row:
        given = row["cloud_file_name"]
        if not allow_outside and not _is_remote(given):
            raise DataError(f"{about}: cloud_file_name {given!r} is no address of another machine. {_WAY_OUT}")
        return "url", given
    if "file_name" not in row:
        raise DataError(f"{about}: no file_name and no hf_hub_url: one of them says where the rows are")
    given = row["file_name"]
    if not allow_outside:
        if _leads_out(given):
            raise DataError(f"{about}: file_name {given!r} lies outside {folder}. {_WAY_OUT}")
        _check_links(folder / given, folder, f"{about}: file_name {given!r}")
    return "file", str(folder / given)


_WAY_OUT = (
    "Move the file into dataset_dir and give file_name, name its path in `dataset:`, or set "
    "allow_outside_dataset_dir: true"
)
# What fsspec reads from other machines; and what it may put before such an address, with "::".
_REMOTE = (
    *("http", "https", "ftp", "sftp", "ssh", "hdfs", "webhdfs", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"),
    *("oci", "oss", "r2", "tos", "hf", "github", "dropbox", "gdrive"),
)
_WRAPPERS = ("zip", "tar", "libarchive", "simplecache", "filecache", "blockcache", "cached")


def _is_remote(url: str) -> bool:
    """Whether fsspec reads no file of this machine's for `url`.

    >>> _is_remote("s3://bucket/rows.jsonl"), _is_remote("zip://rows.jsonl::https://host/rows.zip")
    (True, True)
    >>> _is_remote("file:///rows.jsonl"), _is_remote("simplecache::/rows.jsonl"), _is_remote("rows.jsonl")
    (False, False, False)
    """
    *wrappers, last = url.split("::")
    scheme, separator, _ = last.partition("://")
    wrapped = all(wrapper.partition("://")[0].lower() in _WRAPPERS for wrapper in wrappers)
    return bool(separator) and scheme.lower() in _REMOTE and wrapped


def _leads_out(given: str) -> bool:
    """Whether a path leads out of its folder by its words, or stands for other files than the one of its name.

    >>> [_leads_out(path) for path in ("a/b.jsonl", "a/../b.jsonl", "../b.jsonl", "/b.jsonl", "zip://a::/b", "~/b")]
    [False, False, True, True, True, True]
    """
    inner = os.path.normpath(given).split(os.sep)[0] in ("..", "~")
    return os.path.isabs(given) or inner or "::" in given or "://" in given


def _check_links(path: Path, folder: Path, about: str) -> None:
    """Refuse `path`, in `folder`, if links lead it, or a file in it, to somewhere else.

    The hub's cache keeps the files of a snapshot beside it, in `blobs`: they count as inside.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots" and (root.parents[1] / "blobs").is_dir():
        root = root.parents[1]
    for file in (path, *(sorted(path.iterdir()) if os.path.isdir(path) else ())):
        try:
            target = file.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a name that is none for the system
            raise DataError(f"{about}: {file} cannot be followed: {error}") from error
        if not target.is_relative_to(root):
            raise DataError(f"{about}: the link {file} leads to {target}, outside {folder}. {_WAY_OUT}")


def _hub(given: str, about: str, within: str | None, allow_outside: bool) -> str:
    """The hub id `given`, if `datasets` can only take it for one."""
    if allow_outside:
        return given
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    name = given.removeprefix("hf://datasets/")
    if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name) or name.endswith(".py"):
        raise DataError(f"{about} {given!r} is no id of the hub, as in owner/name. {_WAY_OUT}")
    if name in _PACKAGED_DATASETS_MODULES:
        raise DataError(f"{about} {given!r} is a reader of local files, no id of the hub. {_WAY_OUT}")
    if name == given and Path(name).exists():
        raise DataError(f"{about} {given!r} is also a local path, which would be read instead of the hub. {_WAY_OUT}")
    if within is not None and _leads_out(within):
        raise DataError(f"{about} {given!r}: folder {within!r} lies outside that repository. {_WAY_OUT}")
    return given


def _check_keys(given: Mapping[str, Any], known: Sequence[str], about: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise DataError(f"{about}: unknown key {key!r}; {hint}")


def _check_entry_keys(row: Mapping[str, Any], about: str) -> None:
    """Refuse a key that is nearly one that is read; name the others, which LLaMA-Factory does not read either."""
    unknown = [key for key in row if key not in _KEYS]
    _check_keys({key: None for key in unknown if difflib.get_close_matches(key, _KEYS, cutoff=0.8)}, _KEYS, about)
    told = [key for key in unknown if not key.startswith("_")]
    if told:
        log.info("%s: not read: %s", about, ", ".join(told))


def _check_types(row: Mapping[str, Any], about: str) -> None:
    for key, value in row.items():
        if key in (*_SOURCE_KEYS, "folder") or key not in _KEYS:
            continue  # `_source` looks at them
        wanted, words = _TYPES.get(key, (str, "text"))
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise DataError(f"{about}: {key} is {json.dumps(value)[:80]}, expected {words}")
        for name, item in value.items() if isinstance(value, Mapping) else ():
            if item is not None and not isinstance(item, str):
                raise DataError(f"{about}, {key}: {name} is {json.dumps(item)[:80]}, expected text, or null")


def _columns(given: Mapping[str, str | None], about: str, default: Columns) -> Columns:
    keys = [f.name for f in fields(Columns)]
    _check_keys(given, keys, f"{about}, columns")
    columns = {key: getattr(default, key) for key in keys} | dict(given)
    if given:
        if "prompt" in given or "query" in given:  # an entry that names one of the two means no other
            columns |= {"prompt": given.get("prompt"), "query": given.get("query")}
        claimed = set(filter(None, given.values()))
        for key in keys:  # a default never takes a column that the entry uses for something else
            if key not in given and columns[key] in claimed:
                columns[key] = None
    return Columns(**columns)


def _tags(given: Mapping[str, str | None], about: str, default: Tags) -> Tags:
    keys = [f.name for f in fields(Tags)]
    _check_keys(given, keys, f"{about}, tags")
    return Tags(**({key: getattr(default, key) for key in keys} | dict(given)))
