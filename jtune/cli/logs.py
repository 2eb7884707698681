"""Log lines of a command: jtune's own, plain; those of libraries only when something is wrong."""

import logging
import os
import sys
from typing import TextIO

from jtune.secrets import redact


class PlainLines(logging.Formatter):
    """A record as its message without secrets, after `warning: ` where it is one."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return redact(prefix + super().format(record))


def set_up_logging(stream: TextIO | None) -> None:
    """Write jtune's log lines to `stream`, and keep the libraries quiet."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PlainLines("%(message)s"))
    logger = logging.getLogger("jtune")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.raiseExceptions = False  # a line that a full disk does not take is no reason for a traceback
    for library in ("absl", "asyncio"):  # their background threads log what they also raise
        logging.getLogger(library).setLevel(logging.CRITICAL)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns, and hangs, when datasets forks after use
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
