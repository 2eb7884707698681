"""From the names and values that were given to those of jtune: the table is `renamed.py`."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jtune.config.arguments import FIELDS
from jtune.config.foreign import is_inert
from jtune.config.kinds import Mismatch, coerce
from jtune.config.parse import MAX_BYTES, Fault, Given
from jtune.config.renamed import IMPLIED, NESTED, RENAMED, SPELLINGS


def translate(given: Mapping[str, Given]) -> tuple[dict[str, Given], list[Fault], list[str]]:
    """`(arguments under jtune's names, faults, notes)`; each keeps its origin.

    An argument that is given under two names must have the same value under both.
    """
    flat = dict(_flat(given))
    ours = {name: Given(_spelling(name, value), where) for name, (value, where) in flat.items() if name not in RENAMED}
    notes = [f"{ours[n].origin}: {n}: {_words(old.value)} is read as {_words(ours[n].value)}" for n, old in flat.items()
             if n in ours and ours[n].value is not old.value]  # fmt: skip
    faults: list[Fault] = []
    source: dict[str, str] = {}  # argument -> the old name that it was given under
    old_names = sorted((name for name in flat if name in RENAMED), key=lambda name: RENAMED[name].times)
    for name in old_names:
        value, where = flat[name]
        renamed = RENAMED[name]
        new = None if value is None else _spelling(renamed.name, renamed.change(value))
        if new is None:
            continue
        before = ours.get(renamed.name)
        if renamed.times:
            if before is not None and isinstance(new, int) and isinstance(before.value, int):
                new *= before.value
            before = None
        elif before is not None and not _same(renamed.name, before.value, new):
            other = source.get(renamed.name, renamed.name)
            given_as = "" if other == renamed.name else f" as {other}"
            message = f"{name} is another name of {renamed.name}, which has another value{given_as}: leave one out"
            faults.append(Fault(where, message, name))
            continue
        if before is not None:
            continue
        ours[renamed.name] = Given(new, where)
        source[renamed.name] = name
        if not _asks_nothing(renamed.name, new):
            notes.append(f"{where}: {name} is read as {renamed.name}{_value(value, new)}{_why(name)}")
    return ours, faults, notes


def _flat(given: Mapping[str, Given]) -> Iterator[tuple[str, Given]]:
    """The arguments, with the keys of the mappings in `NESTED` as arguments of their own."""
    for name, (value, where) in given.items():
        if name == "deepspeed":
            yield from ((f"{name}.{key}", Given(inner, where)) for key, inner in _deepspeed(_content(value) or {}))
        content = _content(value) if name in NESTED else None
        if isinstance(value, str) and value in IMPLIED.get(name, {}):
            yield from ((other, Given(implied, where)) for other, implied in IMPLIED[name][value].items())
        elif content is None:
            yield name, Given(value, where)
        else:
            yield from _flat({f"{name}.{key}": Given(inner, where) for key, inner in content.items()})


def _content(value: Any) -> dict[str, Any] | None:
    """A mapping, as it is, as JSON, or in a JSON file of a usual size."""
    try:
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            path = Path(value)
            value = path.read_text(encoding="utf-8") if path.is_file() and path.stat().st_size <= MAX_BYTES else None
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, OSError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _deepspeed(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The part of a DeepSpeed configuration that changes what is computed; the Trainer checks its other numbers."""
    chosen = {key: content[key].get("type") for key in ("optimizer", "scheduler") if isinstance(content.get(key), dict)}
    if chosen.get("optimizer") in ("Adam", "AdamW"):  # both decay weights as AdamW
        del chosen["optimizer"]
    yield from chosen.items()
    if isinstance(content.get("tensor_parallel"), dict):
        yield "tensor_parallel", content["tensor_parallel"].get("autotp_size")
    if "sequence_parallel_size" in content:
        yield "sequence_parallel", content["sequence_parallel_size"]


def _spelling(name: str, value: Any) -> Any:
    known = SPELLINGS.get(name, {})
    return value if isinstance(value, dict | list) else known.get(value, value)


def _same(name: str, first: Any, second: Any) -> bool:
    try:
        return first == second or coerce(FIELDS[name].type, first) == coerce(FIELDS[name].type, second)
    except (KeyError, Mismatch):  # not ours, or not of its type, which the check will say
        return False


def _asks_nothing(name: str, value: Any) -> bool:
    if name not in FIELDS:
        return is_inert(name, value)
    with suppress(Mismatch):  # not of its type, which the check will say
        return coerce(FIELDS[name].type, value) == FIELDS[name].default
    return False


def _value(old: Any, new: Any) -> str:
    """The new value, if it is another one. (No change is made to a secret.)"""
    return "" if new is old else f": {_words(new)}"


def _why(name: str) -> str:
    return f" ({RENAMED[name].why})" if RENAMED[name].why else ""


def _words(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
