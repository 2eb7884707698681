"""Elapsed and remaining time."""

import logging
import time
from datetime import timedelta

log = logging.getLogger("jtune")


class Clock:
    """Seconds and tokens since the run (or its resumption) began, for rates and the time left."""

    def __init__(self, step: int):
        self.start, self.first_step = time.monotonic(), step

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def remaining(self, step: int, max_steps: int) -> float:
        return self.elapsed() / max(1, step - self.first_step) * (max_steps - step)


def hours_minutes_seconds(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
