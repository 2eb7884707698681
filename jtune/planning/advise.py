"""What to change so that a run fits, or runs faster: estimates from shapes, in milliseconds instead of a compilation.

An estimate is arithmetic on what must be kept and on the largest things that exist for a moment. It is good enough to
compare one setting with another, and is scaled by what the compiler measured for the setting that was asked for.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import jax

from jtune.config import Config
from jtune.config.arguments import SECTIONS
from jtune.errors import ConfigError
from jtune.loading.source import Source
from jtune.models import DecoderConfig
from jtune.models.decoder import REMAT
from jtune.planning.chips import link_speed, peak_flops
from jtune.planning.estimate import MARGIN, MOST_OFF, Rows, estimate, travelling
from jtune.planning.shapes import abstract_mesh, abstract_program
from jtune.sharding.mesh import BATCH_AXES
from jtune.train.program import Program

# A microbatch with fewer tokens on a device leaves its matrix units waiting.
SMALL_MICROBATCH = 512
# What is sent while something is computed slows that down, for a share of its own time: it takes memory's bandwidth
# and, on GPUs, multiprocessors. A guess, that settles a choice between meshes which are else as fast.
HIDDEN_COST = 0.1


class Found(NamedTuple):
    """A setting that a search has looked at."""

    seconds: float  # of a token, by estimate
    guess: dict[str, int]  # see `estimate`
    overrides: dict[str, Any]
    config: Config


class Change(NamedTuple):
    """A change of a configuration."""

    kind: str  # of changes of one kind, one is enough
    text: str  # for a person
    overrides: dict[str, Any]  # as key=value
    devices: int


def changed(config: Config, **values: Any) -> Config:
    """The configuration with other values of some arguments.

    >>> from jtune.config import load_config
    >>> changed(load_config(["model_name_or_path=m"], command="plan"), remat="dots").training.remat
    'dots'
    """
    sections = {}
    for name, kind in SECTIONS.items():
        mine = {f.name for f in dataclasses.fields(kind)} & values.keys()
        sections[name] = dataclasses.replace(getattr(config, name), **{key: values[key] for key in mine})
    return dataclasses.replace(config, **sections)


class Work(NamedTuple):
    """FLOPs of one token: those of the model, and those of the forward pass of its layers."""

    model: float
    layers: float


def seconds_per_token(program: Program, rows: Rows, work: Work, device_kind: str, utilisation: float) -> float:
    """Device time of one token, for comparing settings: computing, and waiting for what cannot be hidden behind it.

    Unknown chips count as fast as an H100: only ratios matter.
    """
    decoder, mesh = program.module.config, program.mesh
    peak, speed = peak_flops(device_kind) or 989e12, link_speed(device_kind)
    flops = (
        work.model
        + {"none": 0.0, "dots": 0.15, "attention": 0.9, "full": 1.0, "offload": 1.0}[program.module.remat] * work.layers
    )
    tokens = rows.per_shard * rows.seq
    starved = 1 + SMALL_MICROBATCH / tokens
    split, fsdp, data = mesh.shape["tensor"], mesh.shape["fsdp"], mesh.shape["data"]
    compute = flops / split / (peak * utilisation) * starved
    size = program.module.dtype.itemsize
    passes = 3 if program.module.remat == "full" else 2
    # FSDP gathers every layer in each pass and scatters gradients; what is computed meanwhile hides it.
    weights = travelling(program.params, size) / split
    trained = 4 * sum(x.size for x in jax.tree.leaves(program.state.trainable)) / split
    moved = (passes * weights + trained) * (1 - 1 / fsdp) + 2 * trained * (1 - 1 / data) / rows.accum
    gathering = moved / speed / tokens
    hidden = HIDDEN_COST * min(compute, gathering)
    # Tensor parallelism sums activations twice a layer in each direction, and the next product waits for them.
    summed = 2 * (passes + 1) * decoder.num_hidden_layers * decoder.hidden_size * size * 2 * (1 - 1 / split) / speed
    return (max(compute, gathering) + hidden + summed) * split  # `split` devices work on the token


# ---------------------------------------------------------------------- what would make it fit


class Setting(NamedTuple):
    """A configuration on so many devices, and what follows from it."""

    config: Config
    devices: int
    program: Program
    rows: Rows


def apply(setting: Setting, change: Change, source: Source, platform: str) -> Setting:
    """The setting after a change; its rows follow from its arguments.

    Raises:
      ConfigError: the devices cannot be split in this way.
    """
    before, after = setting.config.training, changed(setting.config, **change.overrides)
    now, rows = after.training, setting.rows
    sizes = {axis: getattr(now, f"mesh_{axis}") for axis in ("data", "fsdp", "tensor")}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: max(1, change.devices // fixed) if size == -1 else size for axis, size in sizes.items()}
    mesh = abstract_mesh(change.devices, data=sizes["data"], tensor=sizes["tensor"])
    program = abstract_program(after, source, mesh, platform=platform)
    share = now.per_device_train_batch_size / before.per_device_train_batch_size
    longer = now.gradient_accumulation_steps / before.gradient_accumulation_steps
    rows = rows._replace(
        accum=max(1, round(rows.accum * longer)),
        per_shard=max(1, math.ceil(rows.per_shard * share)),
        seq=min(rows.seq, after.data.cutoff_len),
    )
    return Setting(after, change.devices, program, rows)


def advise(
    config: Config, source: Source, program: Program, rows: Rows, measured: Mapping[str, Any], memory: int,
    *, platform: str,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:  # fmt: skip
    """The three changes that save most, each by itself, those that are enough first; and, if none is, what three
    changes in a row come to.

    Args:
      measured: the run as it is (see `jtune.planning.compile`).
      memory: of a device.
      platform: "tpu", "gpu" or "cpu".
    """
    start = Setting(config, math.prod(program.mesh.shape.values()), program, rows)
    before = estimate(program, rows)
    scale = measured["temporaries"] / max(1, before["temporaries"])
    if measured["refused"]:  # said before the compiler has tried to make it fit: more than it would need
        scale = min(scale, MOST_OFF)
    rest = measured["peak"] - measured["temporaries"] - before["arguments"]  # code, layouts, results not in place
    enough = memory * MARGIN

    def peak(setting: Setting) -> int:
        after = estimate(setting.program, setting.rows)
        return int(after["arguments"] + rest + after["temporaries"] * scale)

    def ranked(setting: Setting) -> list[tuple[int, Change, Setting]]:
        """Of each kind the smallest change that is enough; if none is, the one that saves most."""
        best: dict[str, tuple[int, Change, Setting]] = {}
        for change in changes(setting):
            if change.kind in best and best[change.kind][0] <= enough:
                continue
            try:
                after = apply(setting, change, source, platform)
            except ConfigError:
                continue
            if change.kind not in best or peak(after) < best[change.kind][0]:
                best[change.kind] = peak(after), change, after
        useful = [entry for entry in best.values() if entry[0] < peak(setting)]
        return sorted(useful, key=lambda entry: (entry[0] > enough, entry[0]))

    first = ranked(start)
    alone = [
        {
            "change": change.text,
            "overrides": change.overrides,
            "devices": change.devices,
            "saves_bytes": measured["peak"] - left,
            "peak_bytes": left,
            "fits": left <= enough,
        }
        for left, change, _ in first[:3]
    ]
    if not first or first[0][0] <= enough:
        return alone, None
    values: dict[str, Any] = {}
    left, setting = peak(start), start
    for _ in range(3):
        options = ranked(setting)
        if not options or left <= enough:
            break
        left, change, setting = options[0]
        values |= change.overrides
    together = {"overrides": values, "devices": setting.devices, "peak_bytes": left, "fits": left <= enough}
    return alone, together


def changes(setting: Setting) -> Iterator[Change]:
    """What could be changed, in each kind from the smallest change to the largest. Rows of an update stay as many."""
    config, devices, program, rows = setting
    training, mesh = config.training, program.mesh
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    accumulation, per_device = training.gradient_accumulation_steps, training.per_device_train_batch_size

    def change(kind: str, text: str, *, on: int = devices, **overrides: Any) -> Change:
        return Change(kind, text, overrides, on)

    for fewer in _halves(per_device):
        yield change(
            "microbatch",
            "smaller microbatches, more of them",
            per_device_train_batch_size=fewer,
            gradient_accumulation_steps=accumulation * per_device // fewer,
        )
    if program.module.remat not in ("full", "offload"):
        yield change("remat", "compute whole layers again in the backward pass", remat="full")
    if config.finetuning.finetuning_type != "lora":
        yield change("method", "train adapters instead", finetuning_type="lora")
        if not config.finetuning.pure_bf16:
            yield change("precision", "trained parameters in bfloat16", pure_bf16=True)
    if program.module.dtype.itemsize == 4:
        yield change("compute", "compute in bfloat16", bf16=True)
    if data > 1:
        yield change("fsdp", "split parameters over all devices", mesh_data=1, mesh_fsdp=data * fsdp)
    for more in (2, 4, 8):
        if fsdp % more == 0 and program.module.config.num_key_value_heads % (tensor * more) == 0:
            yield change(
                "tensor",
                f"split each matrix product over {tensor * more} devices",
                mesh_fsdp=fsdp // more,
                mesh_tensor=tensor * more,
                gradient_accumulation_steps=accumulation * more,
            )
    for more in (2, 4, 8, 16):
        text = f"{devices * more} devices instead of {devices}"
        overrides = {"mesh_fsdp": fsdp * more}
        if accumulation % more == 0:
            overrides["gradient_accumulation_steps"] = accumulation // more
        yield change("devices", text, on=devices * more, **overrides)
    for shorter in (2, 4):
        if rows.seq // shorter >= 256:
            yield change("length", "shorter rows", cutoff_len=rows.seq // shorter)


def _halves(n: int) -> list[int]:
    """
    >>> _halves(8)
    [4, 2, 1]
    """
    return [n // 2**k for k in range(1, 12) if n % 2**k == 0]


# ---------------------------------------------------------------------- the fastest that fits


def search(
    config: Config, source: Source, program: Program, rows: Rows, work: Work, *, platform: str,
    device_kind: str, utilisation: float,
) -> list[Found]:  # fmt: skip
    """Settings of microbatch, remat and mesh with the same rows in an update, the fastest by estimate first. Whether
    they fit is not looked at here."""
    devices = math.prod(program.mesh.shape.values())
    decoder, training = program.module.config, config.training
    shards = math.prod(program.mesh.shape[axis] for axis in BATCH_AXES)
    rows_of_one = rows.per_shard / training.per_device_train_batch_size  # fewer than 1 where examples share rows
    examples = training.per_device_train_batch_size * training.gradient_accumulation_steps * shards
    found = []
    for sizes in meshes(devices, decoder):
        mesh = abstract_mesh(devices, **sizes)
        axes = {f"mesh_{axis}": size for axis, size in sizes.items()}
        then = abstract_program(changed(config, **axes), source, mesh, platform=platform)
        share = examples / (sizes["data"] * sizes["fsdp"])
        if share != int(share):
            continue
        for micro, remat in product(_powers(int(share)), REMAT):
            accumulation = int(share) // micro
            module = dataclasses.replace(then.module, remat=remat)
            its_rows = rows._replace(accum=accumulation, per_shard=max(1, round(micro * rows_of_one)))
            values = axes | {
                "remat": remat,
                "per_device_train_batch_size": micro,
                "gradient_accumulation_steps": accumulation,
            }
            tried = then._replace(module=module)
            seconds = seconds_per_token(tried, its_rows, work, device_kind, utilisation)
            found.append(Found(seconds, estimate(tried, its_rows), values, changed(config, **values)))
    return sorted(found, key=lambda entry: (entry.seconds, entry.guess["peak"]))


def meshes(devices: int, decoder: DecoderConfig) -> Iterator[dict[str, int]]:
    """Ways to split work over `devices`; products are split only where heads and MLP divide evenly."""
    for tensor in (1, 2, 4, 8):
        if devices % tensor or decoder.num_key_value_heads % tensor or decoder.intermediate_size % tensor:
            continue
        for data in _powers(devices // tensor):
            yield {"data": data, "fsdp": devices // tensor // data, "tensor": tensor}


def _powers(n: int) -> list[int]:
    """Powers of two that divide `n`.

    >>> _powers(12)
    [1, 2, 4]
    """
    return [2**k for k in range(n.bit_length()) if n % 2**k == 0]
