"""Shutdown of several processes: when one fails, all end together, with the exit status of the cause."""

import ctypes
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from jtune.distributed.command import how_to_go_on
from jtune.distributed.exchange import barrier
from jtune.distributed.processes import count, index, is_first, jax_state
from jtune.errors import JtuneError, PeerLost

ANSWER = 4.0  # seconds in which a live process answers a roll call, or stops itself for the same reason
LAST = 5.0  # seconds that a process may still work after it has reported its failure
# A process sets these keys when it ends; the watching threads of the others read them.
_LEFT, _CALL, _HERE = "jtune/watch/left/", "jtune/watch/call", "jtune/watch/here/"
# Words of errors that may follow from a lost process: errors of gloo, grpc, and jax's coordination service.
_LOSS = re.compile(
    r"gloo|connection (reset|closed|refused)|socket closed|UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat|"
    r"coordination ?service|barrier|task.*(unhealthy|died)",
    re.IGNORECASE,
)

log = logging.getLogger("jtune")
_shutdown = threading.Lock()  # the thread that holds it ends this process
_ending: list[tuple[str, int]] = []  # the message and the status with which it ends
_told = threading.Event()  # this process has told the others that it ends, and why
_finished = threading.Event()  # the work is done: a failure of another process no longer matters


@contextmanager
def together(explain: Callable[[BaseException], int]) -> Iterator[None]:
    """Run the block on all processes. If one fails, it tells the others, and all end with the exit status of the cause.

    A process may also die without telling the others. Then a collective of theirs fails, or jax misses its heartbeat
    and aborts; the exit status is 70 in both cases.

    Args:
      explain: prints an error, and returns its exit status.
    """
    if count() == 1:
        yield
        return
    threading.Thread(target=_watch, args=(explain,), name="watch", daemon=True).start()
    try:
        yield
    except BaseException as error:
        _end_process(_cause(error), explain)
    barrier("done")
    _finished.set()
    import jax

    jax.distributed.shutdown()


def _watch(explain: Callable[[BaseException], int]) -> None:
    """Answer roll calls, and end this process when another has failed: the main thread may wait for it forever."""
    client = jax_state().client
    while not _finished.wait(1.0):
        try:
            seen = dict(client.key_value_dir_get("jtune/watch/"))
            if _CALL in seen and f"{_HERE}{index()}" not in seen:
                client.key_value_set(f"{_HERE}{index()}", "here")
        except Exception:
            continue  # jax notices it as well, and aborts
        failed = _failure(seen)
        if failed is None or _finished.wait(ANSWER):
            continue
        if _told.is_set():  # this process fails too, and is about to end
            _finished.wait(LAST)
        _end_process(failed, explain)


def tell(error: BaseException) -> None:
    """Tell the other processes that this one ends, and why. They end too, so do not wait for them afterwards.

    Code that catches an error and then cleans up calls this first. In one process it does nothing.
    """
    if count() == 1 or _told.is_set():
        return
    _told.set()
    report = {"code": _status(error), "message": str(error) or type(error).__name__}
    with suppress(Exception):  # process 0, which serves the store, may be gone
        jax_state().client.key_value_set(f"{_LEFT}{index()}", json.dumps(report))


def last_work(error: BaseException, work: Callable[[], None]) -> None:
    """Do `work` although `error` ends the run. In one process it may take as long as it needs.

    Of several processes, this one first tells the others about the error; then `work`, which may wait for them, has
    `LAST` seconds. After the loss of a process there is no time, and `work` is skipped. Errors of `work` are logged.
    """

    def attempt() -> None:
        try:
            work()
        except Exception as second:
            if str(second) != str(error):
                log.warning("%s", second)

    if count() == 1:
        attempt()
    elif not isinstance(error, PeerLost) and not _is_loss(error):
        tell(error)
        thread = threading.Thread(target=attempt, name="last work", daemon=True)
        thread.start()
        thread.join(LAST)


def _status(error: BaseException) -> int:
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)


def _failure(seen: Mapping[str, str]) -> PeerLost | None:
    """The failure of another process, if one has failed: the first cause, not its consequences."""
    left = {int(key.removeprefix(_LEFT)): json.loads(value) for key, value in seen.items() if key.startswith(_LEFT)}
    # A run that was stopped and has saved (75) has not failed: all processes end at the same update.
    failed = {i: x for i, x in left.items() if i != index() and x["code"] not in (0, 75)}
    if not failed:
        return None
    own = {i: x for i, x in failed.items() if x["code"] != PeerLost.exit_code}
    process, report = min((own or failed).items())
    error = PeerLost(report["message"] if not own else f"process {process} stopped: {report['message']}")
    error.exit_code = report["code"]
    return error


def _cause(error: BaseException) -> BaseException:
    """`error`, or its cause: another process has failed or is gone."""
    if isinstance(error, PeerLost) or not _is_loss(error):
        return error
    client = jax_state().client
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
        gone = [0]  # process 0 served the store
    if not gone and isinstance(error, JtuneError):
        return error
    reason = " ".join(str(error).split())[:200]
    who = f"process {', '.join(map(str, gone))} of {count()} is gone" if gone else "a connection is broken"
    return PeerLost(f"{who} ({reason}).\n{how_to_go_on()}")


def _is_loss(error: BaseException | None) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # an error may be its own indirect cause
        seen.add(id(error))
        if not isinstance(error, KeyboardInterrupt | MemoryError) and _LOSS.search(f"{type(error).__name__} {error}"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _end_process(error: BaseException, explain: Callable[[BaseException], int]) -> None:
    """Tell the others, and end this process without returning: a normal exit of jax would wait for failed processes."""
    if not _shutdown.acquire(blocking=False):
        time.sleep(60)  # another thread ends this process
    client = jax_state().client
    message, code = str(error) or type(error).__name__, _status(error)
    _ending.append((message, code))
    try:
        tell(error)
        # Process 0 prints the message for all that fail in the same way. It ends last, because it serves the store.
        end = time.monotonic() + ANSWER + 2
        left: dict[str, str] = {}
        while time.monotonic() < end and len(left) < count() and (is_first() or f"{_LEFT}0" not in left):
            left = dict(client.key_value_dir_get(_LEFT))
            time.sleep(0.1)
        printed = not is_first() and json.loads(left.get(f"{_LEFT}0", "{}")).get("message") == message
    except Exception:
        printed = False
    if not printed:
        try:
            explain(error)
        except BaseException:
            with suppress(OSError, ValueError):
                traceback.print_exc()
    if is_first():
        time.sleep(0.5)
    _exit(code)


def _exit(code: int) -> None:
    try:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a full disk may hold the log as well
                stream.flush()
    finally:
        os._exit(code)


_keep: list[Any] = []  # a callback that C holds must not be collected


def on_abort(message: str, code: int) -> None:
    """Print `message` and exit with `code` where jax would abort.

    When a process is lost, or does not connect, jax 0.10 calls abort() from a thread of its own; its callback for this
    case cannot be written in Python (std::bad_cast). A handler of `signal.signal` would never run either, because the
    main thread may wait for a device. A handler that C calls runs in the thread that aborts.
    """

    def handler(_: int) -> None:
        text, status = message, code
        if not _shutdown.acquire(blocking=False):
            # Another thread ends this process, and may wait for an answer from this thread, which is jax's.
            time.sleep(2)
            text, status = _ending[0] if _ending else (text, status)
        with suppress(OSError, ValueError):
            print(f"jtune: {text}", file=sys.stderr)
        _exit(status)

    libc = ctypes.CDLL(None)
    kept = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(kept, ctypes.c_void_p))
    _keep.append(kept)
