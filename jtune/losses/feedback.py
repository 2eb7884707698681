"""The loss of stage kto: answers that are marked as good or bad (KTO, arXiv:2402.01306)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jtune.config import FinetuningArguments, TrainingArguments
from jtune.losses.units import (
    UnitLoss,
    UnitMetrics,
    UnitObjective,
    Units,
    group_means,
    log_probabilities,
    log_ratios,
    segment_means,
)


def feedback_objective(finetuning: FinetuningArguments, training: TrainingArguments) -> UnitObjective:
    """What stage kto minimises."""
    beta, ftx = finetuning.pref_beta, finetuning.pref_ftx
    good, bad = finetuning.kto_chosen_weight, finetuning.kto_rejected_weight
    weights = f", good answers weigh {good:g} and bad ones {bad:g}" if (good, bad) != (1, 1) else ""
    also = f", cross-entropy of good answers of weight {ftx:g}" if ftx else ""
    return UnitObjective(
        name=f"KTO, beta {beta:g}{weights}{also}",
        loss=kto(beta, good, bad, ftx),
        shared=group_statistics,
        anchored=True,
        mismatched=True,
        noise_alpha=training.neftune_noise_alpha or 0.0,
    )


def kto(beta: float, good: float = 1.0, bad: float = 1.0, ftx: float = 0.0) -> UnitLoss:
    """The loss of marked answers, units of one segment.

    With z the log-ratio of the answer to the reference, and the divergence KL that `group_statistics` estimates:

      good * (1 - sigmoid(beta * (z - KL)))   of a good answer,
      bad  * (1 - sigmoid(beta * (KL - z)))   of a bad one.

    `ftx` times the mean cross-entropy of the good answers of a group comes on top: a mean over answers of means over
    their tokens. LLaMA-Factory divides this once more by the share of good answers, so that it grows as they get rarer.

    Which answers are good is said by `Units.wanted`. Metrics are means over the answers of their kind; of the margin
    between the two see `with_margins`.
    """

    def loss(units: Units) -> tuple[jax.Array, UnitMetrics]:
        policy, wanted, kl = log_probabilities(units)[..., 0], units.wanted, units.shared["kl"]
        ratio = log_ratios(units)[..., 0]
        assert wanted is not None
        side = 2 * wanted - 1
        losses = (good * wanted + bad * (1 - wanted)) * jax.nn.sigmoid(beta * side * (kl - ratio))
        if ftx:
            good_share = units.shared["good_share"]
            losses -= ftx * segment_means(units)[..., 0] * wanted / jnp.where(good_share > 0, good_share, 1)
        there = (units.share > 0).astype(jnp.float32)
        metrics = {
            "rewards/chosen": (beta * ratio, wanted * there),
            "rewards/rejected": (beta * ratio, (1 - wanted) * there),
            "logps/chosen": (policy, wanted * there),
            "logps/rejected": (policy, (1 - wanted) * there),
            "kl": (kl, units.share),
        }
        return losses, metrics

    return loss


def group_statistics(first: Units, group: jax.Array, running: Any) -> tuple[dict[str, jax.Array], Any]:
    """What the loss must know of the other answers of a unit's group.

    - `kl`: how far the model has moved from the reference, the mean log-ratio of answers to other prompts, or 0 where
      that is negative.
    - `good_share`: the share of good answers.

    Args:
      first: for each answer of the update its prompt with an answer to another one, and `wanted` of the answer itself.
    """
    assert first.wanted is not None
    kl = jnp.maximum(group_means(log_ratios(first)[..., 0], first), 0)
    return {"kl": kl[group], "good_share": group_means(first.wanted, first)[group]}, running


def with_margins(record: Mapping[str, float]) -> dict[str, float]:
    """A log record with `rewards/margins`, chosen less rejected, where it has rewards of both kinds.

    The mean rewards are those of different answers, as many as there were of each kind, so their difference is not the
    mean of a quantity of each answer.

    >>> with_margins({"eval_rewards/chosen": 0.5, "eval_rewards/rejected": 0.25})["eval_rewards/margins"]
    0.25
    """
    found = dict(record)
    for prefix in ("", "eval_"):
        chosen, rejected = (record.get(f"{prefix}rewards/{side}") for side in ("chosen", "rejected"))
        if chosen is not None and rejected is not None:
            found.setdefault(f"{prefix}rewards/margins", chosen - rejected)
    return found
