"""Experiment trackers: a thread for each, so that none of them can stop or slow a run.

A tracker's library is imported, started, fed and finished in one thread of its own. The run puts records into a queue
and goes on. A library that raises is reported in one line; one that hangs loses the records that the queue has no room
for, and the end of the run waits for it `PATIENCE` seconds.
"""

import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from jtune.config import Config
from jtune.config.trackers import TRACKERS
from jtune.distributed import processes
from jtune.errors import DataError, Preempted
from jtune.files import read_object
from jtune.secrets import redact
from jtune.train.callbacks import libraries
from jtune.train.callbacks.libraries import Handle, Outcome, Session
from jtune.train.callbacks.tags import numbers
from jtune.train.events import Event, Subscriber
from jtune.train.results import write_json

log = logging.getLogger("jtune")

RUNS = "trackers.json"  # in output_dir: the run's id in each tracker, for a resumed run to go on with
PATIENCE = 30.0  # seconds that the end of a run waits for all trackers together
SHORT_PATIENCE = 5.0  # of a run that is stopped or fails: it must be gone before it is killed
THREAD = "report to "  # what the names of the threads begin with
TURN = 15.0  # seconds that a tracker waits for another to start
ROOM = 1000  # records that wait for a tracker, at most
START: dict[str, Callable[[Session], Handle]] = {
    "wandb": libraries.start_wandb,
    "mlflow": libraries.start_mlflow,
    "swanlab": libraries.start_swanlab,
    "trackio": libraries.start_trackio,
}
# Two threads of Python 3.11 that parse at once fail ("AST constructor recursion depth mismatch"), and libraries parse
# their own source when they start: one starts after the other, unless one hangs.
_starting = threading.Lock()


def is_installed(name: str) -> bool:
    """Whether a tracker's library is there. A folder of its name, in which wandb keeps its files, is no library."""
    spec = importlib.util.find_spec("tensorboardX" if name == "tensorboard" else name)
    return spec is not None and spec.origin is not None


def chosen(config: Config) -> list[str]:
    """The trackers that `report_to` asks for, and that are installed."""
    report_to = config.training.report_to
    return [name for name in TRACKERS if name in report_to or "all" in report_to if is_installed(name)]


def note_missing(config: Config) -> None:
    """Say which trackers are asked for and not installed."""
    for name in config.training.report_to:
        if name != "all" and not is_installed(name):
            install = f"pip install 'jtune-llm[{name}]'"
            log.warning("report_to: %s is not installed, and the run goes on without it: %s", name, install)


@contextmanager
def reporting(config: Config, output_dir: Path, start_step: int) -> Iterator[list[Subscriber]]:
    """Report the run of the block to the trackers that are asked for, on the first of several processes.

    A run that resumes goes on with its run in each tracker, if the tracker can.

    Args:
      start_step: the updates that are done already.
    """
    names = [name for name in chosen(config) if name in START] if processes.is_first() else []
    session = libraries.session_of(config)
    known = read_runs(output_dir) if start_step else {}
    lock = threading.Lock()

    def keep(name: str, run_id: str) -> None:
        with lock:
            known[name] = run_id
            write_json(output_dir / RUNS, known)

    trackers = [
        Tracker(name, partial(START[name], session._replace(run_id=known.get(name))), partial(keep, name))
        for name in names
    ]
    outcome: Outcome = "failed"
    try:
        yield [tracker.subscribe for tracker in trackers]
        outcome = "finished"
    except (Preempted, KeyboardInterrupt):
        outcome = "stopped"
        raise
    finally:
        close(trackers, outcome)


def read_runs(output_dir: Path) -> dict[str, str]:
    """The run's id in each tracker; nothing where the file is missing or damaged: the tracker then has two runs."""
    try:
        return {k: v for k, v in read_object(output_dir / RUNS).items() if isinstance(v, str)}
    except (FileNotFoundError, DataError):
        return {}


def any_at_work() -> bool:
    """Whether a tracker's thread is not done: at the end of the process it hangs, and its library would hang again in
    what Python does at exit.
    """
    return any(thread.name.startswith(THREAD) for thread in threading.enumerate())


class Tracker:
    """A tracker at work in a thread of its own."""

    def __init__(self, name: str, start: Callable[[], Handle], keep: Callable[[str], None]):
        self.name, self.start, self.keep = name, start, keep
        self.records: SimpleQueue[tuple[Mapping[str, float], int] | Outcome] = SimpleQueue()
        self.lost = 0  # records that there was no room for
        self.complained = False
        # A daemon, as the process must be able to end while the library hangs.
        self.thread = threading.Thread(target=self._work, name=f"{THREAD}{name}", daemon=True)
        self.thread.start()

    def subscribe(self, event: Event) -> None:
        """Put a record into the queue; no tracker answers with a request."""
        if event.kind not in ("log", "evaluate") or not self.thread.is_alive():
            return
        if self.records.qsize() >= ROOM:
            self.lost += 1
        else:
            self.records.put((numbers(event.record), event.step))

    def _work(self) -> None:
        alone = _starting.acquire(timeout=TURN)
        try:
            handle = self.start()
        except BaseException as error:  # a library may also raise SystemExit
            self._complain("does not start, and the run goes on without it", error)
            return
        finally:
            if alone:
                _starting.release()
        try:
            self.keep(handle.run_id)
        except OSError as error:
            self._complain("has a run that cannot be gone on with", error)
        while isinstance(record := self.records.get(), tuple):
            try:
                handle.log(*record)
            except BaseException as error:
                self._complain("does not take a record; the next ones are tried", error)
        try:
            handle.finish(record)
        except BaseException as error:
            self._complain("does not finish its run", error)

    def _complain(self, what: str, error: BaseException) -> None:
        """Once for each tracker: an outage would otherwise give a line for each record."""
        if not self.complained:
            lines = redact(str(error)).strip().splitlines()
            log.warning("report_to: %s %s: %s", self.name, what, lines[0] if lines else type(error).__name__)
        self.complained = True


def close(trackers: list[Tracker], outcome: Outcome) -> None:
    """Tell all trackers that the run is over, and wait for them; say what they have not got."""
    for tracker in trackers:
        tracker.records.put(outcome)
    patience = PATIENCE if outcome == "finished" else SHORT_PATIENCE
    deadline = time.monotonic() + patience
    for tracker in trackers:
        tracker.thread.join(max(0.0, deadline - time.monotonic()))
        if tracker.thread.is_alive():
            log.warning(
                "report_to: %s has not finished in %g seconds: what it was given last may be missing there",
                tracker.name,
                patience,
            )
        elif tracker.lost:
            log.warning("report_to: %s was too slow: %d records are missing there", tracker.name, tracker.lost)
