"""Processes exchange small values and agree on them.

They use jax's coordination service, a small key-value store on process 0, and not collectives of the devices: the store
needs no compiled program, has timeouts, and can name the process that is missing. In one process all of this is free,
and nothing is connected.
"""

import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from jtune.distributed.command import how_to_go_on
from jtune.distributed.processes import count, index, is_first, jax_state
from jtune.errors import PeerLost

log = logging.getLogger("jtune")

T = TypeVar("T")
DAY = 24 * 3600.0
HEARTBEAT_TIMEOUT = 600.0  # seconds that the others wait for a process without a `heartbeat`
HEARTBEAT_INTERVAL = 2.0  # seconds between two heartbeats, at least
SEEN_WITHIN = 2.0  # seconds after which every process sees a new file in a shared folder

_HEARTBEATS = "jtune/heartbeat/"
_used: Counter[str] = Counter()  # names of exchanges: every key is used once


def all_gather(name: str, value: str, *, seconds: float | None = None) -> list[str]:
    """The `value` of every process, in order. All processes call it, with the same names in the same order.

    Raises:
      PeerLost: a process sent neither its value nor a heartbeat in time.
    """
    if count() == 1:
        return [value]
    key = _new_key(name)
    jax_state().client.key_value_set(f"{key}/{index()}", value)
    values = _gather(key, range(count()), seconds)
    return [values[i] for i in range(count())]


def barrier(name: str, *, seconds: float = 600) -> None:
    """Return when all processes have called it.

    Raises:
      PeerLost: a process did not call it in time.
    """
    if count() > 1:
        _wait(_new_key(name), seconds)


def from_first(name: str, make: Callable[[], T]) -> T:
    """Broadcast the result of `make()`, which only process 0 calls. It must be JSON-able."""
    if count() == 1:
        return make()
    key, client = _new_key(name), jax_state().client
    if is_first():
        value = make()
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(key, int(DAY * 1000)))


class ProcessGroup(NamedTuple):
    """Processes that share a folder, and so the work whose results are files in it. `process_group` makes it.

    All members call the same methods in the same order, and wait only for each other. They wait in the key-value store,
    not in a collective of the devices, which would time out before a large data set is encoded.
    """

    key: str
    members: tuple[int, ...]

    @property
    def is_partial(self) -> bool:
        """Whether some processes of the run are not members."""
        return len(self.members) < count()

    def first(self, what: str, work: Callable[[], T]) -> T:
        """Call `work()` on the first member, then on each of the others, which finds the files of the first.

        Raises:
          PeerLost: the first member neither finished nor sent a heartbeat in time.
        """
        if count() == 1:
            return work()
        key = _new_key(f"{self.key}/{what}")
        if index() != self.members[0]:
            _gather(key, self.members[:1])
        with working():
            result = work()
        jax_state().client.key_value_set(f"{key}/{index()}", "done")
        return result

    def share(self, what: str, sign: str, work: Callable[[int, int, Callable[[], None]], int]) -> list[int]:
        """Split `work(shard, shards, heartbeat)` over the members with the same `sign`; return the results of all.

        Args:
          sign: a digest of the work. Members with different signs do not share it.
          work: does the shard `shard` of `shards`; calls `heartbeat()` now and then, so that the others wait for it.

        Raises:
          PeerLost: a process neither finished nor sent a heartbeat in time.
        """
        if count() == 1:
            return [work(0, 1, heartbeat)]
        key, client = _new_key(f"{self.key}/{what}"), jax_state().client
        client.key_value_set(f"{key}/sign/{index()}", sign)
        signs = _gather(f"{key}/sign", self.members)
        mates = [i for i in self.members if signs[i] == sign]
        if len(mates) < len(self.members) and index() == mates[0]:
            log.warning(
                "%s: the processes have different rows (a file may have another date), so they do not share this work",
                what,
            )
        done = work(mates.index(index()), len(mates), heartbeat)
        client.key_value_set(f"{key}/done/{index()}", str(done))
        results = _gather(f"{key}/done", mates)
        return [int(results[i]) for i in mates]


def process_group(folder: Path) -> ProcessGroup:
    """The processes that see the same folder under this name: each writes a marker file to test it. All call it.

    Raises:
      PeerLost: a process did not call it in time.
    """
    if count() == 1:
        return ProcessGroup("", (index(),))
    folder.mkdir(parents=True, exist_ok=True)
    nonce = from_first("nonce", lambda: os.urandom(8).hex())
    marks = [folder / f".host-{nonce}-{i}" for i in range(count())]
    marks[index()].touch()
    all_gather("marks", "made")
    end = time.monotonic() + SEEN_WITHIN
    while not all(mark.exists() for mark in marks) and time.monotonic() < end:
        time.sleep(0.1)
    seen = all_gather("marks seen", json.dumps([i for i, mark in enumerate(marks) if mark.exists()]))
    marks[index()].unlink(missing_ok=True)
    members = connected([json.loads(x) for x in seen])[index()]
    return ProcessGroup(f"group-{nonce}-{members[0]}", members)


def connected(seen: list[list[int]]) -> list[tuple[int, ...]]:
    """The group of each process, given the markers that each sees. Seeing in one direction is enough to share a group.

    >>> connected([[0, 2], [1], [2], [3, 1]])
    [(0, 2), (1, 3), (0, 2), (1, 3)]
    """
    group = [{i} for i in range(len(seen))]
    for i, others in enumerate(seen):
        for j in others:
            group[i] |= group[j]
            for k in group[i]:
                group[k] = group[i]
    return [tuple(sorted(members)) for members in group]


_last_heartbeat = [0.0]


def heartbeat() -> None:
    """Show that this process works, so that the others go on waiting for it. Call it as often as you like."""
    if count() > 1 and time.monotonic() - _last_heartbeat[0] > HEARTBEAT_INTERVAL:
        _last_heartbeat[0] = time.monotonic()
        jax_state().client.key_value_set(f"{_HEARTBEATS}{index()}", str(_last_heartbeat[0]), allow_overwrite=True)


@contextmanager
def working() -> Iterator[None]:
    """Send heartbeats during work that cannot call `heartbeat`: a file is read, or a model is downloaded."""
    over = threading.Event()

    def send_heartbeats() -> None:
        while not over.wait(HEARTBEAT_INTERVAL):
            try:
                heartbeat()
            except Exception:
                return  # process 0 is gone; jax reports it

    thread = threading.Thread(target=send_heartbeats, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _gather(key: str, processes: Iterable[int], seconds: float | None = None) -> dict[int, str]:
    """The values that processes have set under `key`, at least those of `processes`.

    Waits for a missing process as long as it sends heartbeats, and `seconds` (default: HEARTBEAT_TIMEOUT) more.
    """
    client, processes, seconds = jax_state().client, list(processes), seconds or HEARTBEAT_TIMEOUT
    pause, heard, since = 0.01, None, time.monotonic()
    while True:
        values = {int(k.rsplit("/", 1)[1]): v for k, v in client.key_value_dir_get(key + "/")}
        missing = [i for i in processes if i not in values]
        if not missing:
            return values
        heartbeats = dict(client.key_value_dir_get(_HEARTBEATS))
        now = {i: heartbeats.get(f"{_HEARTBEATS}{i}") for i in missing}
        if now != heard:
            heard, since = now, time.monotonic()
        elif time.monotonic() - since > seconds:
            who = ", ".join(map(str, missing))
            raise PeerLost(f"process {who} timed out at '{key}': no heartbeat for {seconds:.0f} s.\n" + how_to_go_on())
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)


def _new_key(name: str) -> str:
    _used[name] += 1
    return f"jtune/{name}/{_used[name]}"


def _wait(key: str, seconds: float) -> None:
    try:
        jax_state().client.wait_at_barrier(key.replace("/", "-"), int(seconds * 1000))
    except Exception as error:
        missing = re.search(r"timed out task names:\s*([\d\s,]+)", str(error))
        who = f"process {', '.join(missing[1].split())}" if missing else "another process"
        raise PeerLost(f"{who} did not reach '{key}' within {seconds:.0f} s.\n{how_to_go_on()}") from error
