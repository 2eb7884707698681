"""A run as shapes: everything that its step takes, as `ShapeDtypeStruct`s with shardings. Nothing is read or allocated.

Works on a mesh of devices, and on an `AbstractMesh`, which has none: enough for all but compiling.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from jtune import tuning
from jtune.config import Config
from jtune.errors import ConfigError
from jtune.interop import hf, peft
from jtune.models import CausalLM, DecoderConfig, abstract_params, attention
from jtune.models.families import file_names, module_names
from jtune.models.names import module_name
from jtune.sharding.mesh import AXES
from jtune.sharding.rules import batch_sharding, replicated
from jtune.train import build
from jtune.train.objective import objective_of
from jtune.train.optimizer import optimizer_of
from jtune.train.state import TrainState
from jtune.train.step import Batch
from jtune.tuning import quantize
from jtune.tuning.expand import on_layers
from jtune.tuning.nodes import Path


class Shapes(NamedTuple):
    """What the train step is lowered for."""

    module: CausalLM
    tx: optax.GradientTransformation
    params: Any  # as tuning prepared them
    mask: Any  # what trains
    frozen: Any  # all that the step takes and does not change (`jtune.train.build.held`)
    state: TrainState
    mesh: Mesh | AbstractMesh


def run_shapes(
    config: Config, decoder: DecoderConfig, source: dict[str, Any], mesh: Mesh | AbstractMesh, *, platform: str
) -> Shapes:
    """The model, its state and their places, as `jtune train` would have them on `mesh`.

    With `remat: auto`, which needs to know the rows (`jtune.sharding.advice.sound_remat`), the module has "full".

    Args:
      source: the model's config.json.
      platform: of the devices of the mesh: "tpu", "gpu", "cpu".
    """
    training, finetuning = config.training, config.finetuning
    stored = jnp.dtype(jnp.float32) if config.model.train_from_scratch else hf.stored_dtype(source)
    dtype = build.compute_dtype(training, finetuning.pure_bf16, hf.stored_dtype(source), platform)
    # Without devices nothing is compiled, and where activations and kernels lie need not be said.
    of_devices = mesh if isinstance(mesh, Mesh) else None
    masks = []

    def prepared(params: Any) -> Any:
        params, mask = tuning.prepare(
            quantize.placed(quantize.apply(params, build.form_of(config.model)), decoder, of_devices),
            finetuning,
            decoder,
            adapters=config.model.adapter_name_or_path,
            load_adapter=lambda params, decoder, path: adapter_shapes(params, decoder, path, config),
            key=jax.random.key(0),
            frozen_dtype=dtype,
        )
        masks.append(mask)
        return params

    params = jax.eval_shape(prepared, abstract_params(decoder, stored))
    placed = build.placement(params, decoder, mesh)  # type: ignore[arg-type]
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed)
    trainable, frozen = tuning.partition(params, masks[0])
    held = build.held(objective_of(finetuning, training), trainable, frozen, dtype)
    tx = optimizer_of(training, finetuning, trainable, decoder)
    state = build.abstract_state(trainable, tx, mesh, float16=dtype == jnp.float16)  # type: ignore[arg-type]
    backend, _ = attention.choose(config.model.flash_attn, platform, decoder, dtype)
    policy = build.asked_remat(training, config.model)
    module = CausalLM(decoder, dtype=dtype, attention=backend, mesh=of_devices)
    module = build.with_remat(module, "full" if policy == "auto" else policy, platform)
    return Shapes(module, tx, params, masks[0], held, state, mesh)


def adapter_shapes(params: Any, decoder: DecoderConfig, path: str, config: Config) -> tuple[Any, tuple[str, ...]]:
    """What `jtune.interop.peft.load_adapter` gives, from adapter_config.json alone.

    Layers of a lower rank are filled up there: the highest rank counts.
    """
    folder = hf.fetch(path, weights=False, **config.model.hub) / (config.model.adapter_folder or "")
    options = peft.read_options(folder)
    rank = max(options["r"], *(options.get("rank_pattern") or {}).values(), 0)
    alpha, targets = options["lora_alpha"], options.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":  # a pattern for names of modules
        their = module_names(decoder)
        there = {path: module_name(path, their, layer=0, expert=0) for path, _ in tuning.kernels(params)}
        targets = [".".join(path) for path, name in there.items() if re.fullmatch(targets, name)]
    targets = ["all"] if targets == "all-linear" else [re.sub(r"^.*\.\d+\.", "", name) for name in targets or ()]
    for name in options.get("target_parameters") or ():  # a mixture's experts
        stem, last = name.rpartition(".")[::2]
        targets += [f"{stem}.{x}".lstrip(".") for x in {"gate_up_proj": ("gate_proj", "up_proj")}.get(last, (last,))]
    dropout = float(options.get("lora_dropout") or 0.0)
    start = peft.start_of(options, folder / peft.CONFIG)
    form = "dora" if options.get("use_dora") else "pissa" if start else "lora"
    names = file_names(decoder)
    add = partial(tuning.lora.add, rank=rank, alpha=alpha, dropout=dropout, form=form, names=names)
    whole = peft.trained_whole(options, params, decoder)
    if not peft.selective(options):
        return add(params, targets), whole
    layers: dict[frozenset[int], list[Path]] = defaultdict(list)
    for module in tuning.select(params, targets, names):
        layers[adapted_layers(module, options, decoder)].append(module)
    for numbers, paths in layers.items():
        params = on_layers(params, numbers, paths, lambda tree, names, _: add(tree, names))
    outside = [".".join(module) for paths in layers.values() for module in paths if module[0] != "layers"]
    return add(params, outside) if outside else params, whole


def adapted_layers(path: Path, options: Mapping[str, Any], decoder: DecoderConfig) -> frozenset[int]:
    """The layers in which PEFT adapts the module at `path`."""
    count = range(decoder.num_hidden_layers)
    if "experts" in path or path[-1] == "gate":
        numbers = {int(i) for name in options.get("target_parameters") or () for i in re.findall(r"\.(\d+)\.", name)}
        return frozenset(numbers or count)
    name = {i: module_name(path, module_names(decoder), layer=i) for i in count}
    chosen = options.get("layers_to_transform")
    chosen = {chosen} if isinstance(chosen, int) else set(chosen or count)

    def among(wanted: Any, i: int) -> bool:
        if isinstance(wanted, str):
            return wanted == "all-linear" or re.fullmatch(wanted, name[i]) is not None
        return name[i] in wanted or (i in chosen and any(name[i].endswith(f".{end}") for end in wanted))

    left_out = options.get("exclude_modules") or ()
    return frozenset(i for i in count if among(options.get("target_modules") or (), i) and not among(left_out, i))


def batch_shapes(shape: Sequence[int], mesh: Mesh | AbstractMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of an update of `[accum, batch, seq]`, as `BatchPlan.update` makes it."""
    rows, everywhere = batch_sharding(mesh, accumulated=True), replicated(mesh)  # type: ignore[arg-type]
    found = {
        name: jax.ShapeDtypeStruct(tuple(shape), jnp.float32 if name == "loss_weights" else jnp.int32, sharding=rows)
        for name in Batch.__annotations__
        if name != "divisor"
    }
    return found | {"divisor": jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)}


def abstract_mesh(devices: int, **sizes: int) -> AbstractMesh:
    """A mesh without devices; axes that are not named have size 1, and `fsdp` what is left.

    Raises:
      ConfigError: the sizes do not divide `devices`.
    """
    others = math.prod(size for axis, size in sizes.items() if axis != "fsdp")
    if devices % others:
        raise ConfigError(f"{sizes} does not divide {devices} devices")
    all_sizes = dict.fromkeys(AXES, 1) | sizes | {"fsdp": devices // others}
    return AbstractMesh(tuple(all_sizes[axis] for axis in AXES), AXES)


def local_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def global_bytes(tree: Any) -> int:
    """Bytes of a tree, each array counted once."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bytes_by_kind(shapes: Shapes, batch: Any) -> dict[str, int]:
    """What a device holds between updates, exact but for the padding that a layout may need."""
    adapters, trained = tuning.partition(shapes.state.trainable, tuning.adapter_mask(shapes.state.trainable))
    return {
        "frozen_parameters": local_bytes(shapes.frozen),
        "trained_parameters": local_bytes(trained),
        "adapters": local_bytes(adapters),
        "optimizer_state": local_bytes(shapes.state.opt_state),
        "batch": local_bytes(batch),
    }
