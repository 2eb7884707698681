"""The columns of aligned rows, and how single fields are read."""

import datetime
import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import datasets

from jtune.data.formats.messages import FaultyRow, Message

TEXT = datasets.Value("string")
MESSAGE = {"role": TEXT, "content": TEXT, "original": TEXT, "learned": datasets.Value("bool"), "unused": TEXT}
ALIGNED = datasets.Features(
    {
        "messages": datasets.List(MESSAGE),
        "system": TEXT,
        "tools": TEXT,  # JSON: a list of functions
        "rejected": MESSAGE,  # in sets of pairs, the answer that is worse than the last one
        "margin": datasets.Value("float32"),  # in sets of pairs that have one, by how much the last answer is better
        "desirable": datasets.Value("bool"),  # in sets of feedback, whether the last answer is
        "fault": TEXT,  # why the row is left out; "" if it is not
        "dataset": datasets.Value("int32"),  # index of the entry
        "row": datasets.Value("int64"),  # in the file, from 0
    }
)

TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
NOT_LEARNED = "the answer that is preferred, or not, is one that is not to be learned (weight, train, loss)"
MISSING = "nothing in column "  # begins the fault of a row that lacks a column, or has null in it; its name follows


def add_unused(message: Message, what: str) -> None:
    message["unused"] = ", ".join(filter(None, [message.get("unused"), what]))


def text_message(role: str, content: Any, what: str | None) -> Message:
    if content is None:
        raise FaultyRow(f"{what} without content")
    return {"role": role, "content": text_of(content, what)}


def number_of(value: Any, what: str | None) -> float:
    """A number, also as text; nothing is 0.

    >>> number_of("1.5", "margin"), number_of(None, "margin")
    (1.5, 0.0)

    Raises:
      FaultyRow: it is no finite number.
    """
    try:
        number = float(value or 0)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise FaultyRow(f"{what} is not a number")
    return number


def text_of(value: Any, what: str | None) -> str:
    """A text as it is, a number, a date or a truth value as it is written.

    >>> text_of(2, "x"), text_of(True, "x"), text_of(datetime.date(2031, 5, 9), "x")
    ('2', 'true', '2031-05-09')
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | Decimal | datetime.date | datetime.time):
        return str(value)
    raise FaultyRow(f"{what} is not text but {type(value).__name__}")


def parsed_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def tools_of(value: Any) -> str:
    if isinstance(value, list | Mapping):
        return json.dumps(value, ensure_ascii=False) if value else ""
    return text_of(value, "tools")


def without_padding(value: Any) -> Any:
    """Without the nulls that Arrow adds so that all rows have the same keys."""
    if isinstance(value, Mapping):
        return {key: without_padding(item) for key, item in value.items() if item is not None}
    return [without_padding(item) for item in value] if isinstance(value, list) else value
