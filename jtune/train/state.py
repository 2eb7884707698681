"""What a training step carries from one update to the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jtune.sharding import replicated
from jtune.train.optimizer import init_optimizer
from jtune.train.optimizers.leafwise import Moments


class LossScale(NamedTuple):
    """Dynamic loss scaling (arXiv:1710.03740): double after `GROWTH_INTERVAL` good steps, halve on overflow."""

    scale: jax.Array  # float32 scalar
    good_steps: jax.Array  # int32 scalar, since the scale last changed


class TrainState(NamedTuple):
    """Everything that changes in training; the step donates it. Frozen parameters are not in it."""

    step: jax.Array  # int32 scalar: updates done
    trainable: Any  # the parameter tree with None for frozen leaves
    opt_state: Any
    loss_scale: LossScale | None  # float16 only
    running: Any = None  # what a loss of units keeps from update to update (`UnitObjective.running`)


def init_state(
    trainable, tx: optax.GradientTransformation, *, float16: bool = False, running: Any = None
) -> TrainState:
    scale = LossScale(jnp.float32(2.0**16), jnp.int32(0)) if float16 else None
    return TrainState(jnp.int32(0), trainable, init_optimizer(tx, trainable), scale, running)


def state_shardings(
    abstract: TrainState, trainable_shardings, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shardings of a whole state: what is kept of a parameter lies where the parameter lies, scalars everywhere.

    Args:
      abstract: `jax.eval_shape` of `init_state`.
      trainable_shardings: tree of shardings like `abstract.trainable`.
    """
    everywhere: Any = replicated(mesh)
    is_moments = lambda x: isinstance(x, Moments)
    opt = optax.tree_utils.tree_map_params(
        tx,
        lambda kept, s: kept.shardings(s) if is_moments(kept) else s,
        abstract.opt_state,
        trainable_shardings,
        transform_non_params=lambda _: everywhere,
        is_leaf=is_moments,
    )
    scalars: Any = jax.tree.map(lambda _: everywhere, (abstract.loss_scale, abstract.running))
    return TrainState(everywhere, trainable_shardings, opt, *scalars)


def abstract_state(
    trainable: Any, tx: optax.GradientTransformation, mesh: Mesh, *, float16: bool, running: Any = None
) -> TrainState:
    """The training state as `ShapeDtypeStruct`s with shardings: optimizer moments lie where their parameters lie."""
    shapes = jax.eval_shape(lambda t: init_state(t, tx, float16=float16, running=running), trainable)
    shardings = state_shardings(shapes, jax.tree.map(lambda x: x.sharding, trainable), tx, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
