"""The train step of a run, from model to compiled program: `jtune train` runs it and `jtune plan` measures it."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from jtune import tuning
from jtune.config import Config
from jtune.data import OTHER, Plan, Sizes
from jtune.loading.model import Model, abstract_like
from jtune.losses.batch import Losses, make_loss_sum, token_losses
from jtune.losses.objective import Objective, step_key
from jtune.losses.reference import frozen_of, step_constants, with_frozen
from jtune.losses.segments import make_unit_losses
from jtune.losses.units import UnitObjective
from jtune.models import CausalLM
from jtune.sharding import arrays, batch_shards, replicated
from jtune.sharding.compiler import compiler_options
from jtune.train.optimizer import optimizer_of
from jtune.train.state import TrainState, abstract_state, shardings_of
from jtune.train.step import Metrics, make_train_step
from jtune.train.timing import Timing
from jtune.tuning.unstack import unstack_layers

log = logging.getLogger("jtune")


class Program(NamedTuple):
    """The train step before it is compiled: all that it depends on but the shape of a batch.

    Attributes:
      params: the prepared tree, as `jax.ShapeDtypeStruct`s with shardings.
      mask: tree of bool: what trains.
      state: what an update changes, as `jax.ShapeDtypeStruct`s with shardings.
      constants: what a step takes and does not change (`jtune.losses.reference.step_constants`): arrays in a run,
        `jax.ShapeDtypeStruct`s in a plan.
      dropout_key: of the random draws of a step; None if it has none.
      second: the module of the reference, where this is another model (`jtune.losses.reference.WithSecond`).
      rounding_key: of the rounding of parameters that are kept in bfloat16; None if there are none.
    """

    module: CausalLM
    objective: Objective | UnitObjective
    tx: optax.GradientTransformation
    params: Any
    mask: Any
    state: TrainState
    constants: Any
    mesh: Mesh | AbstractMesh
    max_grad_norm: float = 1.0
    dropout_key: jax.Array | None = None
    rounding_key: jax.Array | None = None
    second: CausalLM | None = None


def make_program(
    config: Config, model: Model, mesh: Mesh | AbstractMesh, objective: Objective | UnitObjective
) -> Program:
    """The train step of a model that is ready to train, on arrays or on shapes."""
    training, finetuning = config.training, config.finetuning
    trainable, frozen = tuning.partition(model.params, model.mask)
    dtype, second = model.module.dtype, model.second if objective.anchored else None
    tx = optimizer_of(training, finetuning, trainable, model.module.config)
    running = objective.running if isinstance(objective, UnitObjective) else None
    float16 = dtype == jnp.float16
    keeps_adapter = isinstance(objective, UnitObjective) and finetuning.ref_adapter == "start"
    return Program(
        module=model.module,
        objective=objective,
        tx=tx,
        params=abstract_like(model.params),
        mask=model.mask,
        state=abstract_state(trainable, tx, mesh, float16=float16, running=running),  # type: ignore[arg-type]
        constants=step_constants(
            objective, trainable, frozen, dtype, second and second.params, keeps_adapter=keeps_adapter
        ),
        mesh=mesh,
        max_grad_norm=training.max_grad_norm,
        dropout_key=step_key(objective, model.params, training.seed),
        rounding_key=jax.random.key(training.seed) if finetuning.pure_bf16 else None,
        second=second and second.module,
    )


def unstacked(program: Program) -> Program:
    """The program with its frozen parameters as its layers take them (`jtune.tuning.unstack`); stacks are deleted."""
    frozen = unstack_layers(frozen_of(program.constants), program.module)
    return program._replace(constants=with_frozen(program.constants, frozen))


def losses_of(program: Program, sizes: Sizes) -> Losses:
    """What the step sums over a microbatch."""
    shards: int = batch_shards(program.mesh)  # type: ignore[arg-type]
    how: dict[str, Any] = {"label_capacity": sizes.labelled, "batch_shards": shards, "second": program.second}
    if not isinstance(program.objective, UnitObjective):
        return token_losses(make_loss_sum(program.module, objective=program.objective, **how))
    other_capacity = sizes.other[1].labelled if sizes.other else 0
    return make_unit_losses(program.module, program.objective, other_capacity=other_capacity, **how)


def lower_step(program: Program, batch: Mapping[str, jax.ShapeDtypeStruct], sizes: Sizes) -> Any:
    """The train step, lowered for the shapes of a batch.

    Args:
      program: its constants as `jax.ShapeDtypeStruct`s (`unstacked`).
    """
    mesh = program.mesh
    assert isinstance(mesh, Mesh)
    everywhere = replicated(mesh)
    of_state = shardings_of(program.state)
    step = jax.jit(
        make_train_step(
            losses_of(program, sizes),
            program.tx,
            max_grad_norm=program.max_grad_norm,
            dropout_key=program.dropout_key,
            gradients=of_state.trainable,
            rounding_key=program.rounding_key,
        ),
        donate_argnums=0,
        in_shardings=(of_state, shardings_of(program.constants), shardings_of(batch), everywhere),
        out_shardings=(of_state, everywhere),
        compiler_options=compiler_options(mesh),
    )
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    return step.lower(program.state, program.constants, batch, rate)


def compile_steps(
    program: Program, plan: Plan, timing: Timing
) -> Callable[[TrainState, Any, float], tuple[TrainState, Metrics]]:
    """`update(state, batch, learning_rate)`: the train step, compiled ahead of its first use for each shape of batch.

    The state is donated: its new arrays take the place of the old ones. In- and out-shardings are the same and
    explicit; left free, XLA may choose others, which costs a second compilation and the donation.

    Args:
      program: its constants as arrays.
    """
    compiled: dict[Any, Any] = {}
    constants, everywhere = program.constants, replicated(program.mesh)  # type: ignore[arg-type]
    abstract = program._replace(constants=abstract_like(constants))

    def update(state: TrainState, batch: Mapping[str, jax.Array], learning_rate: float):
        shape: Any = batch["input_ids"].shape
        other: Any = batch[f"{OTHER}input_ids"].shape if f"{OTHER}input_ids" in batch else None
        if (shape, other) not in compiled:
            log.info("compiling the step for [accum, batch, seq] = %s", list(shape))
            with timing.spent("compile"):
                lowered = lower_step(abstract, abstract_like(batch), plan.sizes(shape, other))
                compiled[shape, other] = lowered.compile()
        return compiled[shape, other](state, constants, batch, arrays.put(np.float32(learning_rate), everywhere))

    return update
