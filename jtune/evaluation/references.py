"""The sums of a reference model over the sets of a run, computed once before the first update."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jtune.config import Config
from jtune.config.stages import rules_of
from jtune.data import Plan, Splits, UnitSet, units_of
from jtune.data.batching.train import BatchPlan
from jtune.evaluation.reference_cache import kept, key_of
from jtune.evaluation.units import Reference, make_reference
from jtune.loading.model import Model
from jtune.loading.second import load_second
from jtune.loading.source import Source
from jtune.losses.objective import Objective
from jtune.losses.units import UnitObjective
from jtune.train.digest import as_read, tree_fingerprint
from jtune.train.preflight import check_weights
from jtune.tuning import lora

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


class References(NamedTuple):
    """The reference of a run, before the first update.

    Attributes:
      sums: over every set that needs them, under `TRAIN`, `eval` or `eval_<name>`.
      digest: of its parameters; None: the run has none.
    """

    sums: Mapping[str, Reference] = MappingProxyType({})
    digest: str | None = None


def of_second(
    config: Config, source: Source, splits: Splits, mesh: Mesh, objective: Objective | UnitObjective
) -> References | None:
    """`references_of` a second model, which is read for it and given up again, before the one that trains is read.

    None: the run has no second model, or its step needs it.
    """
    if source.second is None or not is_precomputed(config, objective):
        return None
    second = load_second(source.second, mesh)
    check_weights(second.params)
    return references_of(config, second, splits, mesh, objective)


def of_model(
    config: Config, model: Model, splits: Splits, mesh: Mesh, objective: Objective | UnitObjective
) -> References:
    """`references_of` the model as it is at the start, or of the second one beside it."""
    if not isinstance(objective, UnitObjective) or not objective.anchored:
        return References()
    if model.second is not None:
        return references_of(config, model.second, splits, mesh, objective)
    found = references_of(config, model._replace(params=start_of(config, model.params)), splits, mesh, objective)
    return found._replace(digest=tree_fingerprint(start_of(config, as_read(model.params))))


def references_of(
    config: Config, reference: Model, splits: Splits, mesh: Mesh, objective: Objective | UnitObjective
) -> References:
    """The sums of a reference over every set that needs them, computed, or read where they were computed before."""
    assert isinstance(objective, UnitObjective)
    sets = {f"eval_{name}".rstrip("_"): encoded for name, encoded in splits.eval.items()}
    if splits.train is not None and is_precomputed(config, objective):
        sets[TRAIN] = splits.train
    stage, beyond = rules_of(config.finetuning.stage), config.finetuning.ld_alpha
    module, params = reference.module, reference.params
    digest, sums = tree_fingerprint(params), {}
    for name, encoded in sets.items():
        units = units_of(encoded, stage, beyond)
        # Of the training set a step has no more tokens than an update that is padded: what trains fits here, too.
        per_device = config.training.per_device_train_batch_size * len(units.sides) if name == TRAIN else None
        make = partial(make_reference, module, objective, units, mesh, config, per_device)
        compute = lambda make=make: make()(params)
        sums[name] = kept(config, name, key_of(module, digest, units), units, compute)
    return References(sums, digest)


def start_of(config: Config, params: Any) -> Any:
    """The parameters of the reference: the model as it is, without the adapter that trains unless `ref_adapter: start`.

    A run that only evaluates takes the model as it is for its own reference, as LLaMA-Factory does. An adapter that
    begins as a part of the base (PiSSA) belongs to it.
    """
    finetuning, model = config.finetuning, config.model
    is_new = model.adapter_name_or_path == () or finetuning.create_new_adapter
    whole = not config.training.do_train or finetuning.ref_adapter == "start" or (finetuning.pissa_init and is_new)
    return params if whole else lora.split(params)[0]
