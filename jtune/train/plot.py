"""Plots of a run: its loss, and what else was measured, in files that LLaMA-Factory names."""

import logging
import math
from pathlib import Path
from typing import Any

from jtune.distributed import processes

log = logging.getLogger("jtune")


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average whose weight grows with the number of points, as LLaMA-Factory draws it."""
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else smoothed[-1] * weight + (1 - weight) * value)
    return smoothed


def plot_losses(log_history: list[dict[str, Any]], path: Path, title: str, unit: str = "nats per token") -> bool:
    """Draw training loss (each point and smoothed), evaluation loss if there is any, and the learning rate below.

    Args:
      unit: of the loss; "": none is named.

    Returns:
      False, and no file, when nothing was logged, or another process writes.
    """
    if not processes.is_first():
        return False
    series = {key: _points(log_history, key) for key in ("loss", "eval_loss", "learning_rate")}
    if not series["loss"][0]:
        return False
    plt = _pyplot()
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
    upper.set_ylabel(f"loss ({unit})" if unit else "loss")
    upper.legend(frameon=False)
    lower.plot(*series["learning_rate"], color="#555555", linewidth=1)
    lower.set_ylabel("learning rate", fontsize=8)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.tick_params(labelsize=8)
    for axes in (upper, lower):
        _finish(axes)
    upper.set_xlabel("")
    figure.savefig(path)
    plt.close(figure)
    return True


# What is drawn where it was logged: a title, the file, and the keys, each also as "eval_...".
MEASURES = (
    ("Accuracy", "training_eval_accuracy.png", ("accuracy",)),
    ("Chosen answers of greater reward", "training_rewards_accuracies.png", ("rewards/accuracies",)),
    ("Rewards of answers", "training_rewards_chosen.png", ("rewards/chosen", "rewards/rejected")),
)


def plot_measures(log_history: list[dict[str, Any]], folder: Path, name: str) -> list[Path]:
    """Draw what was measured besides the loss, dashed in evaluations: `training_rewards_accuracies.png`, ...

    Args:
      name: of the run, for the titles.

    Returns:
      The files.
    """
    written = []
    for title, file, keys in MEASURES if processes.is_first() else ():
        series = {key: _points(log_history, key) for side in keys for key in (side, f"eval_{side}")}
        if not any(steps for steps, _ in series.values()):
            continue
        plt = _pyplot()
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained", dpi=120)
        for key, (steps, values) in series.items():
            color = "#d62728" if "rejected" in key else "#1f77b4"
            style = {"linestyle": "--", "marker": "o", "markersize": 4} if key.startswith("eval_") else {}
            if steps:
                axes.plot(steps, values, color=color, label=key, **style)
        axes.set_title(f"{title}: {name}", fontsize=11)
        axes.legend(frameon=False)
        _finish(axes)
        figure.savefig(folder / file)
        plt.close(figure)
        written.append(folder / file)
    return written


def _points(log_history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of what was logged under `key`."""
    points = [(r["step"], r[key]) for r in log_history if r.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _finish(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("update")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
