"""Files of JSON lines: `trainer_log.jsonl` and `eval_samples.jsonl`."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jtune.train.callbacks.clock import Clock, hours_minutes_seconds
from jtune.train.events import Event, Subscriber
from jtune.train.loop import finite_or_none
from jtune.train.results import set_aside_damaged, write_text
from jtune.train.timing import read_lines

log = logging.getLogger("jtune")


def _cut(path: Path, key: str, start_step: int) -> None:
    """Leave the lines of a log up to `start_step`: a resumed run goes on after its checkpoint, and later lines belong
    to the run that was cut short. A log with lines that cannot be read is kept aside; what a kill has torn is not.
    """
    if not path.exists():
        return
    lines = read_lines(path)
    garbled = len([x for x in path.read_bytes().split(b"\n")[:-1] if x.strip()]) > len(lines)
    kept = [line for line, record in lines if type(step := record.get(key, 0)) is int and step <= start_step]
    if garbled and start_step:
        set_aside_damaged(path)
    write_text(path, "".join(line + "\n" for line in kept if start_step))


def samples_file(path: Path, start_step: int) -> Subscriber:
    """Append each sampled answer to `eval_samples.jsonl`: step, and prompt, predict and label as of predictions."""
    _cut(path, "step", start_step)
    append = _appender(path)

    def subscriber(event: Event) -> None:
        if event.kind == "samples":
            append({"step": event.step, **line} for line in event.record["samples"])

    return subscriber


def _appender(path: Path) -> Callable[[Iterable[Mapping[str, Any]]], None]:
    """`append(records)` to a file of JSON lines. On a full disk they are lost, which is said once: what cannot be saved
    of the run says so itself.
    """
    failed: list[OSError] = []

    def append(records: Iterable[Mapping[str, Any]]) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        except OSError as error:
            if not failed:
                log.warning("%s cannot be written: %s", path, error.strerror)
            failed.append(error)

    return append


def log_file(path: Path, start_step: int) -> Subscriber:
    """Append each logged record to `trainer_log.jsonl`, with LLaMA-Factory's field names."""
    clock = Clock(start_step)
    _cut(path, "current_steps", start_step)
    append = _appender(path)

    def subscriber(event: Event) -> None:
        if event.kind not in ("log", "evaluate", "train_end"):
            return
        record = event.record
        line = {
            "current_steps": event.step,
            "total_steps": event.max_steps,
            "loss": record.get("loss"),
            "eval_loss": record.get("eval_loss"),
            "accuracy": record.get("rewards/accuracies"),
            "skipped_updates": record.get("skipped_updates"),
            "lr": record.get("learning_rate"),
            "epoch": event.epoch,
            "percentage": round(100 * event.step / max(1, event.max_steps), 2),
            "elapsed_time": hours_minutes_seconds(clock.elapsed()),
            "remaining_time": hours_minutes_seconds(clock.remaining(event.step, event.max_steps)),
            "throughput": record.get("tokens_per_second"),
            "total_tokens": record.get("num_input_tokens_seen"),
            "tflops_per_device": record.get("tflops_per_device"),
            "mfu": record.get("mfu"),
            "seconds": {kind: round(value, 2) for kind, value in record.get("seconds", {}).items()} or None,
        }
        append([{k: v for k, v in line.items() if finite_or_none(v) is not None}])

    return subscriber
