"""The compiled train step."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jtune.config import FinetuningArguments, TrainingArguments
from jtune.data import Plan
from jtune.loading.model import abstract_like
from jtune.losses.batch import make_loss_sum
from jtune.losses.objective import PLAIN, Objective
from jtune.models import CausalLM
from jtune.sharding import (
    arrays,
    batch_shards,
    replicated,
)
from jtune.sharding.compiler import compiler_options
from jtune.train.state import TrainState, shardings_of
from jtune.train.step import Metrics, make_train_step
from jtune.train.timing import Timing

log = logging.getLogger("jtune")


def rounding_key_of(training: TrainingArguments, finetuning: FinetuningArguments) -> jax.Array | None:
    """The key of the rounding of parameters that are kept in bfloat16."""
    return jax.random.key(training.seed) if finetuning.pure_bf16 else None


def lower_step(
    module: CausalLM,
    tx: optax.GradientTransformation,
    state_like: TrainState,
    frozen_like: Any,
    batch_like: Mapping[str, Any],
    mesh: Mesh,
    *,
    label_capacity: int,
    max_grad_norm: float,
    dropout_key: jax.Array | None,
    rounding_key: jax.Array | None = None,
    objective: Objective = PLAIN,
) -> Any:
    """The train step, lowered for shapes: what `jtune train` runs and what `jtune plan` measures.

    Args:
      frozen_like: see `apart`.
    """
    everywhere = replicated(mesh)
    loss_sum = make_loss_sum(
        module, label_capacity=label_capacity, batch_shards=batch_shards(mesh), objective=objective
    )
    step = jax.jit(
        make_train_step(
            loss_sum,
            tx,
            max_grad_norm=max_grad_norm,
            dropout_key=dropout_key,
            gradients=shardings_of(state_like.trainable),
            rounding_key=rounding_key,
        ),
        donate_argnums=0,
        in_shardings=(shardings_of(state_like), shardings_of(frozen_like), shardings_of(batch_like), everywhere),
        out_shardings=(shardings_of(state_like), everywhere),
        compiler_options=compiler_options(mesh),
    )
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    return step.lower(state_like, frozen_like, batch_like, rate)


def compile_steps(
    module: CausalLM,
    tx: optax.GradientTransformation,
    plan: Plan,
    frozen: Any,
    state_like: TrainState,
    mesh: Mesh,
    *,
    max_grad_norm: float,
    dropout_key: jax.Array | None,
    rounding_key: jax.Array | None = None,
    ledger: Timing,
    objective: Objective = PLAIN,
) -> Callable[[TrainState, Any, float], tuple[TrainState, Metrics]]:
    """`update(state, batch, learning_rate)`: the train step, compiled ahead of its first use for each shape of batch.

    The state is donated: its new arrays take the place of the old ones. In- and out-shardings are the same and
    explicit; left free, XLA may choose others, which costs a second compilation and the donation.
    """
    compiled: dict[tuple[int, int, int], Any] = {}
    everywhere = replicated(mesh)
    frozen_like = abstract_like(frozen)

    def compile_for(shape: tuple[int, int, int], batch: Mapping[str, jax.Array]):
        log.info("compiling the step for [accum, batch, seq] = %s", list(shape))
        lowered = lower_step(
            module,
            tx,
            state_like,
            frozen_like,
            abstract_like(batch),
            mesh,
            label_capacity=plan.label_capacity(shape),
            max_grad_norm=max_grad_norm,
            dropout_key=dropout_key,
            rounding_key=rounding_key,
            objective=objective,
        )
        return lowered.compile()

    def update(state: TrainState, batch: Mapping[str, jax.Array], learning_rate: float):
        accum, rows, seq = batch["input_ids"].shape
        shape = accum, rows, seq
        if shape not in compiled:
            with ledger.spent("compile"):
                compiled[shape] = compile_for(shape, batch)
        return compiled[shape](state, frozen, batch, arrays.put(np.float32(learning_rate), everywhere))

    return update
