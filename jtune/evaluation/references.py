"""The sums of a reference model over the sets of a run, computed once before the first update."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jtune.config import Config
from jtune.config.stages import rules_of
from jtune.data import Plan, Splits, UnitSet, units_of
from jtune.data.batching.train import BatchPlan
from jtune.evaluation.units import Reference, make_reference
from jtune.loading.model import Model
from jtune.losses.objective import Objective
from jtune.losses.units import UnitObjective
from jtune.tuning import lora

log = logging.getLogger("jtune")

TRAIN = "train"  # the name of the training set; those of evaluation sets are `eval` and `eval_<name>`


def is_precomputed(config: Config, objective: Objective | UnitObjective) -> bool:
    """Whether the batches bring the sums of a reference of units. Not where rows come as a stream, or where every
    update is to run the reference (`precompute_ref_log_probs: false`)."""
    asked = config.finetuning.precompute_ref_log_probs is not False
    return isinstance(objective, UnitObjective) and objective.anchored and asked and not config.data.streaming


def of_step(config: Config, objective: Objective | UnitObjective) -> Objective | UnitObjective:
    """The objective of the train step, which needs no reference where the batches bring its sums."""
    return objective._replace(anchored=False) if is_precomputed(config, objective) else objective


def no_reference(units: UnitSet) -> Reference:
    """Zeros in the place of the sums of a reference, for what looks at shapes only."""
    other = units.mismatched
    zeros = lambda units: np.zeros((*units.counts.shape, 2), np.float32)
    return Reference(zeros(units), None if other is None else zeros(other))


def with_reference(plan: Plan, reference: Reference | None) -> Plan:
    """The plan, whose batches bring the sums of a reference."""
    if reference is None:
        return plan
    assert isinstance(plan, BatchPlan)
    return plan.with_reference(reference.first, reference.other)


def precompute(
    config: Config, model: Model, splits: Splits, mesh: Mesh, objective: Objective | UnitObjective
) -> Mapping[str, Reference]:
    """The sums of the reference over every set that needs them; nothing where units have no reference."""
    if not isinstance(objective, UnitObjective) or not objective.anchored:
        return {}
    sets = {f"eval_{name}".rstrip("_"): encoded for name, encoded in splits.eval.items()}
    if splits.train is not None and is_precomputed(config, objective):
        sets[TRAIN] = splits.train
    stage, beyond = rules_of(config.finetuning.stage), config.finetuning.ld_alpha
    params = start_of(config, model)
    found = {}
    for name, encoded in sets.items():
        log.info("reference: log-probabilities of %d rows (%s)", len(encoded), name)
        units = units_of(encoded, stage, beyond)
        # Of the training set a step has no more tokens than an update that is padded: what trains fits here, too.
        per_device = config.training.per_device_train_batch_size * len(units.sides) if name == TRAIN else None
        found[name] = make_reference(model.module, objective, units, mesh, config, per_device)(params)
    return found


def start_of(config: Config, model: Model) -> Any:
    """The parameters of the reference: the model as it is, without the adapter that trains.

    A run that only evaluates takes the model as it is for its own reference, as LLaMA-Factory does.
    """
    return lora.split(model.params)[0] if config.training.do_train else model.params
