"""Metrics for TensorBoard."""

from pathlib import Path

from jtune.train.callbacks.tags import numbers, tag
from jtune.train.events import Event, Subscriber


def tensorboard(log_dir: Path) -> Subscriber:
    """Write every number of every record to TensorBoard, under Trainer's tags (`train/loss`, `eval/loss`)."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(log_dir))

    def subscriber(event: Event) -> None:
        if event.kind in ("log", "evaluate"):
            for key, value in numbers(event.record).items():
                if key != "epoch":
                    writer.add_scalar(tag(key), value, event.step)
        if event.kind == "train_end":
            writer.close()

    return subscriber
