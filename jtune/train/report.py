"""The run as a person sees it: `Trainer`-like JSON files, a progress bar or plain lines, TensorBoard, the loss plot.

All of them are subscribers of `jtune.train.events`, or functions of the finished log.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jtune.config import TrainingArguments
from jtune.data import Plan
from jtune.distributed import processes
from jtune.planning.chips import peak_flops
from jtune.train.events import Event, Subscriber
from jtune.train.loop import Progress, finite_or_none
from jtune.train.timing import read_lines

log = logging.getLogger("jtune")

# Fields of a log record that are counts and times of jtune's own; Trainer's records do not have them.
_NOT_PLOTTED = ("step", "epoch")
SHOWN = 100  # characters of a prompt that are shown with an answer to it


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all. Of several processes the first writes. Numbers that are not finite are null."""
    if not processes.is_first():
        return
    _replace(path, json.dumps(_for_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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
        _set_aside(path)
    return {}


def finish_evaluation(metrics: dict[str, float], output_dir: Path) -> None:
    """Write `eval_results.json` and say what was measured."""
    save_results(output_dir, "eval", metrics)
    log.info("evaluation: %s", "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))


def finish_prediction(lines: list[dict[str, str]], metrics: dict[str, float], output_dir: Path) -> None:
    """Write `generated_predictions.jsonl` and `predict_results.json`, and say what was measured."""
    path = output_dir / "generated_predictions.jsonl"
    if processes.is_first():
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        partial.replace(path)
    save_results(output_dir, "predict", metrics)
    log.info("answers: %s", path)
    log.info("prediction: %s", "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))


def describe_sample(line: Mapping[str, str]) -> str:
    """A prompt, what was answered, and what was expected, for a person to look at."""
    prompt, answer, label = (" ".join(line[key].split()) for key in ("prompt", "predict", "label"))
    prompt = prompt if len(prompt) <= SHOWN else f"... {prompt[-SHOWN:]}"
    return f"  {prompt}\n    answer:   {answer[: 2 * SHOWN]}\n    expected: {label[: 2 * SHOWN]}"


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
    this start: of a resumed run, of what was done since.

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


def make_rates(flops_per_token: float, mesh: Mesh) -> Callable[[float], dict[str, float]]:
    """From tokens a second to what is logged of them: model FLOPs a second, and their share of the peak (MFU) of chips
    whose peak is known. The formula: `jtune.planning.flops`.
    """
    peak = peak_flops(mesh.devices.flat[0].device_kind)

    def rates(speed: float) -> dict[str, float]:
        found = {"tokens_per_second": speed, "tflops_per_device": speed * flops_per_token / mesh.size / 1e12}
        return found | ({"mfu": speed * flops_per_token / (peak * mesh.size)} if peak else {})

    return rates


def describe_plan(plan: Plan) -> None:
    """Say what the run will do, before it does it."""
    log.info(
        "%s; batches [accum, batch, seq] %s, %.1f%% padding",
        plan.describe(),
        " ".join(str(list(shape)) for shape in plan.shapes),
        100 * plan.padding_share,
    )


def subscribers(training: TrainingArguments, output_dir: Path, start: int, max_steps: int) -> list[Subscriber]:
    """Those that `report_to` and the terminal ask for; on the first of several processes."""
    if not processes.is_first():
        return []
    found = [log_file(output_dir / "trainer_log.jsonl", start)]
    if training.eval_samples:
        found.append(samples_file(output_dir / "eval_samples.jsonl", start))
    if training.profile_steps is not None:
        first, last = map(int, training.profile_steps.split("-"))
        found.append(profile(output_dir / "profile", first, last, start))
    if "tensorboard" in training.report_to:
        found.append(tensorboard(Path(training.logging_dir or output_dir / "runs")))
    if sys.stdout.isatty() and not training.disable_tqdm:
        found.append(progress_bar(start, max_steps))
    else:
        found.append(progress_lines(start))
    return found


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


class Clock:
    """Seconds and tokens since the run (or its resumption) began, for rates and the time left."""

    def __init__(self, step: int):
        self.start, self.first_step = time.monotonic(), step

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def remaining(self, step: int, max_steps: int) -> float:
        return self.elapsed() / max(1, step - self.first_step) * (max_steps - step)


def _hms(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


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
        _set_aside(path)
    _replace(path, "".join(line + "\n" for line in kept if start_step))


def _set_aside(path: Path) -> None:
    aside = path.with_name(path.name + ".damaged")
    path.replace(aside)
    log.warning("%s is damaged; it is now %s, and a new one has what of it can be read", path, aside.name)


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say which file


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
            "skipped_updates": record.get("skipped_updates"),
            "lr": record.get("learning_rate"),
            "epoch": event.epoch,
            "percentage": round(100 * event.step / max(1, event.max_steps), 2),
            "elapsed_time": _hms(clock.elapsed()),
            "remaining_time": _hms(clock.remaining(event.step, event.max_steps)),
            "throughput": record.get("tokens_per_second"),
            "total_tokens": record.get("num_input_tokens_seen"),
            "tflops_per_device": record.get("tflops_per_device"),
            "mfu": record.get("mfu"),
            "seconds": {kind: round(value, 2) for kind, value in record.get("seconds", {}).items()} or None,
        }
        append([{k: v for k, v in line.items() if finite_or_none(v) is not None}])

    return subscriber


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


def _describe(record: Mapping[str, Any]) -> str:
    shown = {
        "loss": "loss {:.4f}",
        "skipped_updates": "skipped {}",
        "eval_loss": "eval loss {:.4f}",
        "eval_accuracy": "accuracy {:.4f}",
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
            left = _hms(clock.remaining(event.step, event.max_steps))
            show(
                f"step {event.step:>{width}}/{event.max_steps}  epoch {event.epoch:.2f}  "
                f"{_describe(event.record)}  left {left}"
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
            bar.update(task, latest=_describe({k: v for k, v in event.record.items() if k != "grad_norm"}))
        if event.kind == "evaluate":
            bar.print(f"step {event.step}: {_describe(event.record)}")
        for line in event.record.get("samples", ()):
            bar.print(describe_sample(line), markup=False, highlight=False)
        if event.kind == "train_end":
            bar.stop()

    return subscriber


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average whose weight grows with the number of points, as LLaMA-Factory draws it."""
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else smoothed[-1] * weight + (1 - weight) * value)
    return smoothed


def plot_losses(log_history: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw training loss (each point and smoothed), evaluation loss if there is any, and the learning rate below.

    Returns:
      False, and no file, when nothing was logged, or another process writes.
    """
    if not processes.is_first():
        return False
    series = {}
    for key in ("loss", "eval_loss", "learning_rate"):
        points = [(r["step"], r[key]) for r in log_history if r.get(key) is not None]
        series[key] = ([step for step, _ in points], [value for _, value in points])
    if not series["loss"][0]:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(8, 5.5), sharex=True, height_ratios=[4, 1], layout="constrained", dpi=120
    )
    steps, losses = series["loss"]
    few = len(steps) < 30
    upper.plot(steps, losses, color="#1f77b4", alpha=0.35, marker="o" if few else None, markersize=3, label="loss")
    upper.plot(steps, smooth(losses), color="#1f77b4", linewidth=2, label="loss, smoothed")
    if series["eval_loss"][0]:
        upper.plot(*series["eval_loss"], color="#d62728", marker="o", markersize=4, label="evaluation loss")
    upper.set_title(title, fontsize=11)
    upper.set_ylabel("loss (nats per token)")
    upper.legend(frameon=False)
    lower.plot(*series["learning_rate"], color="#555555", linewidth=1)
    lower.set_ylabel("learning rate", fontsize=8)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.tick_params(labelsize=8)
    lower.set_xlabel("update")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
    return True
