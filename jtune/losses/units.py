"""What the losses of preferences see: units of one or two segments, each with the sum of a quantity of its tokens.

A unit is what is shuffled, counted and packed as a whole: a pair of answers, or an answer that is good or bad. A loss
of units is a pure function of sums over segments; how they came about, and where the units lie, does not show in it.

Shape suffixes: U units, with any axes before it; S segments of a unit (0 chosen, 1 rejected; an answer that is marked
has one).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Units(NamedTuple):
    """Units of a microbatch, of an update or of an evaluation set, float32. Those with `share` 0 are padding."""

    policy: jax.Array  # [U, S], log-probabilities of labelled tokens, summed over each segment; stage rm: scores
    counts: jax.Array  # [U, S], labelled tokens
    share: jax.Array  # [U], 1 / the units of its group
    group: jax.Array  # int32 [U], which of the microbatches of LLaMA-Factory in the update it belongs to
    reference: jax.Array | None = None  # [U, S], `policy` of the reference model
    wanted: jax.Array | None = None  # [U], 1: the answer is good; 0: it is bad. Of feedback only
    offset: jax.Array | None = None  # [U, S], `policy` and `reference` are less by this (`log_probabilities`); None: 0
    margin: jax.Array | None = None  # [U], by how much the chosen answer is better. Of pairs with a margin only
    shared: Mapping[str, jax.Array] = {}  # [U], what follows from all units of the update, held fixed (see `Shared`)


# Of each figure its value and its weight, both [U]: the figure is the weighted mean, over all that there are.
UnitMetrics = dict[str, tuple[jax.Array, jax.Array]]

# The loss of each unit, [U], and what is logged. The loss of an update is `sum(share * loss) / sum(share)`.
UnitLoss = Callable[[Units], tuple[jax.Array, UnitMetrics]]

# `shared(first, group, running) -> (shared, running)`: what a loss must know of other units than its own. `first` are
# all units of the update with their sums, held fixed (in stage kto: the answers that do not match their prompts);
# `group` int32 [U] is that of the units whose loss it is, and so is the shape of what comes back. `running` is what is
# kept from update to update.
Shared = Callable[[Units, jax.Array, Any], tuple[dict[str, jax.Array], Any]]


class UnitObjective(NamedTuple):
    """What the train step is told to minimise, where the loss is one of units.

    Attributes:
      name: the loss with its options, in words.
      loss: of each unit, and what is logged; training and evaluation call the same.
      shared: what `loss` must know of all units of the update first; None: nothing.
      running: what `shared` keeps from update to update, as it is before the first: a tree of float32 scalars.
      anchored: `loss` needs the sums of a reference, `Units.reference`.
      scores: the sums of a unit are scores of a value head, not log-probabilities.
      mismatched: the `first` of `shared` are not the units of the update, but their prompts with answers of others.
      noise_alpha: strength of `embedding_noise`; 0: none.
    """

    name: str
    loss: UnitLoss
    shared: Shared | None = None
    running: Any = None
    anchored: bool = False
    scores: bool = False
    mismatched: bool = False
    noise_alpha: float = 0.0


def group_sums(values: jax.Array, group: jax.Array) -> jax.Array:
    """The sum of `values` in each group, by number: `[...]`, int32 `[...]` -> `[as many as there are values]`."""
    return jax.ops.segment_sum(values.ravel(), group.ravel(), group.size)


def group_means(values: jax.Array, units: Units) -> jax.Array:
    """The mean of `values` over the units of each group, by the number of the group; 0 where a group has no unit."""
    shares = group_sums(units.share, units.group)
    return group_sums(units.share * values, units.group) / jnp.where(shares > 0, shares, 1)


def log_ratios(units: Units) -> jax.Array:
    """By how much the policy finds segments likelier than the reference: `[U, S]`. Without one, log-probabilities."""
    return log_probabilities(units) if units.reference is None else units.policy - units.reference


def segment_means(units: Units) -> jax.Array:
    """The mean of a labelled token, `[U, S]`; 0 for a segment without any."""
    return log_probabilities(units) / jnp.maximum(units.counts, 1)


def log_probabilities(units: Units, sums: jax.Array | None = None) -> jax.Array:
    """What `policy` (or other `sums` of the same kind) stands for, `[U, S]`: with its offset.

    The sum over an answer may be thousands of nats, and what counts is by how much two models differ in it: hundredths.
    So what both have in common is left out before float32 rounds it away.
    """
    sums = units.policy if sums is None else sums
    return sums if units.offset is None else sums + units.offset
