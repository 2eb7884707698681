"""Ctrl-C that ends a command even where a library ignores it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def repeated_interrupt() -> Iterator[None]:
    """Repeat a Ctrl-C until it has ended the block.

    Python drops what a callback raises, jax has a callback for each garbage collection, and imports collect much
    garbage: a single KeyboardInterrupt can be lost. (The training loop has its own handler, which saves.)
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked, over, main = threading.Event(), threading.Event(), threading.get_ident()

    def repeat() -> None:
        while not over.wait(0.3):
            signal.pthread_kill(main, signal.SIGINT)  # also wakes the main thread where it waits

    def handler(signum: int, frame: Any) -> None:
        if not asked.is_set():
            asked.set()
            threading.Thread(target=repeat, name="interrupt", daemon=True).start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGINT, before)
    if asked.is_set():
        raise KeyboardInterrupt  # every one so far was lost
