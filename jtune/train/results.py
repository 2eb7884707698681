"""The files of results, with the names that transformers' Trainer gives them."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jtune.data import Plan
from jtune.distributed import processes
from jtune.files import atomic_write
from jtune.train.loop import Progress, finite_or_none

log = logging.getLogger("jtune")


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all, on the first of several processes. Numbers that are not finite become null."""
    if not processes.is_first():
        return
    write_text(path, json.dumps(_for_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _for_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _for_json(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(x) for x in value]
    return finite_or_none(value)


def save_results(output_dir: Path, split: str, metrics: dict[str, Any]) -> None:
    """`{split}_results.json`, and the same merged into `all_results.json`."""
    write_json(output_dir / f"{split}_results.json", metrics)
    write_json(output_dir / "all_results.json", read_results(output_dir) | metrics)


def read_results(output_dir: Path) -> dict[str, Any]:
    """The content of `all_results.json`, or nothing. A damaged file is set aside."""
    path = output_dir / "all_results.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    if processes.is_first():
        set_aside_damaged(path)
    return {}


def finish_evaluation(metrics: dict[str, float], output_dir: Path) -> None:
    """Write and log the metrics of an evaluation (`eval_results.json`)."""
    save_results(output_dir, "eval", metrics)
    log.info("evaluation: %s", "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))


def finish_prediction(lines: Sequence[Mapping[str, Any]], metrics: dict[str, float], output_dir: Path) -> None:
    """Write answers or scores (`generated_predictions.jsonl`) and metrics (`predict_results.json`); log the metrics."""
    path = output_dir / "generated_predictions.jsonl"
    if processes.is_first():
        with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    save_results(output_dir, "predict", metrics)
    log.info("predictions: %s", path)
    log.info("prediction: %s", "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))


def train_summary(
    progress: Progress,
    *,
    began: tuple[int, int],
    seconds: float,
    examples_per_update: int,
    epoch: float,
    parameters: int,
) -> dict[str, Any]:
    """The figures of `train_results.json`, with Trainer's names. `total_flos` is 6 x parameters x tokens.

    The loss is the mean over all updates that were not skipped, None if there are none. Time and rates are those of
    this start: a resumed run counts from its resumption.

    Args:
      began: updates and tokens that were done when `seconds` began.
    """
    counted = progress.step - progress.skipped_steps
    steps, tokens = progress.step - began[0], progress.tokens - began[1]
    summary = {
        "epoch": epoch,
        "total_flos": 6.0 * parameters * progress.tokens,
        "train_loss": progress.total_loss / counted if counted else None,
        "train_runtime": round(seconds, 4),
        "train_samples_per_second": round(steps * examples_per_update / seconds, 3),
        "train_steps_per_second": round(steps / seconds, 3),
        "train_tokens_per_second": round(tokens / seconds, 1),
    }
    return summary | ({"train_skipped_updates": progress.skipped_steps} if progress.skipped_steps else {})


def describe_plan(plan: Plan) -> None:
    """Log the updates that the run will make."""
    log.info(
        "%s; batches [accum, batch, seq] %s, %.1f%% padding",
        plan.describe(),
        " ".join(str(list(shape)) for shape in plan.shapes),
        100 * plan.padding_share,
    )


def set_aside_damaged(path: Path) -> None:
    aside = path.with_name(path.name + ".damaged")
    path.replace(aside)
    log.warning("%s is damaged: renamed to %s; a new file holds the lines that could be read", path, aside.name)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    try:
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # the error of a full disk names no file
