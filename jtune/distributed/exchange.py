"""Several processes agree on something.

Agreement goes through jax's coordination service, a small key-value store that process 0 serves, and not through
collectives of the devices: it needs no compiled program, has timeouts, and can say who is missing. In one process all
of this is free, and nothing is connected.
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
STILL = 600.0  # seconds that others wait for a process that does not show that it works (`beat`)
BEAT = 2.0  # seconds between two such signs, at least
SEEN_WITHIN = 2.0  # seconds in which a folder that processes share shows them a new file

_BEATS = "jtune/beat/"
_used: Counter[str] = Counter()  # names of exchanges: every key is used once


# ---------------------------------------------------------------------- agreeing, on the host


def all_gather(name: str, value: str, *, seconds: float | None = None) -> list[str]:
    """Every process's `value`, in their order. All call it, in the same order of names.

    Raises:
      PeerLost: one has not come in time, nor shown that it works.
    """
    if count() == 1:
        return [value]
    key = _new_key(name)
    jax_state().client.key_value_set(f"{key}/{index()}", value)
    found = _gather(key, range(count()), seconds)
    return [found[i] for i in range(count())]


def barrier(name: str, *, seconds: float = 600) -> None:
    """Return when all processes have come here.

    Raises:
      PeerLost: one has not come in time.
    """
    if count() > 1:
        _wait(_new_key(name), seconds)


def from_first(name: str, make: Callable[[], T]) -> T:
    """What `make()` is on process 0, on every process. It must be JSON-able."""
    if count() == 1:
        return make()
    key, client = _new_key(name), jax_state().client
    if is_first():
        value = make()
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(key, int(DAY * 1000)))


class ProcessGroup(NamedTuple):
    """Processes that share a folder, and so the work whose results lie there. Make it with `team`.

    All of a team ask for the same things in the same order, and wait for nobody else: in the key-value store, and not
    in a collective of the devices, which would give up before a large data set is encoded.
    """

    key: str
    members: tuple[int, ...]

    @property
    def apart(self) -> bool:
        """Whether there are processes outside."""
        return len(self.members) < count()

    def first(self, what: str, work: Callable[[], T]) -> T:
        """What `work()` gives: of the first process, then of each of the others, which finds what the first has left.

        Raises:
          PeerLost: the first has not come to an end, nor shown that it works.
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
        """`work(place, of, beat)` of each process that means the same by it; what they did, when all is done.

        Args:
          sign: of what is to be done. Processes with another sign do not share it with this one.
          work: does the part `place` of `of`; calls `beat()` now and then, so that the others wait for it.

        Raises:
          PeerLost: a process has not come to an end, nor shown that it works.
        """
        if count() == 1:
            return [work(0, 1, heartbeat)]
        key, client = _new_key(f"{self.key}/{what}"), jax_state().client
        client.key_value_set(f"{key}/sign/{index()}", sign)
        signs = _gather(f"{key}/sign", self.members)
        mates = [i for i in self.members if signs[i] == sign]
        if len(mates) < len(self.members) and index() == mates[0]:
            log.warning(
                "%s: not every process has the same rows (a file may have another date), and each does this by itself",
                what,
            )
        done = work(mates.index(index()), len(mates), heartbeat)
        client.key_value_set(f"{key}/done/{index()}", str(done))
        found = _gather(f"{key}/done", mates)
        return [int(found[i]) for i in mates]


def process_group(folder: Path) -> ProcessGroup:
    """The processes that have the same folder under this name, found by what each leaves in it. All call it.

    Raises:
      PeerLost: one has not come in time.
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
    return ProcessGroup(f"team-{nonce}-{members[0]}", members)


def connected(seen: list[list[int]]) -> list[tuple[int, ...]]:
    """The group of each process, if it sees these: whoever sees another is with it, though it be seen later.

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


_last_beat = [0.0]


def heartbeat() -> None:
    """Show that this process works, every few seconds however often it is called: those who wait for it wait on."""
    if count() > 1 and time.monotonic() - _last_beat[0] > BEAT:
        _last_beat[0] = time.monotonic()
        jax_state().client.key_value_set(f"{_BEATS}{index()}", str(_last_beat[0]), allow_overwrite=True)


@contextmanager
def working() -> Iterator[None]:
    """Beat while something is done that has no time for it: a file is read, or a model is fetched."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(BEAT):
            try:
                heartbeat()
            except Exception:
                return  # process 0 is gone; jax says so

    thread = threading.Thread(target=run, name="beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _gather(key: str, processes: Iterable[int], seconds: float | None = None) -> dict[int, str]:
    """What these processes, at least, have set under `key`: it is waited for as long as one that is missing works, and
    `seconds` (default: STILL) more.
    """
    client, processes, seconds = jax_state().client, list(processes), seconds or STILL
    pause, heard, since = 0.01, None, time.monotonic()
    while True:
        found = {int(k.rsplit("/", 1)[1]): v for k, v in client.key_value_dir_get(key + "/")}
        missing = [i for i in processes if i not in found]
        if not missing:
            return found
        beats = dict(client.key_value_dir_get(_BEATS))
        now = {i: beats.get(f"{_BEATS}{i}") for i in missing}
        if now != heard:
            heard, since = now, time.monotonic()
        elif time.monotonic() - since > seconds:
            who = ", ".join(map(str, missing))
            raise PeerLost(
                f"process {who} did not come to '{key}' within {seconds:.0f} s, nor showed that it works.\n"
                + how_to_go_on()
            )
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
        raise PeerLost(f"{who} did not come to '{key}' within {seconds:.0f} s.\n{how_to_go_on()}") from error
