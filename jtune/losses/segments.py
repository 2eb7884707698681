"""The loss of a microbatch of units: sums over the segments of its rows, and a function of those.

Shape suffixes: A microbatches, B batch, T tokens in a row, U units that are told of beside a row, S segments of a unit,
D embed.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtune.data import OTHER
from jtune.losses.batch import NOISE, Losses
from jtune.losses.chunked import chunk_elements, chunk_positions, position_values, sum_labelled
from jtune.losses.objective import embedding_noise
from jtune.losses.reference import models_of
from jtune.losses.token import token_nll
from jtune.losses.units import UnitObjective, Units
from jtune.models import CausalLM
from jtune.models.decoder import Hidden, hidden_states
from jtune.models.moe import balance_loss
from jtune.models.value_head import score, score_keys
from jtune.tuning import prepared_axes

Figures = dict[str, jax.Array]  # sums over segments of what is logged of their tokens
SHARED = "shared_"  # begins the names of what follows from all units of an update, among the arrays of a microbatch
SMALL_CHUNK = 256  # positions; chunks without any that counts are left out, so there are several
STEP = 1 / 16  # float32 sums of multiples of it are exact up to a million


class SumsOf(NamedTuple):
    """What is summed over segments.

    Attributes:
      keys: the subtrees of the parameters that `value` needs.
      value: of positions, from the hidden states before the final norm; see `jtune.losses.chunked.position_values`.
      width: float32 that a position takes while it is computed.
    """

    keys: tuple[str, ...]
    value: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Figures]]
    width: int


def log_probabilities(model: CausalLM, *, temperature: float = 1.0, entropy: bool = False) -> SumsOf:
    """Log-probabilities of targets; figures: the mean `logits` of a position and, if asked for, its `entropy` in nats.

    Args:
      temperature: divides the logits.
    """

    def value(head_params: Any, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, Figures]:
        logits: Any = model.apply({"params": head_params}, hidden, method="head")
        figures = {"logits": jnp.mean(logits, axis=-1)}
        logits = logits / temperature if temperature != 1.0 else logits
        if entropy:
            logs = jax.nn.log_softmax(logits, axis=-1)
            figures["entropy"] = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
        return -token_nll(logits, targets), jax.tree.map(jax.lax.stop_gradient, figures)

    return SumsOf(model.head_keys, value, model.config.vocab_size)


def scores(model: CausalLM) -> SumsOf:
    """Scores of the value head."""
    return SumsOf(score_keys(model), lambda head_params, hidden, targets: (score(model, head_params, hidden), {}), 1)


def sums_of(model: CausalLM, objective: UnitObjective) -> SumsOf:
    """What the units of an objective are the sums of."""
    return scores(model) if objective.scores else log_probabilities(model)


class Owners(NamedTuple):
    """Which segment each position belongs to."""

    of_position: jax.Array  # int32 [B, T], from 0; of padding any
    count: int  # of segments


def segment_sums(
    model: CausalLM,
    what: SumsOf,
    params: Any,
    hidden_BTD: jax.Array,
    batch: Mapping[str, jax.Array],
    owners: Owners,
    *,
    capacity: int,
    shards: int,
) -> tuple[jax.Array, Figures]:
    """Sums over segments, float32 `[count, 2]`, the same on all devices, and those of figures, `[count]`.

    A sum comes in two parts: multiples of `STEP`, exact, and what is left of each token. So two models are compared to
    more digits than the sum itself has in float32. The gradient passes through the second part.

    Args:
      batch: `targets` int32 and `loss_weights` float32, `[batch, seq]`.
      capacity: positions with a weight on a shard, at most.
    """

    def sums(head_params, hidden_SKD, pairs_SK2, weights_SK):
        K = weights_SK.shape[1]
        chunk = min(chunk_positions(K, what.width, chunk_elements(model.mesh)), max(SMALL_CHUNK, -(-K // 8)))
        found: Any = position_values(what.value, head_params, hidden_SKD, pairs_SK2[..., 0], weights_SK, chunk)
        values, figures = found
        owner = pairs_SK2[..., 1].ravel()
        add = lambda x: jax.ops.segment_sum(x.ravel(), owner, owners.count)
        values = values * weights_SK
        coarse = jax.lax.stop_gradient(jnp.round(values / STEP) * STEP)
        both = jnp.stack([add(coarse), add(values - coarse)], axis=-1)
        return both, jax.tree.map(lambda x: add(x * weights_SK), figures)

    heads = {key: params[key] for key in what.keys}
    return sum_labelled(
        sums,
        heads,
        hidden_BTD,
        jnp.stack([batch["targets"], owners.of_position], -1),  # both integers of a position
        batch["loss_weights"],
        capacity=capacity,
        shards=shards,
        axes=prepared_axes(heads, model.config),
        mesh=model.mesh,
    )


def make_unit_losses(
    model: CausalLM,
    objective: UnitObjective,
    *,
    label_capacity: int,
    other_capacity: int = 0,
    batch_shards: int,
    second: CausalLM | None = None,
) -> Losses:
    """The losses of units that `objective` asks for: a sum over units, each times its share.

    Args:
      label_capacity: positions with a weight on a shard, of a microbatch of the units.
      other_capacity: the same of mismatched answers.
      second: the module of the reference, where that is another model.
    """
    noise_alpha = objective.noise_alpha

    def sums(model: CausalLM, params: Any, micro: Mapping[str, jax.Array], capacity: int, key=None):
        """Sums `[B, U, S, 2]`, their figures `[B, U, S]`, and the output of the last layer."""
        noise = None
        if key is not None and noise_alpha:
            shape = model.config.hidden_size, noise_alpha, model.dtype
            noise = embedding_noise(jax.random.fold_in(key, NOISE), micro["segment_ids"], *shape)
        inputs = micro["input_ids"], micro["positions"], micro["segment_ids"]
        hidden: Hidden = hidden_states(model, params, *inputs, dropout_key=key, embedding_noise=noise)
        B, U, S = micro["counts"].shape
        owner_BT = jnp.take_along_axis(micro["owner"], jnp.maximum(micro["segment_ids"] - 1, 0), axis=1)
        owners = Owners(owner_BT, B * U * S)
        how = {"capacity": capacity, "shards": batch_shards}
        found = segment_sums(model, sums_of(model, objective), params, hidden.x, micro, owners, **how)
        return *jax.tree.map(lambda x: x.reshape(B, U, S, *x.shape[1:]), found), hidden

    def units(trainable, frozen, micro, capacity: int, key=None) -> tuple[Units, Figures, Hidden]:
        """The units of a microbatch. Their reference is computed where it is not among the arrays of the batch."""
        params, *others = models_of(trainable, frozen)
        policy, figures, hidden = sums(model, params, micro, capacity, key)
        fields = {name: micro.get(name) for name in ("reference", "wanted", "margin")}
        if objective.anchored and fields["reference"] is None:
            fields["reference"] = jax.lax.stop_gradient(sums(second or model, others[0], micro, capacity)[0])
        fields |= {name: micro[name] for name in ("counts", "share", "group")}
        return of_sums(policy, **fields), figures, hidden

    def before(trainable, frozen, batch: Mapping[str, jax.Array], running):
        if not objective.mismatched and len(batch["share"]) == 1:
            return {}, running  # the update is one microbatch, which knows all of it
        prefix, capacity = (OTHER, other_capacity) if objective.mismatched else ("", label_capacity)
        first = {name.removeprefix(prefix): x for name, x in batch.items() if name.startswith(OTHER) == bool(prefix)}
        first = {name: x for name, x in first.items() if x.ndim}
        used = jnp.sum(jnp.any(first["segment_ids"] > 0, axis=(1, 2)))
        shapes = jax.eval_shape(partial(units, capacity=capacity), trainable, frozen, at(first, 0))[0]
        zeros = jax.tree.map(lambda x: jnp.zeros((len(first["share"]), *x.shape), x.dtype), shapes)

        def fill(index, found):
            one = units(trainable, frozen, at(first, index), capacity)[0]
            return jax.tree.map(lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, index, 0), found, one)

        found = jax.lax.stop_gradient(jax.lax.fori_loop(0, used, fill, zeros))
        assert objective.shared is not None
        shared, running = objective.shared(found, batch["group"], running)
        return {SHARED + name: x for name, x in shared.items()}, running

    def of_microbatch(trainable, frozen, micro, key, running):
        found, figures, hidden = units(trainable, frozen, micro, label_capacity, key)
        shared = {name.removeprefix(SHARED): x for name, x in micro.items() if name.startswith(SHARED)}
        if objective.shared is not None and not shared:  # the update is this microbatch
            shared, running = objective.shared(jax.lax.stop_gradient(found), found.group, running)
        losses, metrics = objective.loss(found._replace(shared=shared))
        total = jnp.sum(found.share * losses)
        if hidden.load is not None:
            assert model.config.experts is not None
            total += model.config.experts.aux_coef * balance_loss(hidden.load) * jnp.sum(found.share)
        return total, summed(metrics | mean_logits(found, figures)), running

    return Losses(of_microbatch, before if objective.shared else None)


def of_sums(policy: jax.Array, reference: jax.Array | None = None, **fields: jax.Array | None) -> Units:
    """Units of sums in two parts, `[..., S, 2]`: what the reference has of the first part is left out of both."""
    offset = jnp.zeros_like(policy[..., 0]) if reference is None else reference[..., 0]
    rest = None if reference is None else reference[..., 1]
    return Units(policy[..., 0] - offset + policy[..., 1], reference=rest, offset=offset, **fields)  # type: ignore[arg-type]


def at(batch: Mapping[str, jax.Array], index: Any) -> dict[str, jax.Array]:
    """A microbatch of an update."""
    return {name: jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for name, x in batch.items()}


def summed(metrics: Mapping[str, tuple[jax.Array, jax.Array]]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Of each metric the sum of its values times their weights, and that of the weights."""
    return {name: (jnp.sum(value * weight), jnp.sum(weight)) for name, (value, weight) in metrics.items()}


def mean_logits(units: Units, figures: Figures) -> dict[str, tuple[jax.Array, jax.Array]]:
    """`logits/chosen` and `logits/rejected`: the mean over labelled positions and the vocabulary, as a metric."""
    if "logits" not in figures:
        return {}
    means = figures["logits"] / jnp.maximum(units.counts, 1)
    if units.wanted is None:
        chosen, rejected = (means[..., 0], units.share), (means[..., 1], units.share)
    else:
        real = (units.share > 0).astype(means.dtype)
        chosen, rejected = (means[..., 0], units.wanted * real), (means[..., 0], (1 - units.wanted) * real)
    return {"logits/chosen": chosen, "logits/rejected": rejected}
