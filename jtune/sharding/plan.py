"""`jtune plan`: what a run will take, before it takes it, on these devices or on others.

The step that `jtune train` runs is compiled ahead of time, for shapes: no weights are read, no arrays are made. What
the compiler says of its memory is put beside what follows from arithmetic; time follows from FLOPs.
"""

import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jtune
from jtune import tuning
from jtune.config import Config
from jtune.data import Encoded, load_tokenizer
from jtune.errors import DataError
from jtune.inspect import human
from jtune.interop import hf
from jtune.models import DecoderConfig
from jtune.models.families import decoder_config
from jtune.sharding import batch_shards
from jtune.sharding.advice import Candidate, Rows, Work, advise, changed, estimate, search
from jtune.sharding.mesh import AXES, make_mesh
from jtune.sharding.shapes import Shapes, batch_shapes, bytes_by_kind, global_bytes, run_shapes
from jtune.sharding.topology import device_memory, topology_devices
from jtune.train import build
from jtune.train.flops import flops_per_token, peak_flops, recomputed_per_token
from jtune.train.run import load_data, plan_updates

log = logging.getLogger("jtune")

UTILISATION = 0.4  # of the peak, by model FLOPs: what good training programs reach on most chips
MOST_COMPILES = 4  # of a search
SAMPLED_UPDATES = 64  # whose tokens are counted


class Batches(NamedTuple):
    """What the updates of a run hold."""

    shapes: tuple[tuple[int, int, int], ...]  # [accum, batch, seq] that the step is compiled for
    capacities: tuple[int, ...]  # labelled targets of a shard, of each shape
    tokens: float  # of an update, padding not counted
    lengths: np.ndarray  # of the segments
    label_share: float
    steps: int | None  # None: not known
    padding_share: float
    assumed: str | None  # why this is not what the data says


class Case(NamedTuple):
    """What does not change while settings are tried."""

    source: dict[str, Any]
    decoder: DecoderConfig
    encoded: Encoded | None
    why_no_data: str | None
    devices: list[Any]
    target: str  # the name of the topology, or of the kind of device
    memory: int  # bytes of a device


def plan(
    config: Config, *, topology: str | None = None, fit: bool = False, memory: int | None = None
) -> dict[str, Any]:
    """What the run of `config` takes on `topology`, or on the devices that are here.

    Args:
      topology: as `v5p:4x4x4`; call `compile_for_tpu_here` before anything else of jax.
      fit: search microbatch, remat and mesh for the fastest setting that fits.
      memory: bytes of a device, in place of what its kind has.

    Returns:
      What `jtune plan --json` prints.

    Raises:
      ConfigError: no such topology, or a mesh that does not match it.
      DataError: no config.json, or one of a model that jtune does not know.
    """
    assert config.model.model_name_or_path is not None
    folder = hf.fetch(config.model.model_name_or_path, weights=False, **config.model.hub)
    source = hf.read_config(folder)
    decoder = decoder_config(source)
    encoded, why = read_rows(config, folder, decoder)
    devices = topology_devices(topology) if topology else list(jax.devices())
    if topology is None:
        build.use_compile_cache(config.training.compile_cache_dir)
    memory = device_memory(devices[0]) if memory is None else memory
    case = Case(source, decoder, encoded, why, devices, topology or devices[0].device_kind, memory)
    if not fit:
        return plan_case(config, case)
    best, tried = fastest(config, case)
    return plan_case(best.config if best else config, case) | {"fit": {"overrides": best and best.overrides, **tried}}


def plan_case(config: Config, case: Case) -> dict[str, Any]:
    """The plan of one setting."""
    mesh = make_mesh(devices=case.devices, **{axis: getattr(config.training, f"mesh_{axis}") for axis in AXES})
    platform, kind = case.devices[0].platform, case.devices[0].device_kind
    shapes = run_shapes(config, case.decoder, case.source, mesh, platform=platform)
    batches = updates(config, case, batch_shards(mesh))
    shape, rows = largest(shapes, batches)
    measured = measure(config, shapes, shape, rows_capacity(batches, shape), case.target)

    by_kind = bytes_by_kind(shapes, batch_shapes(shape, mesh))
    peak = measured["peak"]
    fits = peak <= case.memory and not measured["refused"]
    work = work_of(case.decoder, shapes, batches)
    flops = work.model * batches.tokens
    chip = peak_flops(kind)
    seconds = flops / (chip * UTILISATION * mesh.size) if chip else None
    advice = []
    if not fits:
        advice = advise(config, case.source, shapes, rows, measured, case.memory, platform=platform)
    state = 0 if config.training.save_only_model else global_bytes(shapes.state)
    return {
        "model": config.model.model_name_or_path,
        "finetuning_type": config.finetuning.finetuning_type,
        "remat": shapes.module.remat,
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
        "parameters": sum(x.size for x in jax.tree.leaves(shapes.params)),
        "trained_parameters": sum(x.size for x in jax.tree.leaves(shapes.state.trainable)),
        "per_device_bytes": {
            **{key: measured[key] for key in ("arguments", "temporaries", "output", "alias", "code", "peak")},
            "by_kind": by_kind,
        },
        "floor_bytes": estimate(shapes, rows)["floor"],
        "device_memory_bytes": case.memory,
        "fits": fits,
        "refused": measured["refused"],
        "flops_per_token": work.model,
        "flops_per_step": flops,
        "tokens_per_step": batches.tokens,
        "seconds_per_step": seconds,
        "tokens_per_second": batches.tokens / seconds if seconds else None,
        "utilisation": UTILISATION,
        "steps": batches.steps,
        "run_seconds": seconds * batches.steps if seconds and batches.steps else None,
        "checkpoint_bytes": state + model_bytes(config, case.source, shapes),
        "advice": advice,
        "compile_seconds": measured["seconds"],
        "cached": measured["cached"],
    }


def model_bytes(config: Config, source: Mapping[str, Any], shapes: Shapes) -> int:
    """Of the files that a checkpoint holds for others: the adapter, or the model as it was stored."""
    if config.finetuning.finetuning_type == "lora":
        return global_bytes(shapes.state.trainable)
    return sum(x.size for x in jax.tree.leaves(shapes.params)) * hf.stored_dtype(source).itemsize


def work_of(decoder: DecoderConfig, shapes: Shapes, batches: Batches) -> Work:
    model = flops_per_token(
        decoder, shapes.params, shapes.mask, lengths=batches.lengths, label_share=batches.label_share
    )
    return Work(model, recomputed_per_token(decoder, shapes.params, lengths=batches.lengths))


# ---------------------------------------------------------------------- the batches


def read_rows(config: Config, folder: Path, decoder: DecoderConfig) -> tuple[Encoded | None, str | None]:
    """The encoded training set; or None, and why it cannot be read."""
    if not config.data.dataset:
        return None, "there is no dataset"
    try:
        tokenizer = load_tokenizer(str(folder), split_special_tokens=config.model.split_special_tokens)
        return load_data(changed(config, do_train=True), tokenizer, decoder.vocab_size).train, None
    except DataError as error:
        return None, str(error).splitlines()[0]


def updates(config: Config, case: Case, shards: int) -> Batches:
    """The batches that the data gives, or, if it was not read, full rows in which every token is labelled."""
    training = config.training
    if case.encoded is None:
        rows, seq = training.per_device_train_batch_size, config.data.cutoff_len
        shape = (training.gradient_accumulation_steps, rows * shards, seq)
        steps = training.max_steps if training.max_steps > 0 else None
        assumed = f"every token counts, no padding, as the rows were not read: {case.why_no_data}"
        return Batches((shape,), (rows * seq,), math.prod(shape), np.array([seq]), 1.0, steps, 0.0, assumed)
    encoded = case.encoded
    found = plan_updates(config, encoded, shards)
    some = np.unique(np.linspace(0, found.max_steps - 1, min(SAMPLED_UPDATES, found.max_steps)).astype(int))
    return Batches(
        tuple((s.accum, s.batch, s.seq) for s in found.shapes),
        tuple(found.label_capacity(s) for s in found.shapes),
        float(np.mean([found.tokens(int(step)) for step in some])),
        encoded.lengths,
        float(encoded.labelled.sum() / encoded.lengths.sum()),
        found.max_steps,
        found.padding_share,
        None,
    )


def rows_capacity(batches: Batches, shape: tuple[int, int, int]) -> int:
    return batches.capacities[batches.shapes.index(shape)]


def largest(shapes: Shapes, batches: Batches) -> tuple[tuple[int, int, int], Rows]:
    """The shape of batch that needs most memory, and what of it a device sees."""
    assert not isinstance(shapes.mesh, jax.sharding.AbstractMesh)
    shards = batch_shards(shapes.mesh)

    def seen(shape: tuple[int, int, int]) -> Rows:
        accum, batch, seq = shape
        return Rows(accum, batch // shards, seq, rows_capacity(batches, shape) / (batch // shards * seq))

    shape = max(batches.shapes, key=lambda shape: estimate(shapes, seen(shape))["peak"])
    return shape, seen(shape)


# ---------------------------------------------------------------------- compiling


def measure(config: Config, shapes: Shapes, shape: tuple[int, int, int], capacity: int, target: str) -> dict[str, Any]:
    """Compile the step for a shape of batch; what one device holds while it runs, in bytes.

    Kept on disk: the same step for the same devices is not compiled again.
    """
    training = config.training
    assert not isinstance(shapes.mesh, jax.sharding.AbstractMesh)
    settings = (training.max_grad_norm, training.adam_beta1, training.adam_beta2, training.adam_epsilon)
    step = (shapes.module, settings, training.weight_decay, _described(shapes.state), _described(shapes.frozen))
    key = fingerprint(step, jax.tree.structure(shapes.params), dict(shapes.mesh.shape), shape, capacity, target)
    root = Path(training.compile_cache_dir) if training.compile_cache_dir else Path.home() / ".cache" / "jtune"
    path = root / "plans" / f"{key}.json"
    try:
        return json.loads(path.read_text()) | {"cached": True}
    except (OSError, ValueError):
        pass
    log.info("compiling the step for [accum, batch, seq] = %s on %d x %s", list(shape), shapes.mesh.size, target)
    began = time.monotonic()
    batch = batch_shapes(shape, shapes.mesh)
    lowered = build.lower_step(
        shapes.module,
        shapes.tx,
        shapes.state,
        shapes.frozen,
        batch,
        shapes.mesh,
        label_capacity=capacity,
        max_grad_norm=training.max_grad_norm,
        dropout_key=jax.random.key(training.seed) if tuning.lora.has_dropout(shapes.params) else None,
    )
    try:
        found = _sizes(lowered.compile().memory_analysis())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = refused(str(error), sum(bytes_by_kind(shapes, batch).values()))
    found["seconds"] = round(time.monotonic() - began, 2)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.replace(path)
    return found | {"cached": False}


def _sizes(stats: Any) -> dict[str, Any]:
    found = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "output": stats.output_size_in_bytes,
        "alias": stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    peak = sum(found.values()) - 2 * found["alias"]  # what is donated is argument and output at once
    return found | {"peak": peak, "refused": None}


def refused(message: str, arguments: int) -> dict[str, Any]:
    """What is known of a program that the compiler gave up on, as it needs more memory than the device has.

    >>> refused("Ran out of memory in memory space hbm. Used 29.50G of 15.75G hbm.", 2**30)["peak"] / 2**30
    29.5
    >>> refused("memory required for HLO temporaries (41.00G) exceeds available HBM (15.75G)", 2**30)["peak"] / 2**30
    42.0
    """
    sized = r"([\d.]+)([KMGT]?)"
    size = lambda m: int(float(m[1]) * 1024 ** " KMGT".index(m[2] or " "))
    needed = re.search(rf"HLO temporaries \({sized}\)", message)
    used = re.search(rf"Used {sized} of", message)
    temporaries = size(needed) if needed else max(0, size(used) - arguments) if used else 0
    said = " ".join(message.split("\n\n")[0].split())
    peak = arguments + temporaries
    known = {"arguments": arguments, "temporaries": temporaries, "peak": peak, "refused": said}
    return {"output": 0, "alias": 0, "code": 0, **known}


def _described(tree: Any) -> list[Any]:
    """Everything about a tree of shapes that a compiled program depends on."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), x.shape, x.dtype.name, str(x.sharding.spec)) for path, x in leaves]


def fingerprint(*parts: Any) -> str:
    """A digest of `parts`, of the versions of everything that compiles, and of jtune's own code."""
    digest = hashlib.sha256(repr(parts).encode())
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        try:
            digest.update(f"{name} {version(name)}".encode())
        except PackageNotFoundError:
            digest.update(name.encode())
    root = Path(jtune.__file__).parent
    for folder in ("models", "tuning", "train", "sharding"):
        for path in sorted((root / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


# ---------------------------------------------------------------------- --fit


def fastest(config: Config, case: Case) -> tuple[Candidate | None, dict[str, Any]]:
    """The fastest setting that fits, of the few that arithmetic says are worth compiling; and what was tried.

    Each compilation says by how much the arithmetic is off, which is put right for the next choice.
    """
    platform, kind = case.devices[0].platform, case.devices[0].device_kind
    mesh = make_mesh(devices=case.devices, **{axis: getattr(config.training, f"mesh_{axis}") for axis in AXES})
    shapes = run_shapes(config, case.decoder, case.source, mesh, platform=platform)
    batches = updates(config, case, batch_shards(mesh))
    _, rows = largest(shapes, batches)
    work = work_of(case.decoder, shapes, batches)
    ranked = search(
        config, case.source, shapes, rows, work, platform=platform, device_kind=kind, utilisation=UTILISATION
    )
    log.info("%d settings of microbatch, remat and mesh; compiling the fastest of those that should fit", len(ranked))
    tried: list[dict[str, Any]] = []
    best: Candidate | None = None
    off = 1.0  # measured temporaries over estimated ones
    while len(tried) < MOST_COMPILES:
        predicted = lambda entry, off=off: entry[1]["arguments"] + off * entry[1]["temporaries"]
        hopeful = [entry for entry in ranked if predicted(entry) <= case.memory]
        if not hopeful and not tried and ranked:
            hopeful = [min(ranked, key=predicted)]
        if not hopeful:
            break
        chosen = hopeful[0]
        seconds, guess, candidate = chosen
        result = plan_case(candidate.config, case)
        tried.append(
            {
                "overrides": candidate.overrides,
                "peak_bytes": result["per_device_bytes"]["peak"],
                "estimated_peak_bytes": guess["peak"],
                "relative_seconds": seconds / ranked[0][0],
                "fits": result["fits"],
            }
        )
        off = result["per_device_bytes"]["temporaries"] / max(1, guess["temporaries"])
        position = ranked.index(chosen)
        if result["fits"]:
            best, ranked = candidate, ranked[:position]  # only what is faster is of interest now
        else:
            del ranked[position]
    return best, {"tried": tried}


# ---------------------------------------------------------------------- for a person


def show(result: Mapping[str, Any], say: Callable[[str], None] = print) -> None:
    """The plan as text."""
    sizes, batch = result["per_device_bytes"], result["batch"]
    axes = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1) or "not split"
    say(f"{result['model']}: {result['parameters']:,} parameters, {result['trained_parameters']:,} train "
        f"({result['finetuning_type']})")  # fmt: skip
    say(f"devices      {result['devices']} x {result['device_kind']} ({axes})")
    others = f", of {len(batch['shapes'])} shapes the largest" if len(batch["shapes"]) > 1 else ""
    say(f"batch        [accum, batch, seq] {batch['shape']}{others}; {batch['padding_share']:.1%} padding, "
        f"{batch['label_share']:.0%} of the tokens labelled; remat {result['remat']}")  # fmt: skip
    if batch["assumed"]:
        say(f"             assumed: {batch['assumed']}")
    say("")
    say("of one device")
    names = {
        "frozen_parameters": "frozen parameters",
        "trained_parameters": "trained parameters",
        "adapters": "adapters",
        "optimizer_state": "optimizer state",
        "batch": "batch",
    }
    for kind, name in names.items():
        if sizes["by_kind"][kind]:
            say(f"  {name:38}{human(sizes['by_kind'][kind]):>14}")
    say(f"  {'saved activations and temporaries':38}{human(sizes['temporaries']):>14}")
    rest = sizes["peak"] - sizes["temporaries"] - sum(sizes["by_kind"].values())
    say(f"  {'results not in place, code, layout':38}{human(rest):>14}")
    say(f"  {'peak':38}{human(sizes['peak']):>14}   of {human(result['device_memory_bytes'])}: "
        + ("fits" if result["fits"] else "DOES NOT FIT"))  # fmt: skip
    say(f"  {'at least: what is kept, layer inputs':38}{human(result['floor_bytes']):>14}")
    if result["refused"]:
        say(f"  the compiler: {result['refused']}")
    say("")
    say(f"update       {result['tokens_per_step']:,.0f} tokens, {result['flops_per_token'] / 1e9:,.4g} GFLOP each, "
        f"{result['flops_per_step'] / 1e12:,.4g} TFLOP")  # fmt: skip
    if result["seconds_per_step"]:
        say(f"time         {result['seconds_per_step']:.3f} s an update, {result['tokens_per_second']:,.0f} tokens/s, "
            f"if {result['utilisation']:.0%} of the peak is reached")  # fmt: skip
    else:
        say(f"time         not known: no figure for the peak of {result['device_kind']}")
    run = f", {result['run_seconds'] / 3600:,.2f} hours" if result["run_seconds"] else ""
    steps = f"{result['steps']:,} updates{run}" if result["steps"] else "as many updates as the rows make"
    say(f"run          {steps}; a checkpoint has {human(result['checkpoint_bytes'])}")
    say(
        f"compiled in  {result['compile_seconds']:.1f} s"
        + (" (cached: by an earlier plan)" if result["cached"] else "")
    )
    if result["advice"]:
        say("\nwhat would make it smaller, alone:")
        for advice in result["advice"]:
            keys = overrides(advice["overrides"])
            enough = "fits" if advice["fits"] else "not enough"
            saves, left = human(advice["saves_bytes"]), human(advice["peak_bytes"])
            say(f"  {advice['change']}: saves about {saves}, peak {left}, {enough}\n      {keys}")
    if "fit" in result:
        say("\ntried:")
        for entry in result["fit"]["tried"]:
            say(f"  {human(entry['peak_bytes']):>12} {'fits' if entry['fits'] else 'does not fit':12} "
                f"{overrides(entry['overrides'])}")  # fmt: skip
        found = result["fit"]["overrides"]
        say(f"\nthe fastest that fits: {overrides(found)}" if found else "\nnothing that was tried fits")


def overrides(values: Mapping[str, Any]) -> str:
    """
    >>> overrides({"remat": "full", "pure_bf16": True})
    'remat=full pure_bf16=true'
    """
    plain = lambda value: str(value).lower() if isinstance(value, bool) else value
    return " ".join(f"{key}={plain(value)}" for key, value in values.items())
