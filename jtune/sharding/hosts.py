"""Several processes as one program: how they find each other, and how they agree on something.

Agreeing goes through jax's coordination service, a small key-value store that process 0 serves, and not through
collectives of the devices: it needs no compiled program, has timeouts, and can say who is missing. In one process all
of this is free, and nothing is connected. How they leave: `jtune.sharding.leaving`; their arrays: `spread`.
"""

import importlib.util
import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jtune.errors import ConfigError, DataError, PeerLost

log = logging.getLogger("jtune")

T = TypeVar("T")

PORT = 29500  # of the coordinator where only MASTER_ADDR is given, as torchrun has it
DAY = 24 * 3600.0
STILL = 600.0  # seconds that others wait for a process that does not show that it works (`beat`)
BEAT = 2.0  # seconds between two such signs, at least
SEEN_WITHIN = 2.0  # seconds in which a folder that processes share shows them a new file

_BEATS = "jtune/beat/"
_used: Counter[str] = Counter()  # names of exchanges: every key is used once
_command = "the same command"
_without: list[str] = []  # secrets among its arguments, which it is shown without
_besides: list[str] = []  # words that it needs to go on with what this run has saved


# ---------------------------------------------------------------------- finding each other


class Address(NamedTuple):
    """Where a process belongs."""

    coordinator: str  # host:port that process 0 listens on
    processes: int
    process: int


def find_address(env: Mapping[str, str]) -> Address | None:
    """What the environment says, in jtune's names or in LLaMA-Factory's; None: nothing, or that there is one process.

    >>> find_address({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"})
    Address(coordinator='10.0.0.1:29500', processes=2, process=1)

    Raises:
      ConfigError: it is said in part, or not in numbers.
    """
    names = ("JTUNE_COORDINATOR", "JTUNE_NUM_PROCESSES", "JTUNE_PROCESS_ID")
    given = {name: env[name] for name in names if env.get(name)}
    if given:
        if len(given) < len(names):
            missing = ", ".join(name for name in names if name not in given)
            raise ConfigError(
                f"{', '.join(given)} is set, but not {missing}: each process of a run needs the address of process 0 "
                "(host:port), the number of processes, and its own number, from 0"
            )
        coordinator, count, own = given.values()
    elif env.get("NNODES", "1") != "1":
        if not env.get("MASTER_ADDR") or not env.get("NODE_RANK"):
            missing = ", ".join(name for name in ("MASTER_ADDR", "NODE_RANK") if not env.get(name))
            raise ConfigError(f"NNODES={env['NNODES']}, but {missing} is not set")
        coordinator = f"{env['MASTER_ADDR']}:{env.get('MASTER_PORT') or PORT}"
        count, own, names = env["NNODES"], env["NODE_RANK"], ("MASTER_ADDR:MASTER_PORT", "NNODES", "NODE_RANK")
    else:
        return None
    if not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise ConfigError(f"{names[0]}={coordinator}: expected host:port of process 0, as in 10.0.0.1:{PORT}")
    for name, value in zip(names[1:], (count, own)):
        if not value.isdecimal():
            raise ConfigError(f"{name}={value}: expected a whole number")
    if int(own) >= int(count):
        raise ConfigError(f"{names[2]}={own}: the numbers of {count} processes are 0 to {int(count) - 1}")
    return Address(coordinator, int(count), int(own)) if int(count) > 1 else None


def in_cluster(env: Mapping[str, str]) -> bool:
    """Whether jax finds the other processes by itself: on a TPU pod, in SLURM, in an indexed Kubernetes job, under MPI.

    Without a sign of these jax is not even imported: one process on one machine starts at once.
    """
    signs = {"SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "OMPI_MCA_ess_base_jobid", "JOB_COMPLETION_INDEX"}
    if not signs & env.keys() and importlib.util.find_spec("libtpu") is None:
        return False
    from jax._src.clusters import ClusterEnv

    for kind in ClusterEnv._cluster_types:
        if "K8s" in kind.__name__ and "JOB_COMPLETION_INDEX" not in env:
            continue  # a pod of its own: jax would look for the job that it belongs to, and fail
        if not kind.opt_in_only_method and kind.is_env_present():
            return kind.get_process_count() > 1
    return False


def own_gpus(env: Mapping[str, str]) -> list[int] | None:
    """Which GPUs of its host a task of SLURM takes: all, where it is alone there. jax would take the first.

    >>> own_gpus({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "2"})
    [0, 1]

    None: as jax has it, one for each task.
    """
    alone = re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if alone and gpus.isdecimal() else None


def connect(
    address: Address | None = None,
    *,
    command: str = "",
    without: Iterable[str] = (),
    wait: int | None = None,
    lost: int | None = None,
):
    """Join the other processes, if there are any. To be called once, before anything asks jax for its devices.

    Args:
      address: default: what the environment says (`find_address`), or what jax finds out (`in_cluster`).
      command: what was typed, for the message that says how to go on.
      without: names of arguments that are not shown in it.
      wait: seconds in which all must have come; default: JTUNE_INIT_TIMEOUT, or 300.
      lost: seconds without a sign of life after which a process counts as lost; default: JTUNE_HEARTBEAT_TIMEOUT,
        or 60.

    Raises:
      ConfigError: the address makes no sense.
      DataError: it cannot be listened on.
    """
    global _command
    _command, _without[:] = command or _command, without
    address = address or find_address(os.environ)
    if address is None and not in_cluster(os.environ):
        return
    import jax

    from jtune.sharding import leaving

    wait = wait or int(os.environ.get("JTUNE_INIT_TIMEOUT", 300))
    lost = lost or int(os.environ.get("JTUNE_HEARTBEAT_TIMEOUT", 60))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself; see `agreement`
    where: dict[str, Any] = {"local_device_ids": own_gpus(os.environ)} if address is None else {}
    if address is not None:
        where = {
            "coordinator_address": address.coordinator,
            "num_processes": address.processes,
            "process_id": address.process,
            "cluster_detection_method": "deactivate",
        }
        host = address.coordinator.rsplit(":", 1)[0]
        if host in ("127.0.0.1", "localhost"):  # not for others: what listens asks for no password
            where["coordinator_bind_address"] = address.coordinator
    who = f"process {address.process} of {address.processes}" if address else "a process of this cluster"
    at = address.coordinator if address else "the address that the cluster gives"
    leaving.on_abort(
        f"{who} waited {wait} s for the others at {at}, and not all have come. Is the command running on every host, "
        "with the same address and number of processes, and can they reach this port? (JTUNE_INIT_TIMEOUT: seconds)",
        DataError.exit_code,
    )
    try:
        jax.distributed.initialize(
            **where, initialization_timeout=wait, heartbeat_timeout_seconds=lost, shutdown_timeout_seconds=60
        )
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{who} could not join the others at {at}: {str(error).splitlines()[0]}") from error
    _expect_abort()


def _expect_abort() -> None:
    from jtune.sharding import leaving

    leaving.on_abort(
        f"process {index()} of {count()} was aborted by jax, most often because another has died (see above).\n"
        + how_to_go_on(),
        PeerLost.exit_code,
    )


def index() -> int:
    """This process's number, from 0."""
    return jax_state().process_id


def count() -> int:
    """How many processes the program has."""
    return jax_state().num_processes


def is_first() -> bool:
    """Whether this is process 0, which writes files and talks to the user."""
    return index() == 0


def jax_state() -> Any:
    # jax.process_index() starts the devices; this is known before.
    from jax._src.distributed import global_state

    return global_state


# ---------------------------------------------------------------------- agreeing, on the host


def exchange(name: str, value: str, *, seconds: float | None = None) -> list[str]:
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


class Team(NamedTuple):
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
            return [work(0, 1, beat)]
        key, client = _new_key(f"{self.key}/{what}"), jax_state().client
        client.key_value_set(f"{key}/sign/{index()}", sign)
        signs = _gather(f"{key}/sign", self.members)
        mates = [i for i in self.members if signs[i] == sign]
        if len(mates) < len(self.members) and index() == mates[0]:
            log.warning(
                "%s: not every process has the same rows (a file may have another date), and each does this by itself",
                what,
            )
        done = work(mates.index(index()), len(mates), beat)
        client.key_value_set(f"{key}/done/{index()}", str(done))
        found = _gather(f"{key}/done", mates)
        return [int(found[i]) for i in mates]


def team(folder: Path) -> Team:
    """The processes that have the same folder under this name, found by what each leaves in it. All call it.

    Raises:
      PeerLost: one has not come in time.
    """
    if count() == 1:
        return Team("", (index(),))
    folder.mkdir(parents=True, exist_ok=True)
    nonce = from_first("nonce", lambda: os.urandom(8).hex())
    marks = [folder / f".host-{nonce}-{i}" for i in range(count())]
    marks[index()].touch()
    exchange("marks", "made")
    end = time.monotonic() + SEEN_WITHIN
    while not all(mark.exists() for mark in marks) and time.monotonic() < end:
        time.sleep(0.1)
    seen = exchange("marks seen", json.dumps([i for i, mark in enumerate(marks) if mark.exists()]))
    marks[index()].unlink(missing_ok=True)
    members = connected([json.loads(x) for x in seen])[index()]
    return Team(f"team-{nonce}-{members[0]}", members)


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


def beat() -> None:
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
                beat()
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


def how_to_go_on() -> str:
    where = "" if "--simulate" in _command else " on every host"
    return f"What is saved is whole. To go on from the last checkpoint, start it again{where}: {command_to_go_on()}"


def command_to_go_on() -> str:
    """The command that goes on with what this run has saved: without secrets, which are named."""
    missing = f"\n(not shown, to be given again: {', '.join(_without)})" if _without else ""
    return " ".join([_command, *_besides]) + missing


def go_on_with(*words: str) -> None:
    """Tell what the command needs besides, from now on, to go on: this run has taken its output folder."""
    _besides[:] = words
    if count() > 1:
        _expect_abort()
