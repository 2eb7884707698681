"""How several processes end: all together, with the exit status of the cause, whatever has happened to one of them."""

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

ANSWER = 4.0  # seconds in which a process that lives answers a roll call, or stops by itself for the same reason
LAST = 5.0  # seconds that a process which has failed, and has told so, may still work
# Left by a process on its way out, read by the threads that keep watch.
_LEFT, _CALL, _HERE = "jtune/watch/left/", "jtune/watch/call", "jtune/watch/here/"
# Words of errors that may follow from the loss of a process: gloo's, grpc's, and those of jax's coordination service.
_LOSS = re.compile(
    r"gloo|connection (reset|closed|refused)|socket closed|UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat|"
    r"coordination ?service|barrier|task.*(unhealthy|died)",
    re.IGNORECASE,
)

log = logging.getLogger("jtune")
_leaving = threading.Lock()  # whoever holds it ends this process
_ending: list[tuple[str, int]] = []  # with this message and this status
_told = threading.Event()  # this process has told the others that it ends, and why
_finished = threading.Event()  # nothing is left that another process could end


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
    client = jax_state().client
    while not _finished.wait(1.0):
        try:
            seen = dict(client.key_value_dir_get("jtune/watch/"))
            if _CALL in seen and f"{_HERE}{index()}" not in seen:
                client.key_value_set(f"{_HERE}{index()}", "here")
        except Exception:
            continue  # jax notices as well, and aborts
        failed = _failure(seen)
        if failed is None or _finished.wait(ANSWER):
            continue
        if _told.is_set():  # it fails too, and is about to leave
            _finished.wait(LAST)
        _leave(failed, explain)


def tell(error: BaseException) -> None:
    """Tell the other processes that this one ends, and why. They end too, so nothing that waits for them may follow.

    Whoever catches an error and then cleans up calls this first. In one process it does nothing.
    """
    if count() == 1 or _told.is_set():
        return
    _told.set()
    said = {"code": _status(error), "message": str(error) or type(error).__name__}
    with suppress(Exception):  # process 0, which serves the store, may be gone
        jax_state().client.key_value_set(f"{_LEFT}{index()}", json.dumps(said))


def last_work(error: BaseException, work: Callable[[], None]) -> None:
    """Do `work` though `error` ends the run. In one process it takes the time it needs.

    With other processes, they are told of the error first, and `work`, which may wait for them, gets `LAST` seconds. An
    error that follows from the loss of a process leaves no time: `work` is not done. What `work` raises is logged.
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
        gone = [0]  # it served the store
    if not gone and isinstance(error, JtuneError):
        return error
    reason = " ".join(str(error).split())[:200]
    who = f"process {', '.join(map(str, gone))} of {count()} is gone" if gone else "a connection has broken"
    return PeerLost(f"{who} ({reason}).\n{how_to_go_on()}")


def _is_loss(error: BaseException | None) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # an error raised from one that it has caused is a circle
        seen.add(id(error))
        if not isinstance(error, KeyboardInterrupt | MemoryError) and _LOSS.search(f"{type(error).__name__} {error}"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _leave(error: BaseException, explain: Callable[[BaseException], int]) -> None:
    """End this process, the others told why. Does not return: jax, on its way out, would wait for those that failed."""
    if not _leaving.acquire(blocking=False):
        time.sleep(60)  # another thread is at it
    client = jax_state().client
    message, code = str(error) or type(error).__name__, _status(error)
    _ending.append((message, code))
    try:
        tell(error)
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
            with suppress(OSError, ValueError):
                traceback.print_exc()
    if is_first():
        time.sleep(0.5)
    _exit(code)


def _exit(code: int) -> None:
    try:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # the disk that is full may hold the log as well
                stream.flush()
    finally:
        os._exit(code)


_keep: list[Any] = []  # a callback that C holds must not be collected


def on_abort(message: str, code: int) -> None:
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
        with suppress(OSError, ValueError):
            print(f"jtune: {said}", file=sys.stderr)
        _exit(status)

    libc = ctypes.CDLL(None)
    kept = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(kept, ctypes.c_void_p))
    _keep.append(kept)
