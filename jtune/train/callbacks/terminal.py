"""Metrics for a person at a terminal: a progress bar, or plain lines."""

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from jtune.train.callbacks.clock import Clock, hours_minutes_seconds
from jtune.train.events import Event, Subscriber

log = logging.getLogger("jtune")
SHOWN = 100  # characters of a prompt that are shown with an answer to it


def describe_sample(line: Mapping[str, str]) -> str:
    """A prompt, what was answered, and what was expected, for a person to look at."""
    prompt, answer, label = (" ".join(line[key].split()) for key in ("prompt", "predict", "label"))
    prompt = prompt if len(prompt) <= SHOWN else f"... {prompt[-SHOWN:]}"
    return f"  {prompt}\n    answer:   {answer[: 2 * SHOWN]}\n    expected: {label[: 2 * SHOWN]}"


def describe_record(record: Mapping[str, Any]) -> str:
    shown = {
        "loss": "loss {:.4f}",
        "skipped_updates": "skipped {}",
        "eval_loss": "eval loss {:.4f}",
        "accuracy": "accuracy {:.2f}",
        "eval_accuracy": "accuracy {:.4f}",
        "rewards/accuracies": "accuracy {:.2f}",
        "eval_rewards/accuracies": "accuracy {:.4f}",
        "rewards/margins": "margin {:.3g}",
        "eval_rewards/margins": "margin {:.3g}",
        "kl": "KL {:.3g}",
        "eval_exact_match": "exact match {:.1%}",
        "eval_bleu-4": "BLEU-4 {:.2f}",
        "eval_rouge-l": "ROUGE-L {:.2f}",
        "grad_norm": "grad norm {:.3g}",
        "learning_rate": "lr {:.3g}",
        "tokens_per_second": "{:,.0f} tok/s",
        "mfu": "MFU {:.1%}",
    }
    return "  ".join(form.format(record[key]) for key, form in shown.items() if record.get(key) is not None)


def progress_lines(start_step: int, out=None) -> Subscriber:
    """One line for each logged record: for log files and pipes, where a bar would be noise."""
    clock = Clock(start_step)
    out = out or sys.stdout

    def show(line: str) -> None:
        with suppress(OSError):  # the file that takes the output is on a full disk, or nobody reads the pipe any more
            print(line, file=out, flush=True)

    def subscriber(event: Event) -> None:
        if event.kind in ("log", "evaluate"):
            width = len(str(event.max_steps))
            left = hours_minutes_seconds(clock.remaining(event.step, event.max_steps))
            show(
                f"step {event.step:>{width}}/{event.max_steps}  epoch {event.epoch:.2f}  "
                f"{describe_record(event.record)}  left {left}"
            )
        for line in event.record.get("samples", ()):
            show(describe_sample(line))

    return subscriber


def progress_bar(start_step: int, max_steps: int) -> Subscriber:
    """A bar with loss, tokens/s and time left; evaluation results are printed above it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("[bold]train"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[latest]}"),
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
    )
    task = bar.add_task("train", total=max_steps, completed=start_step, latest="compiling the first step ...")

    def subscriber(event: Event) -> None:
        if event.kind == "train_begin":
            bar.start()
        if event.kind == "step":  # logs are of earlier updates
            bar.update(task, completed=event.step)
        if event.kind == "log":
            bar.update(task, latest=describe_record({k: v for k, v in event.record.items() if k != "grad_norm"}))
        if event.kind == "evaluate":
            bar.print(f"step {event.step}: {describe_record(event.record)}")
        for line in event.record.get("samples", ()):
            bar.print(describe_sample(line), markup=False, highlight=False)
        if event.kind == "train_end":
            bar.stop()

    return subscriber
