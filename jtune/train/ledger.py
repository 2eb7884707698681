"""Where the time of a run goes: a ledger of seconds, kept over interruptions, and the rates that follow from it."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# Starting up (data, weights, and whatever else comes before the loop), compiling, waiting for a batch, updates, saving,
# evaluating; and what an interrupted run had done since its last checkpoint, which is done again.
KINDS = ("startup", "compile", "data", "step", "checkpoint", "evaluation", "lost")


class Ledger:
    """Seconds of each kind since it was made; what is not said to be of another kind is of updates."""

    def __init__(self):
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._began = time.monotonic()
        self._earlier = 0.0

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Book what happens inside, but for what is booked in there already."""
        begin, booked = time.monotonic(), self._booked()
        try:
            yield
        finally:
            inside = self._booked() - booked
            self._seconds[kind] += time.monotonic() - begin - inside

    def rest(self, kind: str) -> None:
        """Book all that has not been booked so far."""
        self._seconds[kind] += self._elapsed() - self._booked()

    def add(self, seconds: Mapping[str, float]) -> None:
        """Book what happened before this process began."""
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
    """The share of the time in which the run got on: that of updates which were not lost.

    >>> goodput({"step": 80.0, "compile": 15.0, "lost": 5.0})
    0.8
    """
    return seconds.get("step", 0.0) / max(1e-9, sum(seconds.values()))


def lost(path: Path, saved: Mapping[str, float]) -> float:
    """Seconds that an interrupted run had spent since the checkpoint that is gone on from.

    Args:
      path: its `trainer_log.jsonl`, whose lines tell the `seconds` so far.
      saved: its seconds when it made the checkpoint.
    """
    if not path.exists():
        return 0.0
    lines = [line for line in path.read_text().splitlines() if line.endswith("}") and '"seconds"' in line]
    last = json.loads(lines[-1])["seconds"] if lines else {}
    return max(0.0, sum(last.values()) - sum(saved.values()))


def describe(seconds: Mapping[str, float]) -> str:
    """In words, the largest first.

    >>> describe({"step": 80.0, "compile": 15.0, "lost": 5.0, "data": 0.0})
    'step 80.0%, compile 15.0%, lost 5.0% of 100 s'
    """
    whole = max(1e-9, sum(seconds.values()))
    parts = sorted(((value, kind) for kind, value in seconds.items() if value > 0.0005 * whole), reverse=True)
    return ", ".join(f"{kind} {value / whole:.1%}" for value, kind in parts) + f" of {whole:,.0f} s"
