"""One update of the parameters, as one jitted function: accumulate over microbatches, clip, step.

Shape suffixes: A microbatches (accumulation), B batch, T tokens in a row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jtune.data import OTHER
from jtune.losses.batch import Batch, Losses
from jtune.train.optimizer import apply_update
from jtune.train.state import LossScale, TrainState

GROWTH_INTERVAL = 2000  # good steps before the float16 loss scale doubles


class Metrics(NamedTuple):
    """Scalars of one update, on the device until someone reads them."""

    loss: jax.Array  # mean over the tokens that count; of units, mean over LLaMA-Factory's microbatches
    grad_norm: jax.Array  # global norm of the trainable gradients, before clipping
    tokens: jax.Array  # what the sum of losses was divided by: tokens that count
    finite: jax.Array  # bool; False: the update was skipped
    loss_scale: jax.Array  # float32, what the loss was multiplied by; 1 unless float16
    figures: dict[str, tuple[jax.Array, jax.Array]]  # of units, of each metric: a weighted sum, the sum of weights


def make_train_step(
    losses: Losses,
    tx: optax.GradientTransformation,
    *,
    max_grad_norm: float,
    dropout_key: jax.Array | None = None,
    gradients: Any = None,
    rounding_key: jax.Array | None = None,
):
    """`train_step(state, frozen, batch, learning_rate) -> (state, metrics)`, to be jitted with `state` donated.

    `batch` holds `[accum, batch, seq]`. The step sums the losses and gradients of the microbatches in float32 and
    divides once, by the number of tokens that count in the whole update: accumulation, data parallelism and packing
    change nothing. Gradients exist for trainable leaves only. A non-finite update is skipped and reported.

    Args:
      dropout_key: of dropout and of the noise on embeddings; draws depend on it, the step and the microbatch.
      gradients: shardings of the gradients and of their sums, a tree like `state.trainable`: those of the parameters,
        so that each device reduces and keeps its own shard only. None: XLA decides.
      rounding_key: of the stochastic rounding of bfloat16 parameters. None: round to nearest, where they stall.
    """
    place = lambda grads: grads if gradients is None else jax.lax.with_sharding_constraint(grads, gradients)

    def accumulate(state: TrainState, frozen, batch: Batch):
        running = state.running
        divisor = jnp.maximum(batch["divisor"], 1.0)
        # float16 scales the mean loss, as is usual, so that the scale means the same for every batch size.
        scale = 1.0 if state.loss_scale is None else state.loss_scale.scale / divisor
        rows: dict[str, Any] = {key: x for key, x in batch.items() if key != "divisor" and not key.startswith(OTHER)}
        if losses.before is not None:
            more, running = losses.before(state.trainable, frozen, batch, running)
            rows |= more

        def microbatch(index):
            key = None
            if dropout_key is not None:
                key = jax.random.fold_in(jax.random.fold_in(dropout_key, state.step), index)
            micro = {name: jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for name, x in rows.items()}

            def scaled(trainable):
                loss, figures, after = losses.of_microbatch(trainable, frozen, micro, key, running)
                return loss * scale, (loss, figures, after)

            grads, (loss, figures, after) = jax.grad(scaled, has_aux=True)(state.trainable)
            return jax.tree.map(lambda x: x.astype(jnp.float32), (place(grads), loss, figures)), after

        if rows["input_ids"].shape[0] == 1:
            (grads, loss, figures), running = microbatch(0)
        else:
            # Microbatches with tokens come first; empty ones are not computed.
            used = jnp.sum(jnp.any(rows["segment_ids"] > 0, axis=(1, 2)))
            zeros = place(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable)), jnp.float32(0)
            of_figures = jax.eval_shape(lambda: microbatch(0)[0][2])
            zeros = *zeros, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), of_figures)
            add = lambda index, total: jax.tree.map(jnp.add, total, microbatch(index)[0])
            grads, loss, figures = jax.lax.fori_loop(0, used, add, zeros)
        return jax.tree.map(lambda g: g / (divisor * scale), grads), loss / divisor, divisor, figures, running

    def train_step(state: TrainState, frozen, batch: Batch, learning_rate) -> tuple[TrainState, Metrics]:
        grads, loss, tokens, figures, running = accumulate(state, frozen, batch)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if max_grad_norm > 0:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, max_grad_norm / (grad_norm + 1e-6)), grads)

        direction, opt_state = tx.update(grads, state.opt_state, state.trainable)
        key = None if rounding_key is None else jax.random.fold_in(rounding_key, state.step)
        loss_scale = jnp.float32(1) if state.loss_scale is None else state.loss_scale.scale
        trainable = apply_update(state.trainable, direction, learning_rate, key)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        state = TrainState(
            state.step + 1,
            keep(trainable, state.trainable),
            keep(opt_state, state.opt_state),
            _next_scale(state.loss_scale, finite),
            keep(running, state.running),
        )
        return state, Metrics(loss, grad_norm, tokens, finite, loss_scale, figures)

    return train_step


def _next_scale(old: LossScale | None, finite) -> LossScale | None:
    if old is None:
        return None
    grow = finite & (old.good_steps + 1 >= GROWTH_INTERVAL)
    scale = jnp.where(finite, jnp.where(grow, old.scale * 2, old.scale), old.scale / 2)
    return LossScale(scale, jnp.where(finite & ~grow, old.good_steps + 1, 0))
