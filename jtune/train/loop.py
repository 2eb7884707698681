"""The loop over updates: the only place where training touches the outside world.

The host runs exactly one update ahead of the devices: it dispatches an update, then reads the metrics of the one
before, so the devices never wait for the host. It tells subscribers what happens.
"""

import logging
import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import jax

from jtune.errors import NonFiniteError
from jtune.losses.feedback import with_margins
from jtune.train.cadence import Cadence, Improvement
from jtune.train.events import Ask, Event, Subscriber, tell
from jtune.train.schedule import Schedule
from jtune.train.step import Metrics
from jtune.train.timing import Timing

log = logging.getLogger("jtune")
MAX_BAD_STEPS = 3  # consecutive non-finite updates before the run stops


@dataclass
class Progress:
    """What the host knows of the run; saved with every checkpoint, so that a resumed run logs what it would have."""

    step: int = 0
    total_loss: float = 0.0  # sum over finite updates of their mean losses
    unlogged_loss: float = 0.0  # the part of it since the last log
    unlogged_steps: int = 0  # updates since the last log, skipped ones too
    unlogged_skipped: int = 0  # those of them that were skipped
    unlogged_figures: dict[str, list[float]] = field(default_factory=dict)  # of each a weighted sum, and its weight
    tokens: int = 0  # tokens fed, padding not counted
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    bad_steps: int = 0  # consecutive non-finite updates, just now; without those that lower the loss scale
    skipped_steps: int = 0  # non-finite updates in all
    log_history: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Progress":
        """What `to_dict` gave. Fields that older code did not have keep their defaults.

        Raises:
          ValueError: a field is unknown, of another type, or not finite.
        """
        defaults = asdict(cls())
        for name, value in saved.items():
            if name not in defaults:
                raise ValueError(f"progress: unknown field {name!r}")
            default = defaults[name]
            if isinstance(default, list):
                fits = isinstance(value, list) and all(isinstance(record, dict) for record in value)
            elif isinstance(default, dict):
                fits = isinstance(value, dict) and all(map(_is_sum, value.values()))
            elif type(default) is int:
                fits = type(value) is int and 0 <= value < 2**63
            else:
                number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
                fits = number or (value is None and default is None)
            if not fits:
                raise ValueError(f"progress: {name} is {str(value)[:60]}")
        return cls(**saved)


def _is_sum(value: Any) -> bool:
    """Whether a value is a sum and its weight."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(x, float) for x in value)


class Hooks(NamedTuple):
    """What the loop calls; each is a plain function."""

    prepare: Callable[[int], Any]  # 0-based update -> batch on the devices
    update: Callable[[Any, Any, float], tuple[Any, Metrics]]  # (state, batch, learning rate) -> (state, metrics)
    tokens: Callable[[int], int]  # 0-based update -> tokens in it
    epoch_at: Callable[[int], float]
    evaluate: Callable[[Any], dict[str, float]] | None  # state -> metrics
    save: Callable[[Any, Progress], None]
    poll: Callable[[], None]  # between updates
    explain: Callable[[int], str]  # 0-based update -> which rows it holds, for the message of a non-finite stop
    rates: Callable[[float], dict[str, float]] = lambda speed: {"tokens_per_second": speed}  # what follows from it
    samples: Callable[[Any], list[dict[str, str]]] | None = None  # state -> answers to look at, at each evaluation
    save_to_stop: Callable[[Any, Progress], None] | None = None  # in the place of `save` when told to stop
    agree: Callable[[bool], bool] = bool  # once for every update: was any process told to stop (`spread.agreement`)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets, for the loop to save and leave; a second Ctrl-C interrupts at once."""
    stop = threading.Event()

    def handler(signum, frame):
        if stop.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for s, previous in before.items():
            signal.signal(s, previous)


def batches(prepare: Callable[[int], Any], start: int, stop: int, timing: Timing) -> Iterator[Any]:
    """`prepare(start), prepare(start + 1), ...`, each made in a thread while the one before it is being used.

    Waiting time counts as "data".
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = deque(pool.submit(prepare, step) for step in range(start, min(start + 2, stop)))
        for step in range(start, stop):
            with timing.spent("data"):
                batch = ahead.popleft().result()
            if step + 2 < stop:
                ahead.append(pool.submit(prepare, step + 2))
            yield batch


class Dispatched(NamedTuple):
    """An update whose metrics are still on the device."""

    step: int
    learning_rate: float
    tokens: int  # fed up to it
    metrics: Metrics
    log_due: bool


@dataclass
class LastLog:
    """Where the run stood at its last log, for the rates of the next."""

    seconds: float  # of updates (`working`)
    tokens: int
    grad_norm: float | None = None  # of the last finite update


def run_loop(
    state: Any,
    progress: Progress,
    cadence: Cadence,
    schedule: Schedule,
    hooks: Hooks,
    subscribers: Sequence[Subscriber],
    improvement: Improvement,
    timing: Timing | None = None,
) -> tuple[Any, str]:
    """Run updates `progress.step` .. `cadence.max_steps`.

    Args:
      timing: where time is booked. The rates of a log are those of updates: tokens over the time since the last log,
        without compiling, evaluating and saving.

    A log's loss is the mean over the finite updates since the last log, its grad_norm that of the last of them; it has
    neither if all were skipped. `skipped_updates` counts the skipped ones, if there are any.

    Returns:
      The last state, and why the loop ended: "done", "stopped" (a subscriber or early stopping) or "preempted" (a
      signal; the state has been saved).

    Raises:
      NonFiniteError: loss or gradients were not finite `MAX_BAD_STEPS` times in a row; those updates were skipped.
        Skipped updates that only lower float16's loss scale do not count.
    """
    queue: deque[Dispatched] = deque()
    timing = timing or Timing()
    last = LastLog(working(timing), progress.tokens)

    def event(kind, record=None) -> set[Ask]:
        step = record["step"] if record else progress.step  # a log is of the update that it measured, one or more back
        return tell(subscribers, Event(kind, step, cadence.max_steps, hooks.epoch_at(step), record or {}))

    def read_oldest() -> set[Ask]:
        """Take the metrics of a dispatched update to the host, and log if that was due."""
        entry = queue.popleft()
        _count(entry, progress, hooks, last)
        if not entry.log_due:
            return set()
        record, rates = _log_record(entry, progress, hooks, last, timing)
        if cadence.log_tokens:
            record["num_input_tokens_seen"] = entry.tokens
        progress.log_history.append(record)
        return event("log", record | rates)

    event("train_begin")
    try:
        if cadence.eval_on_start and progress.step == 0:
            with timing.spent("evaluation"):
                _evaluate(state, progress, hooks, improvement, event)
        outcome = "done"
        with stop_signals() as stopping:
            start = progress.step
            for index, batch in enumerate(batches(hooks.prepare, start, cadence.max_steps, timing), start):
                rate = schedule(index)
                with jax.profiler.StepTraceAnnotation("train", step_num=index + 1):  # for profile_steps
                    state, metrics = hooks.update(state, batch, rate)
                stop = hooks.agree(stopping.is_set())
                progress.step = index + 1
                progress.tokens += hooks.tokens(index)
                due = cadence.due(progress.step, hooks.epoch_at(progress.step))
                queue.append(Dispatched(progress.step, rate, progress.tokens, metrics, "log" in due))
                asked: set[Ask] = event("step")
                due |= asked & {"evaluate", "save"}
                wait_for_all = due & {"evaluate", "save"} or stop or "stop" in asked
                while len(queue) > (0 if wait_for_all else 1):
                    asked |= read_oldest()
                due |= asked & {"evaluate", "save"}

                if "evaluate" in due:
                    with timing.spent("evaluation"):
                        better, more = _evaluate(state, progress, hooks, improvement, event)
                    asked |= more
                    if cadence.save_strategy == "best" and better:
                        due.add("save")
                    if _is_patience_over(progress, improvement):
                        asked.add("stop")
                due |= asked & {"save"}
                if "save" in due or stop:
                    while queue:
                        asked |= read_oldest()
                    with timing.spent("checkpoint"):
                        save = hooks.save_to_stop if stop and hooks.save_to_stop else hooks.save
                        save(state, progress)
                    asked |= event("save")
                with timing.spent("checkpoint"):
                    hooks.poll()
                if stop and progress.step < cadence.max_steps:
                    outcome = "preempted"
                    break
                if "stop" in asked:
                    outcome = "stopped"
                    break
            while queue:
                read_oldest()
    finally:
        event("train_end")  # also of a run that fails: subscribers may hold files and the terminal
    return state, outcome


def _count(entry: Dispatched, progress: Progress, hooks: Hooks, last: LastLog) -> None:
    """Wait for an update, and count it as done or as skipped."""
    metrics: Any = jax.tree.map(lambda x: x.item(), jax.device_get(entry.metrics))
    if metrics.finite:
        for name, found in metrics.figures.items():
            before = progress.unlogged_figures.get(name, (0.0, 0.0))
            progress.unlogged_figures[name] = [old + new for old, new in zip(before, found)]
        progress.bad_steps = 0
        progress.total_loss += metrics.loss
        progress.unlogged_loss += metrics.loss
        last.grad_norm = metrics.grad_norm
    else:
        _skip(progress, entry.step, metrics, hooks)
    progress.unlogged_steps += 1


def _log_record(
    entry: Dispatched, progress: Progress, hooks: Hooks, last: LastLog, timing: Timing
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of the updates since the last log, as Trainer has it, and the rates that jtune adds."""
    now = working(timing)
    counted = progress.unlogged_steps - progress.unlogged_skipped
    record: dict[str, Any] = {}
    if counted:  # readers of the log look for "loss", and expect a number
        record = {"loss": progress.unlogged_loss / counted, "grad_norm": last.grad_norm}
        record |= with_margins(means_of(progress.unlogged_figures))
    record |= {"learning_rate": entry.learning_rate, "epoch": hooks.epoch_at(entry.step), "step": entry.step}
    if progress.unlogged_skipped:
        record["skipped_updates"] = progress.unlogged_skipped
    rates: dict[str, Any] = hooks.rates((entry.tokens - last.tokens) / max(1e-9, now - last.seconds))
    rates |= {"num_input_tokens_seen": entry.tokens, "seconds": timing.total()}
    last.seconds, last.tokens = now, entry.tokens
    progress.unlogged_loss, progress.unlogged_steps, progress.unlogged_skipped = 0.0, 0, 0
    progress.unlogged_figures = {}
    return record, rates


def means_of(figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Weighted means of figures; those that nothing counts in are left out.

    >>> means_of({"kl": (3.0, 2.0), "rewards/rejected": (0.0, 0.0)})
    {'kl': 1.5}
    """
    return {name: total / weight for name, (total, weight) in figures.items() if weight}


def _is_patience_over(progress: Progress, improvement: Improvement) -> bool:
    """Whether early stopping ends the run."""
    if improvement.patience is None or progress.evaluations_without_gain < improvement.patience:
        return False
    log.info("stopping early: no better %s in %d evaluations", improvement.metric, improvement.patience)
    return True


def working(timing: Timing) -> float:
    """Seconds in which updates were computed or waited for their data."""
    seconds = timing.total()
    return seconds["step"] + seconds["data"]


def finite_or_none(value: Any) -> Any:
    """`value`; None in the place of nan and of infinities, which JSON does not have.

    >>> [finite_or_none(x) for x in (1.5, math.nan, -math.inf, "text")]
    [1.5, None, None, 'text']
    """
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _skip(progress: Progress, step: int, metrics: Any, hooks: Hooks) -> None:
    progress.skipped_steps += 1
    progress.unlogged_skipped += 1
    if math.isfinite(metrics.loss) and metrics.loss_scale > 1:
        # float16 finds its loss scale by overflowing: it begins at 2**16, and a healthy run may need many halvings, as
        # with torch's GradScaler. If the gradients are at fault, the scale comes to 1, and updates count from there.
        what = "update %d: the gradients overflow at loss scale %g: skipped, the scale is halved"
        log.info(what, step, metrics.loss_scale)
        return
    progress.bad_steps += 1
    log.warning("update %d: loss %s, gradient norm %s: skipped", step, metrics.loss, metrics.grad_norm)
    if progress.bad_steps >= MAX_BAD_STEPS:
        raise NonFiniteError(
            f"loss or gradients were not finite in {MAX_BAD_STEPS} updates in a row, the last of them update {step} "
            f"({hooks.explain(step - 1)}).\nThose updates were skipped, so no checkpoint holds them. Look at these "
            "rows (jtune data), lower learning_rate, or train in bf16 rather than fp16."
        )


def _evaluate(state, progress: Progress, hooks: Hooks, improvement: Improvement, event) -> tuple[bool, set[Ask]]:
    where = {"epoch": hooks.epoch_at(progress.step), "step": progress.step}
    asked: set[Ask] = set()
    if hooks.samples is not None:
        asked |= event("samples", where | {"samples": hooks.samples(state)})
    if hooks.evaluate is None:
        return False, asked
    metrics = hooks.evaluate(state)
    record = {key: finite_or_none(value) for key, value in metrics.items()} | where
    progress.log_history.append(record)
    value = record.get(improvement.metric)
    better = False
    if value is not None:
        best = progress.best_metric
        better = best is None or (value > best if improvement.greater_is_better else value < best)
        if better:
            progress.best_metric, progress.best_step = value, progress.step
    progress.evaluations_without_gain = 0 if better else progress.evaluations_without_gain + 1
    return better, asked | event("evaluate", record)
