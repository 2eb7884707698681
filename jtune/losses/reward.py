"""The loss of stage rm: the chosen answer of a pair is to have the higher score."""

import jax
import jax.numpy as jnp

from jtune.config import FinetuningArguments, TrainingArguments
from jtune.losses.units import UnitLoss, UnitMetrics, UnitObjective, Units


def score_objective(finetuning: FinetuningArguments, training: TrainingArguments) -> UnitObjective:
    """What stage rm minimises."""
    coefficient = finetuning.rm_center_coef
    centred = f", centred by {coefficient:g}" if coefficient else ""
    return UnitObjective(
        name=f"Bradley-Terry{centred}",
        loss=bradley_terry(coefficient),
        scores=True,
        noise_alpha=training.neftune_noise_alpha or 0.0,
    )


def bradley_terry(center_coefficient: float = 0.0) -> UnitLoss:
    """`-log sigmoid(s_c - s_r - margin) + center_coefficient * (s_c + s_r)^2`, for scores s of the two answers.

    arXiv:2203.02155; the margin, where the rows have one: arXiv:2307.09288; centring, which keeps the mean of scores
    near 0: arXiv:2312.09244. `accuracy` is the share of all pairs with s_c > s_r.
    """

    def loss(units: Units) -> tuple[jax.Array, UnitMetrics]:
        chosen, rejected = units.policy[..., 0], units.policy[..., 1]
        margin = 0.0 if units.margin is None else units.margin
        losses = -jax.nn.log_sigmoid(chosen - rejected - margin)
        if center_coefficient:
            losses += center_coefficient * (chosen + rejected) ** 2
        there = (units.share > 0).astype(jnp.float32)
        return losses, {"accuracy": ((chosen > rejected).astype(jnp.float32), there)}

    return loss
