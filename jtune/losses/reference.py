"""The reference model of an objective that has one: the model as it was at the start, or another model."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtune.losses.objective import Objective
from jtune.losses.units import UnitObjective
from jtune.tuning import adapter_mask, combine, lora, partition

# ---------------------------------------------------------------------- the reference


class WithReference(NamedTuple):
    """What a step takes and does not change, where the objective is anchored: it stands in the place of `frozen`.

    `start` is what trains, adapters apart, as it was at the start, and None elsewhere. Of an adapter nothing is kept:
    the reference is the model without it, whose parameters are in `frozen` already.
    """

    frozen: Any
    start: Any


class WithStart(NamedTuple):
    """The same, where the reference is the model at the start, adapter and all: `start` is what trains, as it was."""

    frozen: Any
    start: Any


class WithSecond(NamedTuple):
    """The same, where the reference is a second model, with a module of its own (`jtune.loading.second`)."""

    frozen: Any
    second: Any  # its parameters


KINDS = WithReference, WithStart, WithSecond


def start_of(trainable: Any, dtype: Any) -> Any:
    """A copy of what trains; in `dtype` where that is smaller. To be jitted."""
    smaller = lambda x: x.astype(dtype) if jnp.dtype(dtype).itemsize < x.dtype.itemsize else x
    return jax.tree.map(lambda x: jnp.copy(smaller(x)), trainable)


def without_adapters(trainable: Any) -> Any:
    """What trains, adapters apart."""
    return partition(trainable, adapter_mask(trainable))[1]


def models_of(trainable: Any, frozen: Any) -> list[Any]:
    """The parameters of the model, and those of the reference if `frozen` holds one."""
    own = combine(trainable, frozen_of(frozen))
    if isinstance(frozen, WithSecond):
        return [own, frozen.second]
    if isinstance(frozen, WithStart):
        return [own, combine(frozen.start, frozen.frozen)]
    if isinstance(frozen, WithReference):
        return [own, lora.split(combine(frozen.start, frozen.frozen))[0]]
    return [own]


def step_constants(
    objective: Objective | UnitObjective,
    trainable: Any,
    frozen: Any,
    dtype: jnp.dtype,
    second: Any = None,
    *,
    keeps_adapter: bool = False,
) -> Any:
    """What the step takes and does not change: `frozen`, and what the reference of an anchored objective needs besides.

    Args:
      trainable: as it is at the start, of arrays or of `jax.ShapeDtypeStruct`s with shardings, which give the same.
      dtype: of the computation: the copy is no wider.
      second: parameters of the model that is the reference; None: it is this one as it is at the start.
      keeps_adapter: with its adapter.
    """
    if not objective.anchored:
        return frozen
    if second is not None:
        return WithSecond(frozen, second)
    kind = WithStart if keeps_adapter else WithReference
    trainable = trainable if keeps_adapter else without_adapters(trainable)
    copied, where = partial(start_of, dtype=dtype), jax.tree.map(lambda x: x.sharding, trainable)
    if any(isinstance(x, jax.Array) for x in jax.tree.leaves(trainable)):
        return kind(frozen, jax.jit(copied, out_shardings=where)(trainable))
    placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return kind(frozen, jax.tree.map(placed, jax.eval_shape(copied, trainable), where))


def frozen_of(constants: Any) -> Any:
    """The frozen parameters among what a step takes and does not change."""
    return constants.frozen if isinstance(constants, KINDS) else constants


def with_frozen(constants: Any, frozen: Any) -> Any:
    """The constants of a step with other frozen parameters."""
    return constants._replace(frozen=frozen) if isinstance(constants, KINDS) else frozen
