"""The objective of stage dpo: a loss of pairs or a sum of several, with what it needs to know of the other pairs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtune.config import FinetuningArguments, TrainingArguments
from jtune.config.preference import WITH_MARGIN, WITHOUT_REFERENCE
from jtune.errors import DataError
from jtune.losses.pairs import LOSSES, ON_MEANS, Options, Pair, log_odds, logistic
from jtune.losses.units import (
    Shared,
    UnitLoss,
    UnitMetrics,
    UnitObjective,
    Units,
    group_means,
    group_sums,
    log_probabilities,
    log_ratios,
    segment_means,
)

Running = Any  # see `running_start`

# Nats by which the chosen answer must gain on the rejected one to be counted as preferred. While the policy is its
# reference, the two differ by rounding alone, where their sums were formed in other rows.
TIE = 1e-4


def pair_objective(finetuning: FinetuningArguments, training: TrainingArguments) -> UnitObjective:
    """What stage dpo minimises: `pref_loss` with its weights, `pref_bco_weight` and `pref_ftx`."""
    names, bco_weight, ftx = tuple(finetuning.pref_loss), finetuning.pref_bco_weight, finetuning.pref_ftx
    weights = tuple(finetuning.pref_loss_weights) or (1.0,) * len(names)
    options = Options(
        beta=finetuning.pref_beta,
        smoothing=finetuning.dpo_label_smoothing,
        gamma=finetuning.simpo_gamma,
        tau=finetuning.discopop_tau,
    )
    needed = {*names, *(["bco_pair"] if bco_weight else [])}
    return UnitObjective(
        name=describe(finetuning),
        loss=pair_loss(dict(zip(names, weights, strict=True)), options, bco_weight=bco_weight, ftx=ftx),
        shared=shared_of(needed, options.beta),
        running=running_start() if "bco_pair" in needed else None,
        anchored=not needed <= {*WITHOUT_REFERENCE},
        noise_alpha=training.neftune_noise_alpha or 0.0,
    )


def describe(finetuning: FinetuningArguments) -> str:
    """The loss of stage dpo in words: "sigmoid, beta 0.1"."""
    f = finetuning
    weights = tuple(f.pref_loss_weights) or (1.0,) * len(f.pref_loss)
    terms = [name if weight == 1 else f"{weight:g} {name}" for name, weight in zip(f.pref_loss, weights, strict=True)]
    words = [" + ".join(terms), f"beta {f.pref_beta:g}"]
    if f.dpo_label_smoothing:
        words.append(f"labels smoothed by {f.dpo_label_smoothing:g}")
    if "simpo" in f.pref_loss:
        words.append(f"gamma {f.simpo_gamma:g}")
    if "discopop" in f.pref_loss:
        words.append(f"tau {f.discopop_tau:g}")
    if f.ld_alpha is not None:
        words.append(f"tokens beyond the shorter answer weigh {f.ld_alpha:g}")
    if f.pref_bco_weight:
        words.append(f"BCO of weight {f.pref_bco_weight:g}")
    if f.pref_ftx:
        words.append(f"cross-entropy of chosen answers of weight {f.pref_ftx:g}")
    return ", ".join(words)


# ---------------------------------------------------------------------- the loss


def pair_loss(weights: Mapping[str, float], options: Options, *, bco_weight: float = 0.0, ftx: float = 0.0) -> UnitLoss:
    """The weighted sum of losses of pairs by name, and what is logged of each pair.

    With `bco_weight` w it is (that sum + w * BCO) / (1 + w), as in LLaMA-Factory. On top comes `ftx` times the
    cross-entropy of the chosen answer, the mean over its tokens.
    """

    def loss(units: Units) -> tuple[jax.Array, UnitMetrics]:
        pair = pair_of(units, weights)
        total = sum(weight * LOSSES[name](pair, options) for name, weight in weights.items())
        if bco_weight:
            total = (total + bco_weight * LOSSES["bco_pair"](pair, options)) / (1 + bco_weight)
        return total - ftx * pair.logp_chosen, metrics_of(units, pair, weights, options.beta)

    return loss


def pair_of(units: Units, names: Mapping[str, float]) -> Pair:
    """What the losses read of units of two segments.

    Raises:
      DataError: rows have a margin, and none of the losses reads it (`jtune.loading.data` has looked before, but not
        at rows that were encoded by an earlier run).
    """
    if units.margin is not None and not set(WITH_MARGIN) & set(names):
        losses = ", ".join(names)
        raise DataError(
            f"the rows have a margin, which pref_loss: {losses} does not use: take sigmoid, or drop the column"
        )
    ratio = log_ratios(units)
    means, mean_ratio = segment_means(units), ratio / jnp.maximum(units.counts, 1)
    sides = [x[..., side] for x in (ratio, mean_ratio, means) for side in (0, 1)]
    return Pair(*sides, margin=jnp.zeros_like(sides[0]) if units.margin is None else units.margin, shared=units.shared)


def metrics_of(units: Units, pair: Pair, names: Mapping[str, float], beta: float) -> UnitMetrics:
    """What LLaMA-Factory logs of pairs. Rewards are beta times what the losses compare: sums, or means of tokens."""
    on_means = set(names) <= ON_MEANS
    tie = 0.0 if units.reference is None else TIE / jnp.maximum(jnp.min(units.counts, axis=-1), 1) if on_means else TIE
    chosen, rejected = (pair.mean_chosen, pair.mean_rejected) if on_means else (pair.chosen, pair.rejected)
    logps = (pair.logp_chosen, pair.logp_rejected) if on_means else jnp.moveaxis(log_probabilities(units), -1, 0)
    values = {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/accuracies": (chosen - rejected > tie).astype(jnp.float32),
        "rewards/margins": beta * (chosen - rejected),
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }
    if "orpo" in names:
        values |= {"sft_loss": -pair.logp_chosen, "odds_ratio_loss": logistic(log_odds(pair))}
    return {name: (value, units.share) for name, value in values.items()}


# ---------------------------------------------------------------------- what pairs know of each other


def shared_of(names: Iterable[str], beta: float) -> Shared | None:
    """What losses of these names must know of all pairs of the update; None: nothing."""
    sources = [SOURCES[name] for name in sorted(names) if name in SOURCES]
    averages = "bco_pair" in names
    if not sources and not averages:
        return None

    def shared(first: Units, group: jax.Array, running: Running) -> tuple[dict[str, jax.Array], Running]:
        found = {name: value for source in sources for name, value in source(first).items()}
        if averages:
            deltas, running = running_mean(first, beta, running)
            found["delta"] = deltas[group]
        return {name: jnp.reshape(value, group.shape) for name, value in found.items()}, running

    return shared


def divergences(first: Units) -> dict[str, jax.Array]:
    """`kl_chosen`, `kl_rejected`: mean log-ratio of a side over the pairs of the group, or 0 if that is negative."""
    of_side = lambda side: jnp.maximum(group_means(log_ratios(first)[..., side], first), 0)[first.group]
    return {"kl_chosen": of_side(0), "kl_rejected": of_side(1)}


def reference_shift(first: Units) -> dict[str, jax.Array]:
    """What the reference says of a pair, log p(chosen) - log p(rejected), less what stands at its rank in the group.

    The pairs of a group are ranked by what the policy says of them, and what the reference says of them is sorted.
    """
    assert first.reference is not None
    sums = log_probabilities(first), log_probabilities(first, first.reference)
    policy, reference = (x[..., 0] - x[..., 1] for x in sums)
    return {"reference_shift": reference - of_same_rank(policy, reference, first)}


def ranked_answers(first: Units) -> dict[str, jax.Array]:
    """The log-ratios of the rejected answer of the chosen one's rank in the group, and the other way round."""
    chosen, rejected = jnp.moveaxis(log_ratios(first), -1, 0)
    return {
        "ranked_rejected": of_same_rank(chosen, rejected, first),
        "ranked_chosen": of_same_rank(rejected, chosen, first),
    }


SOURCES: dict[str, Callable[[Units], dict[str, jax.Array]]] = {
    "kto_pair": divergences,
    "aot": reference_shift,
    "aot_unpaired": ranked_answers,
}


def of_same_rank(values: jax.Array, others: jax.Array, units: Units) -> jax.Array:
    """For each of `values`, which of `others` has its rank in its group, both in ascending order."""
    group = jnp.where(units.share > 0, units.group, units.group.size).ravel()  # padding: a group of its own
    order, order_of_others = (jnp.lexsort((x.ravel(), group)) for x in (values, others))
    return jnp.zeros_like(others.ravel()).at[order].set(others.ravel()[order_of_others]).reshape(others.shape)


def running_start() -> Running:
    """The running mean of rewards before the first update, and the groups in it."""
    return {"mean": np.float32(0), "groups": np.float32(0)}


def running_mean(first: Units, beta: float, running: Running) -> tuple[jax.Array, Running]:
    """BCO's delta of each group: the mean of the rewards of all groups so far, that group among them.

    The reward of a group is the mean over its answers, chosen and rejected: `beta` times their log-ratio. Groups count
    alike, and come in the order of their numbers (TRL's `RunningMoments`, which gets a mean at a time).

    Returns:
      deltas `[as many as there are units]`, by the number of the group; `running` with all groups of the update.
    """
    rewards = group_means(beta * jnp.mean(log_ratios(first), axis=-1), first)
    there = (group_sums(first.share, first.group) > 0).astype(jnp.float32)
    groups = running["groups"] + jnp.cumsum(there)
    means = running["mean"] + jnp.cumsum(there * (rewards - running["mean"])) / jnp.maximum(groups, 1)
    return means, {"mean": means[-1], "groups": groups[-1]}
