"""When to log, evaluate and save."""

from dataclasses import dataclass
from typing import NamedTuple

from jtune.config import FinetuningArguments, TrainingArguments
from jtune.data import Plan


@dataclass(frozen=True)
class Cadence:
    """When to log, evaluate and save, as Hugging Face's Trainer decides it. A strategy is "no", "steps" or "epoch"."""

    max_steps: int
    updates_per_epoch: int
    logging_strategy: str = "steps"
    logging_steps: int = 500
    logging_first_step: bool = False
    eval_strategy: str = "no"
    eval_steps: int = 500
    eval_delay: float = 0
    save_strategy: str = "steps"  # also "best": when an evaluation was the best so far
    save_steps: int = 500
    eval_on_start: bool = False
    log_tokens: bool = False  # num_input_tokens_seen in every record

    def due(self, step: int, epoch: float) -> set[str]:
        """What is due after `step` updates: a subset of "log", "evaluate", "save"."""
        last = step == self.max_steps
        epoch_end = step % self.updates_per_epoch == 0 or last

        def at(strategy: str, every: int) -> bool:
            return (strategy == "steps" and every > 0 and step % every == 0) or (strategy == "epoch" and epoch_end)

        due = set()
        if at(self.logging_strategy, self.logging_steps) or (step == 1 and self.logging_first_step):
            due.add("log")
        delayed = self.eval_delay > (epoch if self.eval_strategy == "epoch" else step)
        if not delayed and (at(self.eval_strategy, self.eval_steps) or (last and self.eval_strategy == "steps")):
            due.add("evaluate")
        if at(self.save_strategy, self.save_steps) or (last and self.save_strategy == "steps"):
            due.add("save")
        return due


class Improvement(NamedTuple):
    """Which evaluation is the best, and how many that are not end the run."""

    metric: str = "eval_loss"
    greater_is_better: bool = False
    patience: int | None = None


def make_cadence(training: TrainingArguments, plan: Plan) -> Cadence:
    """When to log, evaluate and save; a number of steps below 1 is a share of the run."""

    def steps(value: float) -> int:
        return max(1, -int(-value * plan.max_steps // 1)) if value < 1 else int(value)

    return Cadence(
        max_steps=plan.max_steps,
        updates_per_epoch=plan.updates_per_epoch,
        logging_strategy=training.logging_strategy,
        logging_steps=steps(training.logging_steps),
        logging_first_step=training.logging_first_step,
        eval_strategy=training.eval_strategy,
        eval_steps=steps(training.eval_steps or training.logging_steps),
        eval_delay=training.eval_delay,
        save_strategy=training.save_strategy,
        save_steps=steps(training.save_steps),
        eval_on_start=training.eval_on_start,
        log_tokens=training.include_num_input_tokens_seen != "no",
    )


def best_metric(training: TrainingArguments, finetuning: FinetuningArguments) -> Improvement:
    """Which evaluation figure is watched, and in which direction (default: the loss, smaller is better)."""
    name = training.metric_for_best_model or "loss"
    greater = training.greater_is_better
    return Improvement(
        metric=name if name.startswith("eval_") else f"eval_{name}",
        greater_is_better=not name.endswith("loss") if greater is None else greater,
        patience=finetuning.early_stopping_steps,
    )
