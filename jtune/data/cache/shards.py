"""Rows in shards: one process makes each shard from whole batches of rows, and keeps it in a file of its own.

The rows of a shard depend on the table and the size of a batch alone. So one process, the workers of a host, and
several hosts that share a folder make the same files. Files that exist are not made again, and interrupted work resumes
where it was. A file gets its name when it is whole.
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
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets.table import MemoryMappedTable, concat_tables
from datasets.utils import tqdm

from jtune.distributed.exchange import ProcessGroup
from jtune.errors import DataError
from jtune.files import atomic_write

log = logging.getLogger("jtune")

Make = Callable[[int, int], pa.Table]  # of the rows from one number up to another; it goes to other processes
Beat = Callable[[], None]  # to be called now and then: others wait no longer than it is

MOST = 256  # shards of a table
SEEN_WITHIN = 60.0  # seconds in which a network file system shows what another host has written


ALONE = ProcessGroup("", (0,))  # one process
GroupOf = Callable[[Path], ProcessGroup]  # who shares a folder: every process of the program asks, in the same order


def alone(folder: Path) -> ProcessGroup:
    """The group of one process."""
    return ALONE


class Sharing(NamedTuple):
    """How the rows of a table are shared out, and where the results lie.

    Attributes:
      batch_size: rows of a batch.
      num_proc: worker processes of this process.
      overwrite: make also the shards that exist.
      group: the processes that share `folder`: each makes its shards.
      folder: default: the folder of the table.
    """

    batch_size: int = 1000
    num_proc: int | None = None
    overwrite: bool = False
    group: ProcessGroup = ALONE
    folder: Path | None = None


UNSHARED = Sharing()  # one process, rows that were encoded before are not encoded again


def make_in_shards(
    make: Make,
    table: datasets.Dataset,
    features: datasets.Features,
    sharing: Sharing,
    *,
    name: str,
    what: str,
    batched_for: int = 1,
) -> datasets.Dataset:
    """The results of `make` for every batch of rows of `table`, in order, read from files.

    Args:
      name: a digest of all that the result depends on, but for the batches.
      what: the name of the work in messages, as in "Encoding".
      batched_for: see `batch_bounds`.

    Raises:
      DataError: a worker was killed; a file is damaged, or does not show up.
    """
    num_proc, folder, overwrite = sharing.num_proc, sharing.folder, sharing.overwrite
    bounds = batch_bounds(len(table), sharing.batch_size, batched_for)
    batches = list(zip(bounds[:-1].tolist(), bounds[1:].tolist()))
    name = xxhash.xxh64(name.encode() + bounds.tobytes()).hexdigest()
    if not table.cache_files and folder is None:  # rows in memory: no files, no progress bar
        made = [make(*batch) for batch in batches]
        return datasets.Dataset(pa.concat_tables(made or [features.arrow_schema.empty_table()]), fingerprint=name)
    folder = folder or Path(table.cache_files[0]["filename"]).parent
    folder.mkdir(parents=True, exist_ok=True)
    count = min(MOST, len(batches))
    cuts = [len(batches) * shard // count for shard in range(count + 1)] if count else [0]
    shards = [
        (folder / f"cache-{name}-{shard:05}-of-{count:05}.arrow", batches[cuts[shard] : cuts[shard + 1]])
        for shard in range(count)
    ]

    def work(place: int, of: int, beat: Beat) -> int:
        mine = shards[count * place // of : count * (place + 1) // of]
        mine = [shard for shard in mine if overwrite or not shard[0].exists()]
        rows = sum(end - start for _, shard in mine for start, end in shard)
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

    done = sharing.group.share(what, name, work)
    if len(done) > 1 and any(done):
        log.info("%s: %s rows by the processes that share %s", what, " + ".join(map(str, done)), folder)
    if not shards:
        return datasets.Dataset(features.arrow_schema.empty_table(), fingerprint=name)
    return open_shards([path for path, _ in shards], name)


def _make_all(
    shards: Sequence[tuple[Path, list[tuple[int, int]]]],
    make: Make,
    schema: pa.Schema,
    workers: int,
    done: Callable[[int], Any],
) -> None:
    """Write the files of `shards`; `done(rows)` is told on the way."""
    workers = min(workers, len(shards))
    if workers == 1:
        for path, batches in shards:
            _write(path, batches, make, schema, done)
        return
    # Workers inherit `make` and the counter, which cannot be pickled; from Python 3.14 on, fork is not the default.
    forked = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    counter, told = forked.Value("q", 0), 0
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has one thread
    try:
        with (
            warnings.catch_warnings(),
            ProcessPoolExecutor(workers, forked, _begin, (make, schema, counter, os.getpid())) as pool,
        ):
            warnings.filterwarnings("ignore", r"os\.fork", RuntimeWarning)  # jax's, which no worker calls
            waiting = {pool.submit(_work, *shard) for shard in shards}
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
    with (
        atomic_write(path, shared=True) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for start, end in batches:
            writer.write_table(make(start, end))
            done(end - start)


def open_shards(paths: Sequence[Path], name: str) -> datasets.Dataset:
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
