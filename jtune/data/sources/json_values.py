"""The values of a JSON file, one a row, each with its place and its text.

A file is JSON lines, one array, or, with the extension .json, whole objects: one a row, however many lines it takes, or
one that holds the rows, as a list under `WRAPPERS` or as lists of texts, one a column.
"""

import codecs
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal

from jtune.data.sources.files import SHOWN, check_utf8, decoded, kind_of, open_bytes
from jtune.errors import DataError

log = logging.getLogger("jtune")

CHUNK = 1 << 20  # characters of an array that are read at once
WRAPPERS = ("data", "rows", "train", "examples", "samples", "records", "items", "instances")
NEXT = re.compile(r"[^\s,]")  # begins an object
EXPECTED = ". Expected an array of rows, [{...}, ...], or a row on each line"

Layout = Literal["lines", "array", "object"]


def layout(path: str) -> Layout:
    """How the rows of a JSON file lie in it."""
    with open_bytes(path) as file:
        lines = (line for line in file if line.strip())
        first = next(lines, b"").strip()
        if first.startswith(b"["):
            return "array"
        if kind_of(path) != "json" or not first.startswith(b"{"):
            return "lines"
        try:
            value = _loads_line(first)
        except (ValueError, RecursionError):
            return "object"
        return "object" if _inside(value) is not None and next(lines, None) is None else "lines"


def json_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its place.

    Raises:
      DataError: at the first that is no row, with file and line.
    """
    for place, row, text in json_values(path):
        check_row(place, row, text)
        yield place, row


def check_row(place: str, row: Any, text: str) -> None:
    """Raise a DataError if a value is not an object."""
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object, one row, found {kind(row)}: {text[:SHOWN]}")


def json_values(path: str) -> Iterator[tuple[str, Any, str]]:
    """Each value with its place and its text.

    Raises:
      DataError: something is not JSON, with file and line.
    """
    how = layout(path)
    if how == "array":
        yield from _array_values(path)
        return
    if how == "object":
        yield from _object_values(path)
        return
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            text = decoded(line, path, number).strip()
            try:
                value = _loads_line(text)
            except (RecursionError, ValueError) as error:
                raise DataError(f"{path}:{number}: not JSON: {_said(error)}: {text[:SHOWN]}") from error
            yield f"{path}:{number}", value, text


def _loads_line(text: str | bytes) -> Any:
    """The value of a line, also where a comma follows it, as between the elements of an array."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.doc[error.pos :] == ",":
            return json.loads(error.doc[: error.pos])
        raise


# ---------------------------------------------------------------------- whole objects


def _object_values(path: str) -> Iterator[tuple[str, Any, str]]:
    """The objects of a file that is read whole; where there is one that holds the rows, these."""
    with open_bytes(path) as file:
        try:
            text = file.read().decode()
        except UnicodeDecodeError as error:
            check_utf8(path)
            raise DataError(f"{path}: not UTF-8: {error}") from error
    decoder, found, at = json.JSONDecoder(), [], 0
    while begins := NEXT.search(text, at):
        begin = begins.start()
        try:
            value, at = decoder.raw_decode(text, begin)
        except (RecursionError, ValueError) as error:
            where = error.pos if isinstance(error, json.JSONDecodeError) else begin
            line = text[text.rfind("\n", 0, where) + 1 :].split("\n", 1)[0].strip()[:SHOWN]
            number = text.count("\n", 0, where) + 1
            raise DataError(f"{path}:{number}: not JSON: {_said(error)}: {line}{'' if found else EXPECTED}") from error
        found.append((value, text[begin:at]))
    inside = _inside(found[0][0]) if len(found) == 1 else None
    if inside is not None:
        say_inside(os.path.basename(path), inside)
        literal = json.loads(found[0][1], parse_int=str, parse_float=str, parse_constant=str)
        pairs = zip(_rows_of(found[0][0], inside), _rows_of(literal, inside))
        found = [(row, _written(row, literals)) for row, literals in pairs]
    for number, (value, written) in enumerate(found, start=1):
        yield f"{path} row {number}", value, written


def _inside(value: Any) -> str | None:
    """Where the rows are in an object that holds them: the key of their list, "" for columns; None: it is a row.

    >>> _inside({"version": 1, "data": [{"text": "a"}]}), _inside({"prompt": ["a"], "answer": ["b"]})
    ('data', '')
    """
    if not isinstance(value, dict):
        return None
    for key in WRAPPERS:
        rows = value.get(key)
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            others = [name for name, other in value.items() if name != key and isinstance(other, list)]
            return None if others else key
    columns = list(value.values())
    texts = [column for column in columns if isinstance(column, list) and all(isinstance(x, str) for x in column)]
    alike = all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
    return "" if alike and len(texts) > 1 and columns[0] else None


def _rows_of(value: Mapping[str, Any], inside: str) -> list[dict[str, Any]]:
    return value[inside] if inside else [dict(zip(value, cells)) for cells in zip(*value.values())]


def _written(row: Any, literals: Any) -> str:
    """A row as JSON, its numbers as they were written."""
    if not isinstance(row, dict):
        return json.dumps(row, ensure_ascii=False)
    is_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    cells = (literals[name] if is_number(x) else json.dumps(x, ensure_ascii=False) for name, x in row.items())
    return "{" + ", ".join(f"{json.dumps(name)}: {cell}" for name, cell in zip(row, cells)) + "}"


@cache
def say_inside(name: str, inside: str) -> None:
    """Say, once, that one object holds the rows of a file, and where."""
    log.info(
        "%s is one object: its rows are %s", name, f"the list {inside!r}" if inside else "its lists, a column each"
    )


# ---------------------------------------------------------------------- arrays


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
