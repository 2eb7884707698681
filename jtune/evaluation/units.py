"""Sums over the segments of units, for all units of a set: what evaluations and precomputed references are made of."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jtune.config import Config
from jtune.config.stages import rules_of
from jtune.data import Encoded, EvalBatch, Segments, UnitSet, eval_batches, grouped, units_of
from jtune.evaluation.loss import example_sums
from jtune.loading.second import role_of
from jtune.losses.feedback import with_margins
from jtune.losses.segments import Figures, Owners, SumsOf, mean_logits, of_sums, segment_sums, summed, sums_of
from jtune.losses.units import UnitObjective
from jtune.models import CausalLM
from jtune.models.decoder import hidden_states
from jtune.sharding import arrays, batch_sharding, batch_shards, check_row_length, replicated
from jtune.sharding.compiler import compiler_options
from jtune.train.loop import means_of

Sums = tuple[np.ndarray, dict[str, np.ndarray]]  # float32 [n, S, 2] of units in two parts, and [n, S] of their figures


class Reference(NamedTuple):
    """The sums of a reference model over a set."""

    first: np.ndarray  # float32 [n, S, 2], in two parts (`jtune.losses.segments.segment_sums`)
    other: np.ndarray | None = None  # float32 [n, 1, 2], of mismatched answers


def make_sums(
    module: CausalLM, what: SumsOf, units: UnitSet, mesh: Mesh, config: Config, per_device: int | None = None
) -> tuple[Callable[[Any], Sums], int]:
    """`sums(params)` over all units of a set, and the number of its steps. Segments lie in rows without their units.

    Args:
      per_device: rows as long as the longest segment of a step, on each shard; None: `per_device_eval_batch_size`.
    """
    segments, shards = Segments(units), batch_shards(mesh)
    rows, everywhere = batch_sharding(mesh, accumulated=False), replicated(mesh)
    plan = eval_batches(
        segments,
        stage=rules_of(config.finetuning.stage),
        per_device_batch_size=per_device or config.training.per_device_eval_batch_size,
        batch_shards=shards,
        cutoff_len=config.data.cutoff_len,
    )
    check_row_length(mesh, plan.shape[1])

    def of_batch(params: Any, batch: Any, example_BT: jax.Array) -> tuple[jax.Array, Figures]:
        hidden = hidden_states(module, params, batch["input_ids"], batch["positions"], batch["segment_ids"]).x
        owners, capacity = Owners(example_BT, plan.slots), plan.label_capacity
        return segment_sums(module, what, params, hidden, batch, owners, capacity=capacity, shards=shards)

    compiled = jax.jit(of_batch, out_shardings=everywhere, compiler_options=compiler_options(mesh))

    def step(params: Any, batch: EvalBatch) -> Any:
        return compiled(params, *jax.tree.map(lambda x: arrays.put(x, rows), (batch.arrays, batch.example)))

    def sums(params: Any) -> Sums:
        of_unit = lambda x: x.reshape(len(units), segments.width, *x.shape[1:]).astype(np.float32)
        return jax.tree.map(of_unit, example_sums(partial(step, params), plan))

    return sums, len(plan)


def make_reference(
    module: CausalLM,
    objective: UnitObjective,
    units: UnitSet,
    mesh: Mesh,
    config: Config,
    per_device: int | None = None,
) -> Callable[[Any], Reference]:
    """`reference(params)`: the sums of a reference model with these parameters over a set.

    Args:
      per_device: see `make_sums`.
    """
    what = sums_of(module, objective)
    of = [make_sums(module, what, x, mesh, config, per_device)[0] for x in (units, units.mismatched) if x is not None]
    return lambda params: Reference(*(sums(params)[0] for sums in of))


def make_unit_measure(
    module: CausalLM,
    sets: Mapping[str, Encoded],
    mesh: Mesh,
    config: Config,
    objective: UnitObjective,
    references: Mapping[str, Reference],
) -> Callable[..., tuple[dict[str, Sums], dict[str, float]]]:
    """`measure(params, "eval", running)`: the sums of every evaluation set by its name, and its loss and metrics, under
    `eval_` or `eval_<name>_`.

    `running` is what training has kept from update to update so far (`UnitObjective.running`); None: its first value.
    Each set goes on from there, and what it would make of it is forgotten: an evaluation does not change training.

    Args:
      references: the sums of the reference over each set, under `eval` or `eval_<name>`; empty without a reference.
    """
    stage, beyond = rules_of(config.finetuning.stage), config.finetuning.ld_alpha
    what, size = sums_of(module, objective), config.training.per_device_eval_batch_size * batch_shards(mesh)
    # A model that is its own reference has no rewards; LLaMA-Factory leaves them out, too.
    is_own = objective.anchored and not config.training.do_train and role_of(config) is None
    prepared = {}
    for name, encoded in sets.items():
        units = units_of(encoded, stage, beyond)
        others = None if units.mismatched is None else make_sums(module, what, units.mismatched, mesh, config)[0]
        prepared[name] = units, *make_sums(module, what, units, mesh, config), others

    def measure(params: Any, prefix: str, running: Any = None) -> tuple[dict[str, Sums], dict[str, float]]:
        of_run = objective if running is None else objective._replace(running=jax.device_get(running))
        every: dict[str, Sums] = {}
        metrics: dict[str, float] = {}
        for name, (units, sums, steps, others) in prepared.items():
            began = time.monotonic()
            reference = references[f"eval_{name}".rstrip("_")] if objective.anchored else None
            other = others(params)[0] if others else None
            every[name] = sums(params)
            found = figures_of(of_run, units, every[name], other, reference, size)
            seconds = max(1e-9, time.monotonic() - began)
            if is_own:
                found = {key: value for key, value in found.items() if not key.startswith("rewards/")}
            found |= {
                "runtime": round(seconds, 4),
                "samples_per_second": round(len(units) / seconds, 3),
                "steps_per_second": round(steps / seconds, 3),
            }
            metrics |= {f"{f'{prefix}_{name}'.rstrip('_')}_{key}": value for key, value in found.items()}
        return every, metrics

    return measure


def score_lines(sums: Mapping[str, Sums]) -> list[dict[str, float]]:
    """The scores of all pairs of the sets, in their order, rounded as LLaMA-Factory writes them.

    >>> score_lines({"": (np.array([[[0.5, 0.001], [-0.25, 0.0]]]), {})})
    [{'chosen': 0.5, 'rejected': -0.25}]
    """
    pairs = (pair for parts, _ in sums.values() for pair in parts.sum(-1, dtype=np.float64))
    return [{"chosen": round(float(chosen), 2), "rejected": round(float(rejected), 2)} for chosen, rejected in pairs]


def figures_of(
    objective: UnitObjective,
    units: UnitSet,
    sums: Sums,
    other: np.ndarray | None,
    reference: Reference | None,
    size: int,
) -> dict[str, float]:
    """The mean loss of units, and the means of what is logged of them, over LLaMA-Factory's batches of `size`.

    Args:
      objective: its `running` is what the set goes on from.
      other: sums of the mismatched answers, of feedback.
    """
    group, share = map(jnp.asarray, grouped(len(units), size))
    fields = {name: jnp.asarray(x) for name, x in units.fields.items()}
    of_reference = None if reference is None else jnp.asarray(reference.first)
    found = of_sums(jnp.asarray(sums[0]), of_reference, share=share, group=group, **fields)
    if objective.shared is not None:
        first = found
        if units.mismatched is not None:
            assert other is not None
            of_other = None if reference is None or reference.other is None else jnp.asarray(reference.other)
            fields = {name: jnp.asarray(x) for name, x in units.mismatched.fields.items()}
            first = of_sums(jnp.asarray(other), of_other, share=share, group=group, **fields)
        found = found._replace(shared=objective.shared(first, group, objective.running)[0])
    losses, metrics = objective.loss(found)
    metrics |= mean_logits(found, {name: jnp.asarray(x) for name, x in sums[1].items()})
    totals = jax.tree.map(float, summed(metrics))
    return with_margins({"loss": float(jnp.mean(losses))} | means_of(totals))
