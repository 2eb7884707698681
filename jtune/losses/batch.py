"""The loss of a microbatch, as a sum over its labelled tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jtune.data import OTHER, TOKENS
from jtune.losses.chunked import chunk_elements, chunk_positions, sum_labelled, summed_loss
from jtune.losses.objective import PLAIN, Objective, embedding_noise
from jtune.losses.reference import models_of
from jtune.models import CausalLM
from jtune.models.decoder import hidden_states
from jtune.models.moe import balance_loss
from jtune.sharding import batch_sharding, unit_sharding
from jtune.tuning import prepared_axes

NOISE = 0x6E656674  # folded into a step's key, for draws that are not those of dropout


class Batch(TypedDict):
    """Arrays `[batch, seq]`, in training `[accum, batch, seq]`. Segment 0 is padding; weight 0 does not count."""

    input_ids: jax.Array  # int32
    targets: jax.Array  # int32, the next token
    positions: jax.Array  # int32, from 0 in each segment
    segment_ids: jax.Array  # int32, from 1 in each row
    loss_weights: jax.Array  # float32
    divisor: jax.Array  # float32 scalar, training only: what the sum of losses is divided by


LossSum = Callable[..., Any]


def sharding_of(name: str, mesh: Mesh) -> NamedSharding:
    """Where an array `[accum, batch, ...]` of the batch of an update lies: rows are split, and their tokens; what is
    said of the units of a row lies where its first tokens lie."""
    return batch_sharding(mesh, accumulated=True) if name.removeprefix(OTHER) in TOKENS else unit_sharding(mesh)


class Losses(NamedTuple):
    """What the train step calls.

    Attributes:
      of_microbatch: `of_microbatch(trainable, frozen, micro, key, running) -> (loss, metrics, running)`: the sum of the
        losses, float32 scalar; of each metric the sum of values times weights, and of weights; and what is kept from
        update to update.
      before: `before(trainable, frozen, batch, running) -> (arrays, running)`, over a whole update, without gradient:
        arrays `[accum, ...]` that every microbatch gets its part of, none where they need none.
    """

    of_microbatch: Callable[..., tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]], Any]]
    before: Callable[..., tuple[dict[str, jax.Array], Any]] | None = None


def token_losses(loss_sum: LossSum) -> Losses:
    """A sum of token losses (`make_loss_sum`) as the train step calls it."""
    return Losses(lambda trainable, frozen, micro, key, running: (loss_sum(trainable, frozen, micro, key), {}, running))


def make_loss_sum(
    model: CausalLM,
    *,
    label_capacity: int,
    batch_shards: int,
    objective: Objective = PLAIN,
    second: CausalLM | None = None,
) -> LossSum:
    """`loss_sum(trainable, frozen, batch, key) -> ` weighted sum of token losses, a float32 scalar.

    A mixture whose config has a load-balancing loss adds it to the loss of every token that counts.

    Args:
      objective: the loss of a token and the noise on the input. If it is anchored, `frozen` holds a reference
        (`jtune.losses.reference`), which runs over the same batch, without noise, dropout or gradient.
      second: the module of the reference; None: it has this one.
    """
    modules = model, second or model

    def head(module, head_params, hidden):
        return module.apply({"params": head_params}, hidden, method="head")

    def token_loss(heads, hidden, targets):
        logits, *reference = map(head, modules, heads, hidden)
        return objective.token_loss(logits, targets, *reference)

    def chunked(heads, hidden_SKD, targets_SK, weights_SK):
        vocab = sum(module.config.vocab_size for module, _ in zip(modules, hidden_SKD))
        chunk = chunk_positions(targets_SK.shape[1], vocab, chunk_elements(model.mesh))
        return summed_loss(token_loss, heads, hidden_SKD, targets_SK, weights_SK, chunk)

    def loss_sum(trainable, frozen, batch: Batch, key):
        inputs = batch["input_ids"], batch["positions"], batch["segment_ids"]
        models = models_of(trainable, frozen)
        noise = None
        if objective.noise_alpha:
            shape = model.config.hidden_size, objective.noise_alpha, model.dtype
            noise = embedding_noise(jax.random.fold_in(key, NOISE), batch["segment_ids"], *shape)
        hidden = hidden_states(model, models[0], *inputs, dropout_key=key, embedding_noise=noise)
        others = [hidden_states(module, params, *inputs).x for module, params in zip(modules[1:], models[1:])]
        heads = tuple({name: params[name] for name in module.head_keys} for module, params in zip(modules, models))
        total = sum_labelled(
            chunked,
            heads,
            (hidden.x, *others),
            batch["targets"],
            batch["loss_weights"],
            capacity=label_capacity,
            shards=batch_shards,
            axes=tuple(prepared_axes(head, module.config) for module, head in zip(modules, heads)),
            mesh=model.mesh,
        )
        if hidden.load is None:
            return total
        # Of a microbatch, for each of its tokens that count: divided by all of them, it is their weighted mean.
        assert model.config.experts is not None
        return total + model.config.experts.aux_coef * balance_loss(hidden.load) * jnp.sum(batch["loss_weights"])

    return loss_sum
