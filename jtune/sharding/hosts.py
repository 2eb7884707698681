"""Several processes as one program: how they find each other, agree on something, and leave together.

Everything here but `agreement` and `whole` goes through jax's coordination service, a small key-value store that
process 0 serves, and not through collectives of the devices: it needs no compiled program, has timeouts, and can say
who is missing. In one process all of it is free, and nothing is connected.
"""

import ctypes
import importlib.util
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jtune.errors import ConfigError, DataError, JtuneError, PeerLost

log = logging.getLogger("jtune")
T = TypeVar("T")

PORT = 29500  # of the coordinator where only MASTER_ADDR is given, as torchrun has it
ANSWER = 4.0  # seconds in which a process that lives answers a roll call, or stops by itself for the same reason
DAY = 24 * 3600.0
# Left by a process on its way out, read by the threads that keep watch.
_LEFT, _CALL, _HERE = "jtune/watch/left/", "jtune/watch/call", "jtune/watch/here/"
_LOSS = re.compile(
    r"gloo|connection (reset|closed|refused)|socket closed|UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat|"
    r"coordination ?service|barrier|task.*(unhealthy|died)",
    re.IGNORECASE,
)

_leaving = threading.Lock()  # whoever holds it ends this process
_ending: list[tuple[str, int]] = []  # with this message and this status
_finished = threading.Event()  # nothing is left that another process could end
_used: Counter[str] = Counter()  # names of exchanges: every key is used once
_command = "the same command"


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


def connect(address: Address | None = None, *, command: str = "", wait: int | None = None, lost: int | None = None):
    """Join the other processes, if there are any. To be called once, before anything asks jax for its devices.

    Args:
      address: default: what the environment says (`find_address`), or what jax finds out (`in_cluster`).
      command: what was typed, for the message that says how to go on.
      wait: seconds in which all must have come; default: JTUNE_INIT_TIMEOUT, or 300.
      lost: seconds without a sign of life after which a process counts as lost; default: JTUNE_HEARTBEAT_TIMEOUT,
        or 60.

    Raises:
      ConfigError: the address makes no sense.
      DataError: it cannot be listened on.
    """
    global _command
    address = address or find_address(os.environ)
    if address is None and not in_cluster(os.environ):
        return
    import jax

    _command = command or _command
    wait = wait or int(os.environ.get("JTUNE_INIT_TIMEOUT", 300))
    lost = lost or int(os.environ.get("JTUNE_HEARTBEAT_TIMEOUT", 60))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself; see `agreement`
    where: dict[str, Any] = {}
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
    _on_abort(
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
    _on_abort(
        f"process {index()} of {count()} was aborted by jax, most often because another has died (see above).\n"
        + _how_to_go_on(),
        PeerLost.exit_code,
    )


def index() -> int:
    """This process's number, from 0."""
    return _jax_state().process_id


def count() -> int:
    """How many processes the program has."""
    return _jax_state().num_processes


def is_first() -> bool:
    """Whether this is process 0, which writes files and talks to the user."""
    return index() == 0


def _jax_state() -> Any:
    # jax.process_index() starts the devices; this is known before.
    from jax._src.distributed import global_state

    return global_state


# ---------------------------------------------------------------------- agreeing, on the host


def exchange(name: str, value: str, *, seconds: float = 600) -> list[str]:
    """Every process's `value`, in their order. All call it, in the same order of names.

    Raises:
      PeerLost: one has not come in time.
    """
    if count() == 1:
        return [value]
    key = _new_key(name)
    client = _jax_state().client
    client.key_value_set(f"{key}/{index()}", value)
    _wait(key, seconds)
    found = {int(k.rsplit("/", 1)[1]): v for k, v in client.key_value_dir_get(key + "/")}
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
    key, client = _new_key(name), _jax_state().client
    if is_first():
        value = make()
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(key, int(DAY * 1000)))


def in_turn(work: Callable[[bool], T], cache: Path) -> T:
    """`work(first)` on every process, in two turns where processes share the folder `cache`: one does it and leaves
    its results there, then the others find them. Those who share nothing do not wait for each other.

    Nobody waits in a collective of the devices meanwhile, which would give up before a large data set is encoded.
    """
    if count() == 1:
        return work(True)
    key = _new_key("turn")
    cache.mkdir(parents=True, exist_ok=True)
    nonce = from_first("nonce", lambda: os.urandom(8).hex())
    mark = lambda process: cache / f".turn-{nonce}-{process}"
    mark(index()).touch()
    barrier("marks")
    leader = next(i for i in range(count()) if mark(i).exists())
    barrier("marks seen")
    mark(index()).unlink(missing_ok=True)
    client = _jax_state().client
    if leader != index():
        client.blocking_key_value_get(f"{key}/{leader}", int(DAY * 1000))
    result = work(leader == index())
    client.key_value_set(f"{key}/{index()}", "done")
    return result


def _new_key(name: str) -> str:
    _used[name] += 1
    return f"jtune/{name}/{_used[name]}"


def _wait(key: str, seconds: float) -> None:
    try:
        _jax_state().client.wait_at_barrier(key.replace("/", "-"), int(seconds * 1000))
    except Exception as error:
        missing = re.search(r"timed out task names:\s*([\d\s,]+)", str(error))
        who = f"process {', '.join(missing[1].split())}" if missing else "another process"
        raise PeerLost(f"{who} did not come to '{key}' within {seconds:.0f} s.\n{_how_to_go_on()}") from error


# ---------------------------------------------------------------------- arrays over several processes


def put(x: Any, sharding: Any) -> Any:
    """`x`, which every process has whole, as an array of this sharding; each process gives its own devices' parts."""
    import jax
    import numpy as np

    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return x if x.sharding.is_equivalent_to(sharding, x.ndim) else _placed(sharding)(x)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def put_rows(x: Any, first: int, shape: tuple[int, ...], axis: int, sharding: Any) -> Any:
    """An array of `shape`, of which this process has only the rows along `axis` from `first` on."""
    import jax

    return jax.make_array_from_callback(shape, sharding, lambda part: x[shifted(part, first, shape, axis)])


def shifted(part: Any, first: int, shape: tuple[int, ...], axis: int) -> tuple[slice, ...]:
    """Where `part` of an array of `shape` is in what begins at row `first` of it.

    >>> shifted((slice(None), slice(6, 8)), 4, (3, 8), axis=1)
    (slice(None, None, None), slice(2, 4, None))
    """
    start, stop, _ = part[axis].indices(shape[axis])
    return (*part[:axis], slice(start - first, stop - first), *part[axis + 1 :])


def own_rows(sharding: Any, shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """From which row along `axis` up to which this process's devices need any."""
    parts = sharding.addressable_devices_indices_map(shape).values()
    return span([part[axis] for part in parts], shape[axis])


def span(parts: list[slice], size: int) -> tuple[int, int]:
    """The smallest range that holds all `parts` of `size` rows.

    >>> span([slice(2, 4), slice(0, 2), slice(2, 4)], 8), span([slice(None)], 8)
    ((0, 4), (0, 8))
    """
    bounds = [part.indices(size)[:2] for part in parts]
    return min(start for start, _ in bounds), max(stop for _, stop in bounds)


def whole(x: Any, at: tuple[int, ...] = ()) -> Any:
    """`x[at]` where this process can read all of it. All processes call it, as their devices send their parts.

    One layer at a time: a stack of layers may be larger than a device.
    """
    import jax
    import numpy as np

    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x[at] if at else x
    sharding: Any = x.sharding
    piece = _gather(sharding.mesh)(x, *(np.int32(i) for i in at))
    piece.block_until_ready()  # or whoever does not write would ask for all of them at once
    return piece


def agreement(mesh: Any) -> Callable[[bool], bool]:
    """`agree(mine)`: whether any process said True. All call it once for every update, and get the same answer.

    The answer is that of the update before: a small sum over all devices, dispatched and read like the metrics of the
    step, so nobody waits for it. In one process it is what was said.
    """
    if count() == 1:
        return bool
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    split = NamedSharding(mesh, P(mesh.axis_names))
    flags = [put(np.full(mesh.size, value, np.int32), split) for value in (0, 1)]
    any_of = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
    asked: deque[Any] = deque()

    def agree(mine: bool) -> bool:
        asked.append(any_of(flags[mine]))
        return len(asked) > 1 and bool(np.asarray(asked.popleft()))

    return agree


_jitted: dict[Any, Any] = {}


def _placed(sharding: Any) -> Any:
    import jax

    return _jitted.setdefault(sharding, jax.jit(lambda x: x, out_shardings=sharding))


def _gather(mesh: Any) -> Any:
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    return _jitted.setdefault(mesh, jax.jit(lambda x, *at: x[at], out_shardings=NamedSharding(mesh, P())))


# ---------------------------------------------------------------------- leaving


@contextmanager
def together(explain: Callable[[BaseException], int]) -> Iterator[None]:
    """What all processes do; if one fails, the others are told and end too, with the exit status of the cause.

    A process that dies without a word is noticed by the error of a collective that it was part of, or by jax, which
    misses its heartbeat and aborts: exit status 70 either way.

    Args:
      explain: prints an error, and gives the exit status that it stands for.
    """
    if count() == 1:
        yield
        return
    threading.Thread(target=_watch, args=(explain,), name="watch", daemon=True).start()
    try:
        yield
    except BaseException as error:
        _leave(_cause(error), explain)
    barrier("done")
    _finished.set()
    import jax

    jax.distributed.shutdown()


def _watch(explain: Callable[[BaseException], int]) -> None:
    """Answer roll calls, and end this process when another has failed: its main thread may wait for it for ever."""
    client = _jax_state().client
    while not _finished.wait(1.0):
        try:
            seen = dict(client.key_value_dir_get("jtune/watch/"))
            if _CALL in seen and f"{_HERE}{index()}" not in seen:
                client.key_value_set(f"{_HERE}{index()}", "here")
        except Exception:
            continue  # jax notices as well, and aborts
        failed = _failure(seen)
        if failed is not None and not _finished.wait(ANSWER):
            _leave(failed, explain)


def _failure(seen: Mapping[str, str]) -> PeerLost | None:
    """What another process has failed of, if one has; the first cause, not what followed from it."""
    left = {int(key.removeprefix(_LEFT)): json.loads(value) for key, value in seen.items() if key.startswith(_LEFT)}
    # A run that was stopped and has saved (75) is no failure: all end at the same update.
    failed = {i: x for i, x in left.items() if i != index() and x["code"] not in (0, 75)}
    if not failed:
        return None
    own = {i: x for i, x in failed.items() if x["code"] != PeerLost.exit_code}
    process, said = min((own or failed).items())
    error = PeerLost(said["message"] if not own else f"process {process} stopped: {said['message']}")
    error.exit_code = said["code"]
    return error


def _cause(error: BaseException) -> BaseException:
    """`error`, or what it follows from: that another process has failed, or is gone."""
    if isinstance(error, PeerLost) or not _is_loss(error):
        return error
    client = _jax_state().client
    try:
        client.key_value_set(_CALL, "who is there?", allow_overwrite=True)
        end = time.monotonic() + ANSWER
        seen: dict[str, str] = {}
        while time.monotonic() < end:
            seen = dict(client.key_value_dir_get("jtune/watch/"))
            failed = _failure(seen)
            if failed is not None:
                return failed
            time.sleep(0.2)
        gone = [i for i in range(count()) if i != index() and f"{_HERE}{i}" not in seen]
    except Exception:
        gone = [0]  # it served the store
    if not gone and isinstance(error, JtuneError):
        return error
    reason = " ".join(str(error).split())[:200]
    who = f"process {', '.join(map(str, gone))} of {count()} is gone" if gone else "a connection has broken"
    return PeerLost(f"{who} ({reason}).\n{_how_to_go_on()}")


def _is_loss(error: BaseException | None) -> bool:
    while error is not None:
        if not isinstance(error, KeyboardInterrupt | MemoryError) and _LOSS.search(f"{type(error).__name__} {error}"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _how_to_go_on() -> str:
    return f"What is saved is whole. To go on from the last checkpoint, start it again on every host: {_command}"


def _leave(error: BaseException, explain: Callable[[BaseException], int]) -> None:
    """End this process, the others told why. Does not return: jax, on its way out, would wait for those that failed."""
    if not _leaving.acquire(blocking=False):
        time.sleep(60)  # another thread is at it
    client = _jax_state().client
    message = str(error) or type(error).__name__
    code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
    _ending.append((message, code))
    try:
        client.key_value_set(f"{_LEFT}{index()}", json.dumps({"code": code, "message": message}))
        # Process 0 speaks for all that fail in the same way, and goes last, as it serves the store.
        end = time.monotonic() + ANSWER + 2
        left: dict[str, str] = {}
        while time.monotonic() < end and len(left) < count() and (is_first() or f"{_LEFT}0" not in left):
            left = dict(client.key_value_dir_get(_LEFT))
            time.sleep(0.1)
        said = not is_first() and json.loads(left.get(f"{_LEFT}0", "{}")).get("message") == message
    except Exception:
        said = False
    if not said:
        try:
            explain(error)
        except BaseException:
            traceback.print_exc()
    if is_first():
        time.sleep(0.5)
    _exit(code)


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_keep: list[Any] = []  # a callback that C holds must not be collected


def _on_abort(message: str, code: int) -> None:
    """Say `message` and exit with `code` where jax would abort.

    When a process is lost, and when not all come, jax 0.10 calls abort() from a thread of its own; the callback that it
    has for this cannot be written in Python (std::bad_cast). A handler set with `signal.signal` would never run either,
    as the main thread may be waiting for a device; one that C calls runs in the thread that aborts.
    """

    def handler(_: int) -> None:
        said, status = message, code
        if not _leaving.acquire(blocking=False):
            # Another thread is ending this process, and may wait for an answer that this one, of jax, would give.
            time.sleep(2)
            said, status = _ending[0] if _ending else (said, status)
        print(f"jtune: {said}", file=sys.stderr)
        _exit(status)

    libc = ctypes.CDLL(None)
    kept = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(kept, ctypes.c_void_p))
    _keep.append(kept)


def quiet(logger: logging.Logger) -> None:
    """On all processes but the first: only warnings, with the process's number before them."""
    if is_first():
        return
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        handler.setFormatter(_Numbered(handler.formatter, index()))


class _Numbered(logging.Formatter):
    def __init__(self, inner: logging.Formatter | None, process: int):
        super().__init__()
        self.format = partial(self._numbered, inner or logging.Formatter("%(message)s"), process)

    @staticmethod
    def _numbered(inner: logging.Formatter, process: int, record: logging.LogRecord) -> str:
        return "\n".join(f"[process {process}] {line}" for line in inner.format(record).splitlines())
