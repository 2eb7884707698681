"""Rows in parts: each part is made of whole batches of rows by one process, and kept in a file of its own.

Which rows a part holds depends on the rows and the size of a batch alone. So one process, the workers of a host, and
several hosts that share a folder make the same files; what is there already is not made again, and what was cut short
goes on where it was. A file gets its name when it is whole.
"""

import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets.table import MemoryMappedTable, concat_tables
from datasets.utils import tqdm

from jtune.errors import DataError

log = logging.getLogger("jtune")

T = TypeVar("T")
Make = Callable[[int, int], pa.Table]  # of the rows from one number up to another; it goes to other processes
Beat = Callable[[], None]  # to be called now and then: others wait no longer than it is

MOST = 256  # parts of a table
SEEN_WITHIN = 60.0  # seconds in which a network file system shows what another host has written


class Team(Protocol):
    """The processes that share a folder (see jtune.distributed.exchange)."""

    @property
    def apart(self) -> bool:
        """Whether there are processes outside."""
        ...

    def first(self, what: str, work: Callable[[], T]) -> T:
        """What `work()` gives: of the first process, then of each of the others, which finds what the first left."""
        ...

    def share(self, what: str, sign: str, work: Callable[[int, int, Beat], int]) -> list[int]:
        """`work(place, of, beat)` of each process that means the same by `sign`; what each did, when all is done."""
        ...


class Alone(NamedTuple):
    """One process."""

    apart: bool = False

    def first(self, what: str, work: Callable[[], T]) -> T:
        return work()

    def share(self, what: str, sign: str, work: Callable[[int, int, Beat], int]) -> list[int]:
        return [work(0, 1, lambda: None)]


ALONE = Alone()
TeamOf = Callable[[Path], Team]  # who shares a folder: every process of the program asks, in the same order


def alone(folder: Path) -> Team:
    """The team of one process."""
    return ALONE


def in_parts(
    make: Make,
    table: datasets.Dataset,
    features: datasets.Features,
    *,
    name: str,
    what: str,
    batch_size: int,
    batched_for: int = 1,
    num_proc: int | None = None,
    overwrite: bool = False,
    team: Team = ALONE,
    folder: Path | None = None,
) -> datasets.Dataset:
    """What `make` gives for every batch of rows of `table`, one after the other, read from files.

    Args:
      name: of the result: a digest of all that it depends on, but for how rows are put into batches.
      what: what is done, for people, as in "Encoding".
      batch_size, batched_for: how they are put into batches (see `batch_bounds`).
      num_proc: processes that work on it here.
      overwrite: make also what is there.
      team: the processes that have `folder` in common: each makes its share of the parts.
      folder: where files are kept; default: where `table` is.

    Raises:
      DataError: a worker was killed; a file is damaged, or does not show up.
    """
    bounds = batch_bounds(len(table), batch_size, batched_for)
    batches = list(zip(bounds[:-1].tolist(), bounds[1:].tolist()))
    name = xxhash.xxh64(name.encode() + bounds.tobytes()).hexdigest()
    if not table.cache_files and folder is None:  # rows in memory: nothing is left behind, no progress is shown
        made = [make(*batch) for batch in batches]
        return datasets.Dataset(pa.concat_tables(made or [features.arrow_schema.empty_table()]), fingerprint=name)
    folder = folder or Path(table.cache_files[0]["filename"]).parent
    folder.mkdir(parents=True, exist_ok=True)
    count = min(MOST, len(batches))
    cuts = [len(batches) * part // count for part in range(count + 1)] if count else [0]
    parts = [
        (folder / f"cache-{name}-{part:05}-of-{count:05}.arrow", batches[cuts[part] : cuts[part + 1]])
        for part in range(count)
    ]

    def work(place: int, of: int, beat: Beat) -> int:
        mine = parts[count * place // of : count * (place + 1) // of]
        mine = [part for part in mine if overwrite or not part[0].exists()]
        rows = sum(end - start for _, part in mine for start, end in part)
        if rows:
            quiet = not log.isEnabledFor(logging.INFO)
            # Rows are many short-lived lists: without this, the garbage collector looks through all that was ever
            # imported again and again, and in workers touches, and so copies, each page of it.
            gc.freeze()
            try:
                with tqdm(total=rows, desc=what, unit=" rows", disable=quiet) as bar:
                    _make_all(mine, make, features.arrow_schema, num_proc or 1, lambda n: (beat(), bar.update(n)))
            finally:
                gc.unfreeze()
        return rows

    done = team.share(what, name, work)
    if len(done) > 1 and any(done):
        log.info("%s: %s rows by the processes that share %s", what, " + ".join(map(str, done)), folder)
    if not parts:
        return datasets.Dataset(features.arrow_schema.empty_table(), fingerprint=name)
    return open_parts([path for path, _ in parts], name)


def _make_all(
    parts: Sequence[tuple[Path, list[tuple[int, int]]]],
    make: Make,
    schema: pa.Schema,
    workers: int,
    done: Callable[[int], Any],
) -> None:
    """Write the files of `parts`; `done(rows)` is told on the way."""
    workers = min(workers, len(parts))
    if workers == 1:
        for path, batches in parts:
            _write(path, batches, make, schema, done)
        return
    counter, told = multiprocessing.Value("q", 0), 0
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has one thread
    try:
        with (
            warnings.catch_warnings(),
            ProcessPoolExecutor(workers, initializer=_begin, initargs=(make, schema, counter, os.getpid())) as pool,
        ):
            warnings.filterwarnings("ignore", r"os\.fork", RuntimeWarning)  # jax's, which no worker calls
            waiting = {pool.submit(_work, *part) for part in parts}
            try:
                while waiting:
                    finished, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                    for future in finished:
                        future.result()
                    now = counter.value
                    if now > told:
                        done(now - told)
                        told = now
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} workers was killed, most often for lack of memory: set preprocessing_num_workers lower"
        ) from error
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


_job: tuple[Make, pa.Schema, Any]  # of a worker


def _begin(make: Make, schema: pa.Schema, counter: Any, parent: int) -> None:
    global _job
    _job = make, schema, counter
    if sys.platform == "linux":  # a worker ends with its parent, also where that has no time for it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _work(path: Path, batches: list[tuple[int, int]]) -> None:
    make, schema, counter = _job

    def done(rows: int) -> None:
        with counter.get_lock():
            counter.value += rows

    _write(path, batches, make, schema, done)


def _write(
    path: Path, batches: list[tuple[int, int]], make: Make, schema: pa.Schema, done: Callable[[int], Any]
) -> None:
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for start, end in batches:
                writer.write_table(make(start, end))
                done(end - start)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def open_parts(paths: Sequence[Path], name: str) -> datasets.Dataset:
    """The rows of these files, mapped; `name` is the fingerprint of all of them."""
    return datasets.Dataset(concat_tables([_open(path) for path in paths]), fingerprint=name)


def wait_for(path: Path) -> None:
    """Return when `path` is there: another host has written it, and a network file system takes its time to show it.

    Raises:
      DataError: it does not show up.
    """
    end = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > end:
            raise DataError(f"{path} was written by another process, and cannot be seen here after {SEEN_WITHIN:.0f} s")
        time.sleep(0.2)


def _open(path: Path) -> MemoryMappedTable:
    wait_for(path)
    try:
        return MemoryMappedTable.from_file(str(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is damaged ({error}): delete it, or set overwrite_cache: true") from error


def arrow_column(table: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column of the rows of `table`, in their order."""
    if table._indices is None:  # as it lies there; `datasets` would copy all that it knows of the table
        return table.data.column(name)
    return table.select_columns([name]).with_format("arrow")[:][name]


def batch_bounds(rows: int, batch_size: int, processes: int | None = None) -> np.ndarray:
    """Where the batches begin in which LLaMA-Factory would encode so many rows, and `rows`: int64 `[batches + 1]`.

    Each process takes an equal run of rows, the first ones one more where it does not divide, in batches of its own.
    """
    processes = max(1, min(processes or 1, rows))
    size, more = divmod(rows, processes)
    firsts = [i * size + min(i, more) for i in range(processes + 1)]
    return np.array([*(start for run in pairwise(firsts) for start in range(*run, batch_size)), rows], np.int64)


def preprocessing_batches(rows: int, batch_size: int, processes: int | None) -> np.ndarray:
    """The batch of `batch_bounds` of each row, int64 `[rows]`."""
    sizes = np.diff(batch_bounds(rows, batch_size, processes))
    return np.repeat(np.arange(len(sizes)), sizes)
