"""A trace of some updates."""

import logging
from pathlib import Path

import jax

from jtune.train.events import Event, Subscriber

log = logging.getLogger("jtune")


def profile(folder: Path, first: int, last: int, start_step: int) -> Subscriber:
    """Trace the updates from `first` to `last`, for TensorBoard (Profile) and Perfetto.

    The host is ahead of the devices: the trace ends when the metrics of `last` have been read, two updates later. That
    nothing was traced, as the run has no such updates, is said.
    """
    tracing = traced = False
    begin = max(first - 1, start_step)

    def subscriber(event: Event) -> None:
        nonlocal tracing, traced
        if begin < last and not traced and event.step == begin and event.kind in ("train_begin", "step"):
            jax.profiler.start_trace(folder)
            tracing = traced = True
        elif tracing and (event.kind == "train_end" or (event.kind == "step" and event.step >= last + 2)):
            jax.profiler.stop_trace()
            tracing = False
            log.info(
                "profile of updates %d to %d: tensorboard --logdir %s (with tensorboard-plugin-profile), or "
                "the trace.json.gz in it at ui.perfetto.dev",
                first,
                last,
                folder,
            )
        elif event.kind == "train_end" and not traced:
            log.warning("profile_steps: no update from %d to %d was done, nothing was traced", first, last)

    return subscriber
