"""Types of arguments: read a value as the type of its field, and describe that type to a person."""

import json
import math
import types
from typing import Any, Literal, get_args, get_origin

BOOLEANS: dict[str, bool] = dict.fromkeys(("true", "yes", "on", "1", "t", "y"), True)
BOOLEANS |= dict.fromkeys(("false", "no", "off", "0", "f", "n"), False)


class Mismatch(Exception):
    """A value has the wrong type; the text says what was expected."""


def options(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, without None.

    >>> options(str | bool | None)
    (<class 'str'>, <class 'bool'>)
    """
    alternatives = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return tuple(option for option in alternatives if option is not types.NoneType)


def takes_none(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) and types.NoneType in get_args(kind)


def takes_bool(kind: Any) -> bool:
    return bool in options(kind)


def takes_text(kind: Any) -> bool:
    return str in options(kind)


def takes_list(kind: Any) -> bool:
    return get_origin(kind) is tuple


def describe_kind(kind: Any) -> str:
    """The kind in words: "a whole number", "one of no, steps, epoch", ..."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if takes_list(kind):
        return f"a list of {'numbers' if get_args(kind)[0] is float else 'names'}"
    shown = [option for option in options(kind) if option is not int or float not in options(kind)]
    return " or ".join(words.get(option, "a mapping") for option in shown)


def coerce(kind: Any, value: Any) -> Any:
    """`value` as `kind`: numbers out of text, tuples out of lists or `a,b`, `no` and `all` out of YAML's booleans.

    Raises:
      Mismatch: says what was expected. Nothing is guessed: 2.5 is not a whole number, true is not a number.

    >>> coerce(int, 2.0), coerce(float, "1e-5"), coerce(tuple[str, ...], "a, b"), coerce(Literal["no", "steps"], False)
    (2, 1e-05, ('a', 'b'), 'no')
    """
    if value is None:
        if takes_none(kind):
            return None
        raise Mismatch(f"{describe_kind(kind)}; for the default, leave it out")
    if get_origin(kind) is Literal:
        return _choice(kind, value)
    if takes_list(kind):
        return _list(kind, value)
    for option in sorted(options(kind), key=lambda o: o is not bool):  # a boolean if it is one, else text
        try:
            return _READERS.get(option, _mapping)(value)
        except (ValueError, TypeError, OverflowError):
            continue
    if takes_text(kind) and isinstance(value, bool | float):
        raise Mismatch("text in quotes")
    raise Mismatch(describe_kind(kind))


def _choice(kind: Any, value: Any) -> str:
    choices = get_args(kind)
    if isinstance(value, bool):  # YAML reads `no` as false
        value = "all" if value and "all" in choices else "no" if not value and "no" in choices else value
    if value not in choices:
        raise Mismatch(describe_kind(kind))
    return value


def _list(kind: Any, value: Any) -> tuple:
    items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    read = _READERS[get_args(kind)[0]]
    try:
        return tuple(read(item) for item in (items if isinstance(items, list) else [items]))
    except (ValueError, TypeError):
        raise Mismatch(describe_kind(kind)) from None


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word not in BOOLEANS:
        raise ValueError
    return BOOLEANS[word]


def _int(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool | float):
        raise TypeError
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _str(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise TypeError  # of 1.10 and true, YAML does not keep how they were written


def _mapping(value: Any) -> dict[str, Any]:
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise TypeError
    return value


_READERS = {bool: _bool, int: _int, float: _float, str: _str}
