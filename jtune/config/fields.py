"""A field of the arguments: its default, its meaning, and the range of its values."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Range(NamedTuple):
    """A condition on a value that is not null, and its words for an error message."""

    text: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Range:
    return Range(f"at least {low}", lambda x: x >= low)


POSITIVE = Range("above 0", lambda x: x > 0)
SHARE = Range("between 0 and 1", lambda x: 0 <= x <= 1)
UP_TO_HALF = Range("between 0 and 0.5", lambda x: 0 <= x <= 0.5)
BELOW_ONE = Range("at least 0 and below 1", lambda x: 0 <= x < 1)
SEED = Range("a whole number from 0 to 4294967295", lambda x: 0 <= x < 2**32)
STEPS = Range("a whole number of steps, or below 1 a share of the run", lambda x: x >= 0 and (x < 1 or x == int(x)))
HELD_OUT = Range("a share below 1, or a whole number of rows", lambda x: 0 <= x < 1 or x == int(x) >= 1)


def is_range(text: str) -> bool:
    """
    >>> is_range("10-12"), is_range("12-10"), is_range("10"), is_range("0-3")
    (True, False, False, False)
    """
    match = re.fullmatch(r"([1-9]\d*)-([1-9]\d*)", text)
    return match is not None and int(match[1]) <= int(match[2])


UPDATES = Range("first-last, as in 10-12", is_range)
ROPES = Range("linear, dynamic, yarn or llama3", lambda x: x in ("linear", "dynamic", "yarn", "llama3"))
BITS = Range("4 or 8", lambda x: x in (4, 8))
SIZE_OR_REST = Range("at least 1, or -1 for the rest", lambda x: x == -1 or x >= 1)


def arg(default: Any, doc: str, within: Range | None = None, *, secret: bool = False) -> Any:
    """A dataclass field with its meaning. The value of a `secret` field is never printed."""
    metadata = {"doc": doc, "within": within, "secret": secret}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)
