"""`resume.json`: what the host knows of a run at a checkpoint, under a digest of its own.

The digest is that of the file's bytes, and the last entry of the file: no changed bit is read as something else.
Checkpoints of older code have none. Theirs must hold exactly the entries that were written then, of the right types.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import xxhash

from jtune.train.loop import Progress
from jtune.train.timing import KINDS

_DIGEST = re.compile(rb',\n "digest": "([0-9a-f]{32})"\n\}\n\Z')
# What code without the digest wrote: all of it, but for the last, which is of streams.
_OLD = ("step", "digests", "identity", "progress", "seconds", "stream")
_OLD_PROGRESS = {
    *("step", "total_loss", "unlogged_loss", "unlogged_steps", "tokens", "best_metric", "best_step"),
    *("evaluations_without_gain", "bad_steps", "skipped_steps", "log_history"),
}


def encode(content: Mapping[str, Any]) -> bytes:
    """The bytes of a `resume.json` with this content, which must not be empty."""
    body = json.dumps(content, indent=1).encode()
    return body.removesuffix(b"\n}") + f',\n "digest": "{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'.encode()


def decode(raw: bytes) -> dict[str, Any]:
    """The content of a `resume.json`, without its digest.

    Raises:
      ValueError: it is damaged; the message says how.
    """
    found = _DIGEST.search(raw)
    body = raw if found is None else raw[: found.start()] + b"\n}"
    if found is not None and xxhash.xxh3_128_hexdigest(body).encode() != found[1]:
        raise ValueError("its content is not what was written")
    try:
        content = json.loads(body)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    _check(content, old=found is None)
    return content


def _check(content: dict[str, Any], *, old: bool) -> None:
    if old:
        unknown, missing = content.keys() - set(_OLD), set(_OLD[:4]) - content.keys()
        missing |= _OLD_PROGRESS - set(_mapping(content, "progress"))
        if unknown or missing:
            raise ValueError(f"unknown entries {sorted(unknown)}, missing entries {sorted(missing)}")
    for name in ("digests", "identity", "progress", "seconds", "stream"):
        _mapping(content, name)
    step = content.get("step")
    if type(step) is not int or step < 0:
        raise ValueError(f"step is {_short(step)}, expected a number of updates")
    if not all(isinstance(value, str) for value in content.get("digests", {}).values()):
        raise ValueError("a digest of an array is not text")
    for kind, value in content.get("seconds", {}).items():
        if kind not in KINDS or type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f"seconds: {_short(kind)} is {_short(value)}")
    if "progress" in content and Progress.from_dict(content["progress"]).step != step:
        raise ValueError(f"progress is of update {content['progress']['step']}, the checkpoint of update {step}")


def _mapping(content: dict[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name, {})
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {_short(value)}, expected an object")
    return value


def _short(value: Any) -> str:
    return repr(value)[:60]
