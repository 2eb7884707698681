"""One update of the parameters, as one jitted function: accumulate over microbatches, clip, step.

Shape suffixes: A microbatches (accumulation), B batch, T tokens in a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import optax

from jtune.models import CausalLM
from jtune.models.decoder import hidden_states
from jtune.models.moe import balance_loss
from jtune.train.loss import chunk_elements, chunk_positions, sum_labelled, summed_loss
from jtune.train.objective import PLAIN, Objective, embedding_noise, models_of
from jtune.train.optimizer import moved
from jtune.train.state import LossScale, TrainState
from jtune.tuning import prepared_axes

GROWTH_INTERVAL = 2000  # good steps before the float16 loss scale doubles
NOISE = 0x6E656674  # folded into a step's key, for draws that are not those of dropout


class Batch(TypedDict):
    """Arrays `[batch, seq]`, in training `[accum, batch, seq]`. Segment 0 is padding; weight 0 does not count."""

    input_ids: jax.Array  # int32
    targets: jax.Array  # int32, the next token
    positions: jax.Array  # int32, from 0 in each segment
    segment_ids: jax.Array  # int32, from 1 in each row
    loss_weights: jax.Array  # float32
    divisor: jax.Array  # float32 scalar, training only: what the sum of losses is divided by


class Metrics(NamedTuple):
    """Scalars of one update, on the device until someone reads them."""

    loss: jax.Array  # mean over the tokens that count
    grad_norm: jax.Array  # global norm of the trainable gradients, before clipping
    tokens: jax.Array  # tokens that count
    finite: jax.Array  # bool; False: the update was skipped
    loss_scale: jax.Array  # float32, what the loss was multiplied by; 1 unless float16


LossSum = Callable[..., Any]


def make_loss_sum(model: CausalLM, *, label_capacity: int, batch_shards: int, objective: Objective = PLAIN) -> LossSum:
    """`loss_sum(trainable, frozen, batch, key) -> ` weighted sum of token losses, a float32 scalar.

    A mixture whose config has a load-balancing loss adds it to the loss of every token that counts.

    Args:
      objective: the loss of a token and the noise on the input. If it is anchored, `frozen` is an `Anchored`, and the
        reference model runs over the same batch, without noise, dropout or gradient.
    """

    def head(head_params, hidden):
        return model.apply({"params": head_params}, hidden, method="head")

    def token_loss(heads, hidden, targets):
        logits, *reference = map(head, heads, hidden)
        return objective.token_loss(logits, targets, *reference)

    def chunked(heads, hidden_SKD, targets_SK, weights_SK):
        vocab = model.config.vocab_size * len(hidden_SKD)
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
        others = [hidden_states(model, params, *inputs).x for params in models[1:]]
        heads = tuple({name: params[name] for name in model.head_keys} for params in models)
        total = sum_labelled(
            chunked,
            heads,
            (hidden.x, *others),
            batch["targets"],
            batch["loss_weights"],
            capacity=label_capacity,
            shards=batch_shards,
            axes=prepared_axes(heads, model.config),
            mesh=model.mesh,
        )
        if hidden.load is None:
            return total
        # Of a microbatch, for each of its tokens that count: divided by all of them, it is their weighted mean.
        assert model.config.experts is not None
        return total + model.config.experts.aux_coef * balance_loss(hidden.load) * jnp.sum(batch["loss_weights"])

    return loss_sum


def make_train_step(
    loss_sum: LossSum,
    tx: optax.GradientTransformation,
    *,
    max_grad_norm: float,
    dropout_key: jax.Array | None = None,
    gradients: Any = None,
    rounding_key: jax.Array | None = None,
):
    """`train_step(state, frozen, batch, learning_rate) -> (state, metrics)`, to be jitted with `state` donated.

    `batch` holds `[accum, batch, seq]`; the losses and gradients of the microbatches are summed in float32 and divided
    once, by the number of tokens that count in the whole update: accumulation, data parallelism and packing change
    nothing. Gradients exist for trainable leaves only. A non-finite update is skipped and reported.

    Args:
      dropout_key: of dropout and of the noise on embeddings; what is drawn depends on it, the step and the microbatch.
      gradients: shardings of the gradients and of their sums, a tree like `state.trainable`: where the parameters lie,
        so that each device reduces and keeps its own part only. None: XLA decides.
      rounding_key: of the random rounding of bfloat16 parameters. None: they are rounded to the nearest, and stall.
    """
    place = lambda grads: grads if gradients is None else jax.lax.with_sharding_constraint(grads, gradients)

    def accumulate(state: TrainState, frozen, batch: Batch):
        divisor = jnp.maximum(batch["divisor"], 1.0)
        # float16 scales the mean loss, as is usual, so that the scale means the same for every batch size.
        scale = 1.0 if state.loss_scale is None else state.loss_scale.scale / divisor
        rows: dict[str, Any] = {key: x for key, x in batch.items() if key != "divisor"}

        def microbatch(index):
            key = None
            if dropout_key is not None:
                key = jax.random.fold_in(jax.random.fold_in(dropout_key, state.step), index)
            micro = {name: jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for name, x in rows.items()}

            def scaled(trainable):
                loss = loss_sum(trainable, frozen, micro, key)
                return loss * scale, loss

            grads, loss = jax.grad(scaled, has_aux=True)(state.trainable)
            return jax.tree.map(lambda x: x.astype(jnp.float32), (place(grads), loss))

        if rows["input_ids"].shape[0] == 1:
            grads, loss = microbatch(0)
        else:
            # The microbatches that hold anything come first; the others are not computed.
            used = jnp.sum(jnp.any(rows["segment_ids"] > 0, axis=(1, 2)))
            zeros = place(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable)), jnp.float32(0)
            add = lambda index, total: jax.tree.map(jnp.add, total, microbatch(index))
            grads, loss = jax.lax.fori_loop(0, used, add, zeros)
        return jax.tree.map(lambda g: g / (divisor * scale), grads), loss / divisor, divisor

    def train_step(state: TrainState, frozen, batch: Batch, learning_rate) -> tuple[TrainState, Metrics]:
        grads, loss, tokens = accumulate(state, frozen, batch)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if max_grad_norm > 0:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, max_grad_norm / (grad_norm + 1e-6)), grads)

        direction, opt_state = tx.update(grads, state.opt_state, state.trainable)
        key = None if rounding_key is None else jax.random.fold_in(rounding_key, state.step)
        loss_scale = jnp.float32(1) if state.loss_scale is None else state.loss_scale.scale
        trainable = moved(state.trainable, direction, learning_rate, key)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        state = TrainState(
            state.step + 1,
            keep(trainable, state.trainable),
            keep(opt_state, state.opt_state),
            _next_scale(state.loss_scale, finite),
        )
        return state, Metrics(loss, grad_norm, tokens, finite, loss_scale)

    return train_step


def _next_scale(old: LossScale | None, finite) -> LossScale | None:
    if old is None:
        return None
    grow = finite & (old.good_steps + 1 >= GROWTH_INTERVAL)
    scale = jnp.where(finite, jnp.where(grow, old.scale * 2, old.scale), old.scale / 2)
    return LossScale(scale, jnp.where(finite & ~grow, old.good_steps + 1, 0))
