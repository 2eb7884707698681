"""Where the time of a run goes: seconds by kind, kept over interruptions, and the rates that follow from it."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# startup: data, weights, all that comes before the loop. data: waiting for a batch. step: updates. lost: work of an
# interrupted run since its last checkpoint, which is done again.
KINDS = ("startup", "compile", "data", "step", "checkpoint", "evaluation", "lost")


class Timing:
    """Seconds of each kind since it was made. Time that is booked as nothing else counts as "step"."""

    def __init__(self):
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._began = time.monotonic()
        self._earlier = 0.0

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Book the time of the block, less what the block books itself."""
        begin, booked = time.monotonic(), self._booked()
        try:
            yield
        finally:
            inside = self._booked() - booked
            self._seconds[kind] += time.monotonic() - begin - inside

    def rest(self, kind: str) -> None:
        """Book all time that has not been booked so far."""
        self._seconds[kind] += self._elapsed() - self._booked()

    def add(self, seconds: Mapping[str, float]) -> None:
        """Book time from before this process began."""
        for kind, value in seconds.items():
            self._seconds[kind] += value
            self._earlier += value

    def total(self) -> dict[str, float]:
        """Seconds of each kind until now."""
        return self._seconds | {"step": self._seconds["step"] + self._elapsed() - self._booked()}

    def _elapsed(self) -> float:
        return time.monotonic() - self._began + self._earlier

    def _booked(self) -> float:
        return sum(self._seconds.values())


def goodput(seconds: Mapping[str, float]) -> float:
    """The share of time that went into updates which were not lost.

    >>> goodput({"step": 80.0, "compile": 15.0, "lost": 5.0})
    0.8
    """
    return seconds.get("step", 0.0) / max(1e-9, sum(seconds.values()))


def lost(path: Path, saved: Mapping[str, float]) -> float:
    """Seconds that an interrupted run spent after the checkpoint that this run resumes from.

    Args:
      path: its `trainer_log.jsonl`, whose lines hold the `seconds` so far.
      saved: its seconds when it made the checkpoint.
    """
    seconds = [record["seconds"] for record in read_records(path) if isinstance(record.get("seconds"), dict)]
    last = [x for x in (seconds[-1] if seconds else {}).values() if type(x) in (int, float) and 0 <= x < 1e12]
    return max(0.0, sum(last) - sum(saved.values()))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects in a log of JSON lines; torn or garbled lines are skipped."""
    return [record for _, record in read_lines(path)]


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The whole lines of a log of JSON lines, and the object in each."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            text = line.decode()
            record = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append((text, record))
    return found


def describe_timing(seconds: Mapping[str, float]) -> str:
    """Shares in words, the largest first.

    >>> describe_timing({"step": 80.0, "compile": 15.0, "lost": 5.0, "data": 0.0})
    'step 80.0%, compile 15.0%, lost 5.0% of 100 s'
    """
    whole = max(1e-9, sum(seconds.values()))
    parts = sorted(((value, kind) for kind, value in seconds.items() if value > 0.0005 * whole), reverse=True)
    return ", ".join(f"{kind} {value / whole:.1%}" for value, kind in parts) + f" of {whole:,.0f} s"
