"""What comes before a command's own work: its arguments, the platform, the other processes of a training run."""

import ctypes
import importlib.util
import logging
import os
import shlex
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from jtune.cli.faults import report_fault
from jtune.cli.interrupt import repeated_interrupt
from jtune.secrets import words_to_show

if TYPE_CHECKING:
    from jtune.config import Config


def load(words: Sequence[str], command: str) -> "Config":
    """The arguments of a run, and the platform chosen before jax looks for devices.

    Raises:
      ConfigError: an argument is wrong (see `jtune.config.load_config`).
    """
    from jtune.config import load_config

    config = load_config(words, command=command)
    if config.training.use_cpu:
        import jax

        jax.config.update("jax_platforms", "cpu")
    return config


def start_training(words: Sequence[str]) -> None:
    """Join the other processes of the run, read the arguments, train.

    The processes connect before anything else, so that a fault of one host, be it in its YAML, ends the others too.
    """
    with repeated_interrupt():
        from jtune.distributed import connect, shutdown

        shown, left_out = words_to_show([*words, *simulated_layout()])
        connect.connect(command=shlex.join(["jtune", "train", *shown]), without=left_out)
    connect.quiet(logging.getLogger("jtune"))
    # `repeated_interrupt` is the inner block: nothing may interrupt the way out of `together`.
    with shutdown.together(partial(report_fault, "train")), repeated_interrupt():
        config = load(words, "train")
        if only_cpus(config.training.use_cpu):
            keep_freed_memory()
        from jtune.commands.train import train
        from jtune.train.files import full_disk_explained

        with full_disk_explained():
            train(config)


def simulated_layout() -> list[str]:
    """The words that asked for this process, if it is one of those of `--simulate`."""
    layout = os.environ.get("JTUNE_SIMULATED")
    return ["--simulate", layout] if layout else []


def only_cpus(use_cpu: bool) -> bool:
    """Whether jax will find CPUs only. Asking jax itself would start its threads."""
    plugins = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return use_cpu or os.environ.get("JAX_PLATFORMS") == "cpu" or not plugins


def keep_freed_memory() -> None:
    """Let malloc keep what XLA frees on CPUs, because the next update takes as much again.

    glibc returns large arrays to the system at once, and the system zeroes their pages in every update: a tenth of the
    time. Call it before XLA starts its threads. Other allocators than glibc's are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_max, trim_threshold, arena_max = -4, -1, -8  # their numbers in malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(arena_max, 1)  # a second arena would map what it is too small for after all
