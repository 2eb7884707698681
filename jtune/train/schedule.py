"""Learning-rate schedules by Hugging Face's names, as plain functions of the step.

A schedule is `step -> learning rate` in Python floats. The loop evaluates it on the host and passes the value to the
jitted step as data. So the logged rate is the rate that was used, to the last bit of a double, and no schedule is ever
compiled. The formulas are those of `transformers.optimization`. `warmup_stable_decay` has LLaMA-Factory's default: the
stable part takes a third of the steps after warm-up.
"""

import difflib
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jtune.config import TrainingArguments
from jtune.errors import ConfigError

Schedule = Callable[[int], float]


class Span(NamedTuple):
    """The updates that a schedule covers, and its peak rate."""

    warmup: int
    total: int
    peak: float

    def ramp(self, step: int) -> float:
        """The factor during warm-up."""
        return step / max(1, self.warmup)

    def progress(self, step: int) -> float:
        """How much of the part after warm-up is done, in [0, 1] while step <= total."""
        return (step - self.warmup) / max(1, self.total - self.warmup)


def _half_cosine(progress: float, num_cycles: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))


def _constant(step, span: Span):
    return 1.0


def _constant_with_warmup(step, span: Span):
    return span.ramp(step) if step < span.warmup else 1.0


def _linear(step, span: Span):
    warmup, total, _ = span
    return span.ramp(step) if step < warmup else max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step, span: Span, *, num_cycles=0.5):
    if step < span.warmup:
        return span.ramp(step)
    return max(0.0, _half_cosine(span.progress(step), num_cycles))


def _cosine_with_restarts(step, span: Span, *, num_cycles=1):
    if step < span.warmup:
        return span.ramp(step)
    progress = span.progress(step)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))


def _polynomial(step, span: Span, *, lr_end=1e-7, power=1.0):
    warmup, total, peak = span
    if step < warmup:
        return span.ramp(step)
    if step > total or total == warmup:
        return lr_end / peak
    return ((peak - lr_end) * (1 - (step - warmup) / (total - warmup)) ** power + lr_end) / peak


def _inverse_sqrt(step, span: Span, *, timescale=None):
    if step < span.warmup:
        return span.ramp(step)
    timescale = timescale or span.warmup or 10_000
    return 1.0 / math.sqrt((step + timescale - span.warmup) / timescale)


def _floor(factor: float, peak: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        raise ConfigError("this schedule needs exactly one of min_lr or min_lr_rate in lr_scheduler_kwargs")
    rate = min_lr / peak if min_lr is not None else min_lr_rate or 0.0
    return max(0.0, factor * (1 - rate) + rate)


def _cosine_with_min_lr(step, span: Span, *, num_cycles=0.5, min_lr=None, min_lr_rate=None):
    floored = _floor(_half_cosine(span.progress(step), num_cycles), span.peak, min_lr, min_lr_rate)
    return span.ramp(step) if step < span.warmup else floored


def _cosine_warmup_with_min_lr(step, span: Span, *, num_cycles=0.5, min_lr=None, min_lr_rate=None, warmup_lr_rate=None):
    # It counts from one, so that the first update already has a rate above zero.
    warmup, total, peak = span
    progress = (step - warmup + 1.0) / max(1.0, total - warmup)
    floored = _floor(_half_cosine(progress, num_cycles), peak, min_lr, min_lr_rate)
    if step >= warmup:
        return floored
    if warmup_lr_rate is None:
        return (step + 1.0) / max(1, warmup)
    return warmup_lr_rate + (1.0 - warmup_lr_rate) * step / max(1, warmup - 1)


def _warmup_stable_decay(
    step,
    span: Span,
    *,
    num_stable_steps=None,
    num_decay_steps=None,
    warmup_type="linear",
    decay_type="cosine",
    min_lr_ratio=0.0,
    num_cycles=0.5,
):
    shapes = ("linear", "cosine", "1-sqrt")
    if warmup_type not in shapes or decay_type not in shapes:
        raise ConfigError(f"lr_scheduler_kwargs: warmup_type and decay_type are one of {', '.join(shapes)}")
    warmup, total, _ = span
    stable = (total - warmup) // 3 if num_stable_steps is None else num_stable_steps
    decay = total - warmup - stable if num_decay_steps is None else num_decay_steps

    def lifted(factor: float) -> float:
        return max(0.0, factor * (1.0 - min_lr_ratio) + min_lr_ratio)

    if step < warmup:
        t = span.ramp(step)
        rising = {"linear": t, "cosine": 0.5 * (1.0 - math.cos(math.pi * t)), "1-sqrt": 1.0 - math.sqrt(1.0 - t)}
        return lifted(rising[warmup_type])
    if step < warmup + stable:
        return 1.0
    if step < warmup + stable + decay:
        t = (step - warmup - stable) / max(1, decay)
        falling = {"linear": 1.0 - t, "cosine": _half_cosine(t, num_cycles), "1-sqrt": 1.0 - math.sqrt(t)}
        return lifted(falling[decay_type])
    return min_lr_ratio


SCHEDULES: dict[str, Callable[..., float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "cosine_warmup_with_min_lr": _cosine_warmup_with_min_lr,
    "warmup_stable_decay": _warmup_stable_decay,
}


def warmup_updates(max_steps: int, warmup_steps: float, warmup_ratio: float | None) -> int:
    """Number of warm-up updates: `warmup_steps` if it is a count, else a share of the run (or `warmup_ratio`)."""
    if warmup_steps >= 1:
        return int(warmup_steps)
    return math.ceil(max_steps * (warmup_steps or warmup_ratio or 0.0))


def make_schedule(name: str, learning_rate: float, warmup: int, max_steps: int, kwargs: dict | None = None) -> Schedule:
    """The learning rate of each update.

    Args:
      name: one of `SCHEDULES`, by Hugging Face's name.
      learning_rate: the peak rate.
      warmup: updates of warm-up.
      max_steps: updates of the whole run.
      kwargs: `lr_scheduler_kwargs`: `num_cycles`, `power`, `min_lr` and other options of the schedule.

    Returns:
      `schedule(step)`, with `step` counted from 0 for the first update.

    Raises:
      ConfigError: an unknown schedule, an unknown or missing keyword.

    >>> schedule = make_schedule("linear", 1e-3, warmup=2, max_steps=12)
    >>> [schedule(step) for step in (0, 1, 2, 3)]
    [0.0, 0.0005, 0.001, 0.0009000000000000001]
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1) or ["linear"]
        raise ConfigError(
            f"lr_scheduler_type: {name!r} is not a schedule of jtune. Did you mean {near[0]!r}? "
            f"(There are: {', '.join(SCHEDULES)})"
        )
    known = [p for p in inspect.signature(SCHEDULES[name]).parameters if p not in ("step", "span")]
    for key in kwargs or {}:
        if key not in known:
            raise ConfigError(f"lr_scheduler_kwargs: {name} has no {key!r}; it takes {', '.join(known) or 'nothing'}")
    factor = partial(SCHEDULES[name], span=Span(warmup, max_steps, learning_rate), **(kwargs or {}))
    factor(warmup)  # reports a missing keyword now, not at the end of warm-up
    return lambda step: learning_rate * factor(step)


def check_schedule(training: TrainingArguments) -> None:
    """Raise a ConfigError for options that the schedule does not take. This reads nothing from the disk."""
    make_schedule(training.lr_scheduler_type, training.learning_rate, 0, 1, training.lr_scheduler_kwargs)
