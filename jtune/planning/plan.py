"""`jtune plan`: the memory and time of a run, before it runs, on the devices of this machine or on others.

jtune compiles the step that `jtune train` runs ahead of time, for shapes: it reads no weights and makes no arrays. The
compiler gives the memory, arithmetic gives its parts, FLOPs give the time.
"""

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jtune import tuning
from jtune.config import Config
from jtune.config.stages import rules_of
from jtune.data import Sizes, Splits, assumed_sizes, plan_updates, segments_of, units_of
from jtune.errors import DataError
from jtune.evaluation.references import is_precomputed, no_reference, with_reference
from jtune.loading.data import load_data
from jtune.loading.model import with_remat
from jtune.loading.second import with_second
from jtune.loading.source import Source, fetch_model, read_bare_source, read_source
from jtune.loading.vocabulary import is_changed
from jtune.models import DecoderConfig
from jtune.planning.advise import Found, Work, advise, changed, search
from jtune.planning.chips import device_memory, peak_flops, usable_memory
from jtune.planning.compile import measure
from jtune.planning.estimate import estimate, largest
from jtune.planning.flops import program_flops, recomputed_per_token
from jtune.planning.remat import fitting_remat
from jtune.planning.shapes import abstract_program, batch_shapes, bytes_by_kind, global_bytes
from jtune.planning.topology import topology_devices
from jtune.sharding import batch_shards
from jtune.sharding.compiler import use_compile_cache
from jtune.sharding.mesh import check_row_length, mesh_of
from jtune.stages import stage_of
from jtune.train.program import Program

log = logging.getLogger("jtune")

UTILISATION = 0.4  # share of the peak, by model FLOPs, that good training programs reach on most chips
MOST_COMPILES = 4  # of a search
NO_ROWS = "there is no dataset"
SAMPLED_UPDATES = 64  # whose tokens are counted


class Batches(NamedTuple):
    """The batches of a run."""

    shapes: tuple[tuple[int, int, int], ...]  # [accum, batch, seq] that the step is compiled for
    sizes: tuple[Sizes, ...]  # of each shape
    tokens: float  # of an update, padding not counted
    units: int  # of an update: pairs, marked answers, examples, or packed rows
    reference: int  # segments whose reference is computed before the first update
    lengths: np.ndarray  # of the segments
    label_share: float
    steps: int | None  # None: not known
    padding_share: float
    assumed: str | None  # why these figures are not those of the data


class Case(NamedTuple):
    """The constants of a search over settings."""

    source: Source
    splits: Splits | None
    why_no_data: str | None
    devices: list[Any]
    target: str  # the name of the topology, or of the kind of device
    memory: int  # bytes of a device
    usable: int  # of them, by programs


def plan(
    config: Config, *, topology: str | None = None, fit: bool = False, memory: int | None = None
) -> dict[str, Any]:
    """The memory and time of the run of `config` on `topology`, or on the devices of this machine.

    Args:
      topology: such as `v5p:4x4x4` or `h100:8`; call `compile_here_for` before anything else of jax.
      fit: search microbatch, remat and mesh for the fastest setting that fits.
      memory: bytes of a device; default: those of its kind.

    Returns:
      What `jtune plan --json` prints.

    Raises:
      ConfigError: no such topology, or a mesh that does not match it.
      DataError: no config.json, or one of a model that jtune does not know.
    """
    devices = topology_devices(topology) if topology else list(jax.devices())
    mesh_of(config.training, devices)  # one that does not match is refused before anything is read
    if topology is None:
        use_compile_cache(config.training.compile_cache_dir)
    source, why = planned_source(config, fetch_model(config.model, weights=False))
    source = with_second(source, weights=False)
    config, splits = source.config, None
    if source.tokenizer is not None:
        splits, why = read_rows(config, source)
    kind = devices[0].device_kind
    usable = usable_memory(devices[0]) if memory is None else memory
    memory = device_memory(devices[0]) if memory is None else memory
    case = Case(source, splits, why, devices, topology or kind, memory, usable)
    if not fit:
        return plan_case(config, case)
    best, tried = fastest(config, case)
    return plan_case(best.config if best else config, case) | {"fit": {"overrides": best and best.overrides, **tried}}


def plan_case(config: Config, case: Case) -> dict[str, Any]:
    """The plan of one setting."""
    mesh = mesh_of(config.training, case.devices)
    platform, kind = case.devices[0].platform, case.devices[0].device_kind
    program = abstract_program(config, case.source, mesh, platform=platform)
    batches = updates(config, case, batch_shards(mesh))
    sizes = dict(zip(batches.shapes, batches.sizes))
    shape, rows = largest(program, sizes)
    check_row_length(mesh, rows.seq)
    policy = fitting_remat(config, program, sizes, case.target, case.usable)
    program = program._replace(module=with_remat(program.module, policy, platform))
    measured = measure(config, program, shape, sizes[shape], case.target)

    by_kind = bytes_by_kind(program, batch_shapes(shape, sizes[shape], mesh))
    peak = measured["peak"]
    fits = peak <= case.usable and not measured["refused"]
    work = work_of(case.source.decoder, program, batches)
    flops = work.model * batches.tokens
    chip = peak_flops(kind)
    seconds = flops / (chip * UTILISATION * mesh.size) if chip else None
    advice, together = [], None
    if not fits:
        advice, together = advise(config, case.source, program, rows, measured, case.usable, platform=platform)
    state = 0 if config.training.save_only_model else global_bytes(program.state)
    return {
        "model": config.model.model_name_or_path,
        "finetuning_type": config.finetuning.finetuning_type,
        "remat": program.module.remat,
        "target": case.target,
        "device_kind": kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch": {
            "shape": list(shape),
            "shapes": [list(s) for s in batches.shapes],
            "padding_share": batches.padding_share,
            "label_share": batches.label_share,
            "assumed": batches.assumed,
        },
        "parameters": tuning.count(program.params),
        "trained_parameters": sum(x.size for x in jax.tree.leaves(program.state.trainable)),
        "per_device_bytes": {
            **{key: measured[key] for key in ("arguments", "temporaries", "output", "alias", "code", "peak")},
            "by_kind": by_kind,
        },
        "floor_bytes": estimate(program, rows)["floor"],
        "device_memory_bytes": case.memory,
        "usable_memory_bytes": case.usable,
        "fits": fits,
        "refused": measured["refused"],
        "flops_per_token": work.model,
        "flops_per_step": flops,
        "tokens_per_step": batches.tokens,
        "rows": {
            "kind": rules_of(config.finetuning.stage).rows,
            "per_step": batches.units,
            "reference": batches.reference,
        },
        "seconds_per_step": seconds,
        "tokens_per_second": batches.tokens / seconds if seconds else None,
        "utilisation": UTILISATION,
        "steps": batches.steps,
        "run_seconds": seconds * batches.steps if seconds and batches.steps else None,
        "checkpoint_bytes": state + model_bytes(config, case.source, program),
        "advice": advice,
        "advice_together": together,
        "compile_seconds": measured["seconds"],
        "cached": measured["cached"],
    }


def model_bytes(config: Config, source: Source, program: Program) -> int:
    """Bytes of the model's files in a checkpoint: the adapter, or the model in its stored dtype."""
    if config.finetuning.finetuning_type == "lora":
        return global_bytes(program.state.trainable)
    return tuning.count(program.params) * source.stored_dtype.itemsize


def work_of(decoder: DecoderConfig, program: Program, batches: Batches) -> Work:
    model = program_flops(program, lengths=batches.lengths, label_share=batches.label_share)
    return Work(model, recomputed_per_token(decoder, program.params, lengths=batches.lengths))


# ---------------------------------------------------------------------- the batches


def planned_source(config: Config, folder: Path) -> tuple[Source, str | None]:
    """The model and the vocabulary of the run; without a tokenizer where the model has none, and why.

    Raises:
      DataError: there is no tokenizer, and what it would say changes the model.
    """
    try:
        return read_source(config, folder), None
    except DataError as error:
        if is_changed(config.model):
            raise
        bare = read_bare_source(config, folder)
        return bare, str(error).splitlines()[0] if config.data.dataset else NO_ROWS


def read_rows(config: Config, source: Source) -> tuple[Splits | None, str | None]:
    """The encoded sets; or None, and why they cannot be read."""
    if not config.data.dataset:
        return None, NO_ROWS
    try:
        return load_data(changed(config, do_train=True), source.tokenizer, source.vocab_size), None
    except DataError as error:
        return None, str(error).splitlines()[0]


def updates(config: Config, case: Case, shards: int) -> Batches:
    """The batches that the data gives, or, if it was not read, full rows in which every token is labelled."""
    training = config.training
    if case.splits is None:
        rows, seq = training.per_device_train_batch_size, config.data.cutoff_len
        stage = rules_of(config.finetuning.stage)
        seq *= 2 if stage.rows == "pair" else 1
        shape = (training.gradient_accumulation_steps, rows * shards, seq)
        steps = training.max_steps if training.max_steps > 0 else None
        assumed = f"every token counts, no padding, as the rows were not read: {case.why_no_data}"
        return Batches(
            (shape,),
            (assumed_sizes(stage, shape, shards),),
            math.prod(shape),
            rows * shards * training.gradient_accumulation_steps,
            0,
            np.array([config.data.cutoff_len]),
            1.0,
            steps,
            0.0,
            assumed,
        )
    assert case.splits.train is not None
    encoded = case.splits.train
    found = plan_updates(config, encoded, shards, case.splits.stream)
    stage = rules_of(config.finetuning.stage)
    segments = segments_of(encoded, stage)
    objective = stage_of(stage.name).objective(config.finetuning, training)
    referenced = 0
    if is_precomputed(config, objective):
        units = units_of(encoded, stage, config.finetuning.ld_alpha)
        found = with_reference(found, no_reference(units))
        referenced = len(segments) * (1 if units.mismatched is None else 2)
    return Batches(
        tuple((s.accum, s.batch, s.seq) for s in found.shapes),
        tuple(found.sizes(s) for s in found.shapes),
        found.mean_tokens(SAMPLED_UPDATES),
        training.per_device_train_batch_size * shards * training.gradient_accumulation_steps,
        referenced,
        segments.lengths,
        float(segments.labelled.sum() / segments.lengths.sum()),
        found.max_steps,
        found.padding_share,
        f"all rows are like the first {len(encoded):,}: streaming" if case.splits.stream else None,
    )


# ---------------------------------------------------------------------- --fit


def fastest(config: Config, case: Case) -> tuple[Found | None, dict[str, Any]]:
    """The fastest setting that fits, of the few that arithmetic ranks highest; and the settings tried.

    Each compilation shows by how much the arithmetic is off, and corrects it for the next choice.
    """
    platform, kind = case.devices[0].platform, case.devices[0].device_kind
    mesh = mesh_of(config.training, case.devices)
    program = abstract_program(config, case.source, mesh, platform=platform)
    batches = updates(config, case, batch_shards(mesh))
    _, rows = largest(program, dict(zip(batches.shapes, batches.sizes)))
    work = work_of(case.source.decoder, program, batches)
    ranked = search(
        config, case.source, program, rows, work, platform=platform, device_kind=kind, utilisation=UTILISATION
    )
    log.info("%d settings of microbatch, remat and mesh; compiling the fastest of those that should fit", len(ranked))
    quickest = ranked[0].seconds if ranked else 1.0
    tried: list[dict[str, Any]] = []
    best: Found | None = None
    off: dict[str, float] = {}  # measured temporaries over estimated ones, for each kind of remat
    while ranked and len(tried) < MOST_COMPILES:
        scales = [off.get(entry.overrides["remat"], 1.0) for entry in ranked]
        predicted = [e.guess["arguments"] + scale * e.guess["temporaries"] for e, scale in zip(ranked, scales)]
        hopeful = [i for i, size in enumerate(predicted) if size <= case.usable]
        if not hopeful and tried:
            break
        chosen = hopeful[0] if hopeful else int(np.argmin(predicted))
        entry = ranked[chosen]
        result = plan_case(entry.config, case)
        tried.append(
            {
                "overrides": entry.overrides,
                "peak_bytes": result["per_device_bytes"]["peak"],
                "estimated_peak_bytes": entry.guess["peak"],
                "relative_seconds": entry.seconds / quickest,
                "fits": result["fits"],
            }
        )
        measured = result["per_device_bytes"]["temporaries"]
        off[entry.overrides["remat"]] = measured / max(1, entry.guess["temporaries"])
        if result["fits"]:
            best, ranked = entry, ranked[:chosen]  # only faster settings are tried from now on
        else:
            del ranked[chosen]
    return best, {"tried": tried}
