"""`jtune COMMAND CASE.yaml [key=value ...]`: run one command and return its exit status."""

import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import click
from click.shell_completion import shell_complete

from jtune.cli.commands import program
from jtune.cli.faults import report_fault
from jtune.cli.interrupt import repeated_interrupt
from jtune.cli.logs import set_up_logging

COMPLETION = "_JTUNE_COMPLETE"  # the shell's script sets it, to ask for completions


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit status of the process (see `jtune.errors`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if COMPLETION in os.environ:
        return shell_complete(program, {}, "jtune", COMPLETION, os.environ[COMPLETION])
    if not words or words[0] in ("-h", "--help"):
        words[:1] = ["help"]
    set_up_logging(sys.stdout)
    stdin = nullcontext() if words[0] == "chat" else _empty_stdin()
    # chat and train handle Ctrl-C themselves: an answer ends but not the dialogue, a run saves first.
    interrupt = nullcontext() if words[0] in ("chat", "train") else repeated_interrupt()
    try:
        with stdin, interrupt:
            status = _run(words)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            status = 1  # as in `jtune help all | head`
        else:
            status = report_fault(words[0] if words[0] in program.commands else "", error)
    finally:
        _flush()
    trackers = sys.modules.get("jtune.train.callbacks.trackers")
    if trackers is not None and trackers.any_at_work():
        os._exit(status)  # a tracker hangs, and would do so again in what its library has registered for the exit
    return status


def _run(words: list[str]) -> int:
    try:
        with program.make_context("jtune", list(words)) as context:
            return program.invoke(context) or 0
    except click.exceptions.Exit as end:  # --help, --version
        return end.exit_code


@contextmanager
def _empty_stdin() -> Iterator[None]:
    """Replace stdin by an empty one: a library that asks a question gets no answer and does not wait for one."""
    own = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = own


def _flush() -> None:
    """Write out what was printed. If this fails, Python's own flush at exit must not change the exit status."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_is_gone() -> bool:
    """Whether nobody reads stdout any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
