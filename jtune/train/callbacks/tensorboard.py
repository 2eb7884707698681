"""Metrics for TensorBoard."""

import logging
from pathlib import Path

from jtune.train.events import Event, Subscriber

log = logging.getLogger("jtune")

# Fields of a log record that are counts and times of jtune's own; Trainer's records do not have them.
_NOT_PLOTTED = ("step", "epoch")


def tensorboard(log_dir: Path) -> Subscriber:
    """Write every number of every record to TensorBoard, under Trainer's tags (`train/loss`, `eval/loss`)."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(log_dir))

    def subscriber(event: Event) -> None:
        if event.kind in ("log", "evaluate"):
            for key, value in event.record.items():
                if key not in _NOT_PLOTTED and isinstance(value, int | float):
                    tag = "eval/" + key.removeprefix("eval_") if key.startswith("eval_") else "train/" + key
                    writer.add_scalar(tag, value, event.step)
        if event.kind == "train_end":
            writer.close()

    return subscriber
