"""The loss plot."""

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
