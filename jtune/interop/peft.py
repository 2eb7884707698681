"""PEFT adapters: adapter_config.json and adapter_model.safetensors, read onto a tree and written from one.

A mixture's experts are one parameter `[experts, out, in]` in PEFT's eyes, with gate and up joined; its adapter is a
pair of matrices for all experts (PEFT's `target_parameters`). Adapters from before that, with a pair for each expert's
module, are read as well.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jtune.errors import ConfigError, DataError
from jtune.interop import hf
from jtune.models import DecoderConfig
from jtune.models.decoder import numbered
from jtune.models.families import file_names, module_names
from jtune.models.families.base import Names
from jtune.models.names import located, module_name, tensors
from jtune.sharding import hosts, replicated, spread
from jtune.tuning import is_node, kernels
from jtune.tuning.freeze import cut_layers
from jtune.tuning.lora import DoRA, LoRA, PiSSA
from jtune.tuning.nodes import in_float32, is_adapter, map_fields

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "lm_head")
PyTree = Any
Keys = tuple[str, ...]

# Options of an adapter_config.json that change what an adapter computes: the values under which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False, True),  # how the base is stored, which its family tells
    "use_qalora": (False,),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}


class Pair(NamedTuple):
    """An adapter as it lies in our tree."""

    a: np.ndarray  # float32 [..., in, rank]
    b: np.ndarray  # float32 [..., rank, out]
    scale: float
    magnitude: np.ndarray | None = None  # float32 [..., out], of a DoRA adapter


class Adapter(NamedTuple):
    """What a folder holds; `used` collects the names of the tensors that found their place."""

    folder: Path
    options: Mapping[str, Any]
    stored: Mapping[str, np.ndarray]
    used: set[str]

    def pair(self, module: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(A `[rank, in]`, B `[out, rank]`) of a module, as they are stored."""
        names = [f"{module}.lora_{x}.weight" for x in "AB"]
        if not all(name in self.stored for name in names):
            return None
        self.used.update(names)
        a, b = (self.stored[name].astype(np.float32) for name in names)
        return a, b

    def magnitude(self, module: str) -> np.ndarray | None:
        """DoRA's `[out]`."""
        if not self.options.get("use_dora"):
            return None
        name = f"{module}.lora_magnitude_vector"
        if name not in self.stored:
            raise DataError(f"{self.folder / WEIGHTS}: {name} is missing (use_dora)")
        self.used.add(name)
        return self.stored[name].astype(np.float32).reshape(-1)

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank; patterns are matched at the end of a module's name, as PEFT does."""
        alpha = self.options["lora_alpha"]
        for pattern, value in (self.options.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return alpha / rank**0.5 if self.options.get("use_rslora") else alpha / rank


# ---------------------------------------------------------------------- reading


def load_adapter(
    params: PyTree, config: DecoderConfig, path: str, *, subfolder: str | None = None, **hub: Any
) -> tuple[PyTree, tuple[str, ...]]:
    """Put a PEFT adapter onto `params`: kernels become LoRA nodes, modules saved whole replace those of the base.

    Args:
      params: arrays, or nodes of adapters that were read before.
      path: a folder, or a hub id (`hub`: options of `jtune.interop.hf.fetch`).
      subfolder: where the adapter is in it.

    Returns:
      The tree, and the names of the modules that the adapter holds whole (PEFT's `modules_to_save`).

    Raises:
      DataError: it is no LoRA adapter, is not for this model, or uses what jtune does not honour, by name.
    """
    adapter = _open(hf.fetch(path, **hub) / (subfolder or ""))
    if selective(adapter.options):
        params = cut_layers(params, [*_borders(adapter, params, config)])

    def place(keys: Keys, leaf: Any, layers: range) -> Any:
        kernel = jax.tree.leaves(leaf)[0]  # under the nodes
        whole = _read_whole(adapter, keys, kernel, config, layers)
        leaf = leaf if whole is kernel else whole
        if keys[0] in EMBEDDINGS and keys[-1] != "bias":
            leaf = _read_tokens(adapter, keys, leaf, config)
        pair = _read_pair(adapter, keys, config, layers) if keys[-1] == "kernel" else None
        if pair is None:
            return leaf
        shape, kernel = leaf.shape, jax.tree.leaves(leaf)[0]
        expected = (*shape[:-1], pair.a.shape[-1]), (*shape[:-2], pair.a.shape[-1], shape[-1])
        if (pair.a.shape, pair.b.shape) != expected:
            raise DataError(
                f"{adapter.folder / WEIGHTS}: the adapter of {'.'.join(keys[:-1])} is {pair.a.shape} x {pair.b.shape}, "
                f"this model needs {expected[0]} x {expected[1]}: is it for another model?"
            )
        dropout = float(adapter.options.get("lora_dropout") or 0.0)
        a, b = _beside(kernel, pair.a), _beside(kernel, pair.b)
        if pair.magnitude is None:
            return LoRA(leaf, a, b, pair.scale, dropout)
        return DoRA(leaf, a, b, pair.scale, dropout, _beside(kernel, pair.magnitude))

    structure = jax.tree.structure(params, is_leaf=is_node)
    loaded = jax.tree.unflatten(structure, [place(*leaf) for leaf in located(params)])
    left = sorted(adapter.stored.keys() - adapter.used)
    if left:
        shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        raise DataError(f"{adapter.folder / WEIGHTS}: {shown} have no place in this model ({config.family})")
    return loaded, (*(adapter.options.get("modules_to_save") or ()), *_token_modules(adapter.options))


def selective(options: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json says which layers are adapted, by their numbers: the others are not."""
    layers, targets = options.get("layers_to_transform"), options.get("target_modules") or ()
    names = [*([targets] if isinstance(targets, str) else targets), *(options.get("target_parameters") or ())]
    numbered = isinstance(targets, str) or any(re.search(r"\.\d+\.", name) for name in names)
    return bool(layers or layers == 0 or options.get("exclude_modules") or numbered)


def _borders(adapter: Adapter, params: PyTree, config: DecoderConfig) -> set[int]:
    """The layers at which it changes what the adapter holds something for."""
    found: set[int] = set()
    for keys, _, layers in located(params):
        if not layers or keys[-1] != "kernel":
            continue
        has = [any(f"{name}.lora_A.weight" in adapter.stored for name in _lora_names(keys, config, i)) for i in layers]
        found |= {layers.start + i for i in range(1, len(has)) if has[i] != has[i - 1]}
    return found


def _lora_names(keys: Keys, config: DecoderConfig, layer: int) -> list[str]:
    """What the adapter of a kernel in a layer may be called."""
    if "experts" not in keys:
        return _module_names(keys, config, layer)
    block = module_name(keys[: keys.index("experts")], module_names(config), layer=layer) + ".experts"
    return [*_module_names(keys, config, layer, 0), f"{block}.base_layer", block]


def _beside(leaf: jax.Array, x: np.ndarray) -> jax.Array:
    """`x` on the devices that hold `leaf`, where other processes have a part in it; else on the first device."""
    if leaf.is_fully_addressable:
        return jnp.asarray(x)
    sharding: Any = leaf.sharding
    everywhere = replicated(sharding.mesh)
    return spread.put(x, everywhere)


def _open(folder: Path) -> Adapter:
    path = folder / CONFIG
    try:
        options = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file: is {folder} a PEFT adapter?") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    if options.get("peft_type") != "LORA":
        raise DataError(f"{path}: peft_type is {options.get('peft_type')!r}; jtune reads LORA")
    for key, neutral in NEUTRAL.items():
        if options.get(key, neutral[0]) not in neutral:
            raise DataError(f"{path}: {key}={options[key]!r} is not supported; expected {neutral[0]!r}")
    with ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(folder / WEIGHTS, "np"))
        except FileNotFoundError as error:
            raise DataError(f"{folder}: {CONFIG} is there, but {WEIGHTS} is not") from error
        except SafetensorError as error:
            raise DataError(f"{folder / WEIGHTS}: not a complete safetensors file: {error}") from error
        every = file.keys()
        stored = {name.removeprefix(PREFIX): file.get_tensor(name) for name in every}
    return Adapter(folder, options, stored, set())


def _read_whole(adapter: Adapter, keys: Keys, leaf: jax.Array, config: DecoderConfig, layers: range) -> jax.Array:
    """The leaf as the adapter holds it, if it does: modules saved whole, and the base of an adapted head."""
    parts = list(tensors(keys, config, layers))
    if keys[0] in EMBEDDINGS:
        for base in (".base_layer.weight", ".token_adapter.base_layer.weight"):
            based = [part._replace(name=part.name.replace(".weight", base)) for part in parts]
            parts = based if all(part.name in adapter.stored for part in based) else parts
    if not all(part.name in adapter.stored for part in parts):
        return leaf
    out = np.empty(leaf.shape, leaf.dtype)
    for part in parts:
        x = adapter.stored[part.name]
        adapter.used.add(part.name)
        x = x.swapaxes(-1, -2) if part.transposed else x
        if x.shape != leaf.shape[len(part.index) :]:
            rows = "its vocabulary was resized: set resize_vocab, with the same tokens: or " * (keys[0] in EMBEDDINGS)
            raise DataError(
                f"{adapter.folder / WEIGHTS}: {part.name} has shape {list(x.shape)}, this model's is "
                f"{list(leaf.shape[len(part.index) :])}: {rows}is it for another model?"
            )
        out[part.index] = x
    if keys[0] == "embed_tokens" and config.tie_word_embeddings:
        adapter.used.add("lm_head.weight")  # the same, repeated
    return spread.put(out, leaf.sharding)


def _token_modules(options: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """PEFT's `trainable_token_indices`: of each module of which only some rows were trained, these rows."""
    found = options.get("trainable_token_indices") or {}
    return found if isinstance(found, dict) else {"embed_tokens": found}


def _read_tokens(adapter: Adapter, keys: Keys, leaf: Any, config: DecoderConfig) -> Any:
    """The leaf with those of its rows that the adapter holds alone. They are rows, not what is added to rows."""
    [part] = tensors(keys, config, range(0))
    stem = part.name.removesuffix(".weight")
    name = f"{stem}.token_adapter.trainable_tokens_delta"
    if name not in adapter.stored:
        return leaf
    tokens = _token_modules(adapter.options)
    rows = next((ids for module, ids in tokens.items() if stem.endswith(module) or keys[0] == module), ())
    values, axis = adapter.stored[name], leaf.ndim - 2 + part.transposed
    if values.shape != (len(rows), leaf.shape[1 - axis]) or not len(rows) or max(rows) >= leaf.shape[axis]:
        raise DataError(
            f"{adapter.folder / WEIGHTS}: {name} has shape {list(values.shape)} for {len(rows)} tokens "
            f"(trainable_token_indices), and the model's table {list(leaf.shape)}: is it for another model?"
        )
    adapter.used.add(name)
    values = np.asarray(values.swapaxes(0, axis), leaf.dtype)
    if keys[0] == "embed_tokens" and config.tie_word_embeddings:  # the head is said to have the same ones
        for end in ("trainable_tokens_delta", "base_layer.weight"):
            mine, heads = (adapter.stored.get(f"{x}.token_adapter.{end}") for x in (stem, "lm_head"))
            if mine is not None and heads is not None and np.array_equal(mine, heads):
                adapter.used.add(f"lm_head.token_adapter.{end}")
    put = jax.jit(lambda x: x.at[(slice(None),) * axis + (np.array(rows),)].set(values), out_shardings=leaf.sharding)
    return put(leaf)


def _read_pair(adapter: Adapter, keys: Keys, config: DecoderConfig, layers: range) -> Pair | None:
    """The adapter of a kernel, all its layers stacked."""
    read = _read_experts if "experts" in keys else _read_module
    if keys[0] != "layers":
        return read(adapter, keys, config, None)
    found = [read(adapter, keys, config, layer) for layer in layers]
    pairs = [pair for pair in found if pair is not None]
    if not pairs:
        return None
    if len(pairs) < len(found):
        missing = ", ".join(str(i) for i, pair in zip(layers, found) if pair is None)
        raise DataError(
            f"{adapter.folder / WEIGHTS}: {'.'.join(keys[:-1])} has no adapter in layers {missing}; "
            "jtune reads adapters that all layers have"
        )
    # Layers of a lower rank are filled up with zeros; of another scale, have it in their b.
    rank, scale = max(pair.a.shape[-1] for pair in pairs), pairs[0].scale
    a = np.stack([_fill(pair.a, -1, rank) for pair in pairs])
    b = np.stack([_fill(pair.b * np.float32(pair.scale / scale), -2, rank) for pair in pairs])
    magnitudes = [pair.magnitude for pair in pairs if pair.magnitude is not None]
    return Pair(a, b, scale, np.stack(magnitudes) if magnitudes else None)


def _fill(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, size - x.shape[axis])
    return np.pad(x, pad)


def _module_names(keys: Keys, config: DecoderConfig, layer: int | None, expert: int | None = None) -> list[str]:
    """A module's name in the family's files, and in transformers' model."""
    both = file_names(config), module_names(config)
    return [module_name(keys[:-1], their, layer=layer, expert=expert) for their in both]


def _read_module(adapter: Adapter, keys: Keys, config: DecoderConfig, layer: int | None, expert: int | None = None):
    for module in _module_names(keys, config, layer, expert):
        found = adapter.pair(module)
        if found is not None:
            a, b = found
            return Pair(a.T, b.T, adapter.scale(module, a.shape[0]), adapter.magnitude(module))
    return None


def _read_experts(adapter: Adapter, keys: Keys, config: DecoderConfig, layer: int | None) -> Pair | None:
    """Adapters of one projection of all experts, `[experts, in, rank]` and `[experts, rank, out]`."""
    assert config.experts is not None
    E, M = config.experts.count, config.experts.intermediate_size
    found = (_read_module(adapter, keys, config, layer, expert) for expert in range(E))
    modules = [pair for pair in found if pair is not None]
    if len(modules) == E:
        scale = modules[0].scale
        return Pair(
            np.stack([m.a for m in modules]), np.stack([m.b * np.float32(m.scale / scale) for m in modules]), scale
        )
    block = module_name(keys[: keys.index("experts")], module_names(config), layer=layer) + ".experts"
    down = keys[-2] == "down_proj"
    inputs, outputs = (M, config.hidden_size) if down else (config.hidden_size, 2 * M)
    # PEFT nests one wrapper in the other; which is which shows in the shapes.
    for module in (f"{block}.base_layer", block):
        stored = [adapter.stored.get(f"{module}.lora_{x}.weight") for x in "AB"]
        if stored[0] is None or stored[1] is None or (stored[0].shape[1], stored[1].shape[0]) != (inputs, outputs):
            continue
        found = adapter.pair(module)
        assert found is not None
        rank = found[0].shape[0] // E
        a = found[0].reshape(E, rank, inputs).transpose(0, 2, 1)
        b = found[1].reshape(outputs, rank, E).transpose(2, 1, 0)
        if keys[-2] in ("gate_proj", "up_proj"):
            b = b[..., :M] if keys[-2] == "gate_proj" else b[..., M:]
        return Pair(a, b, adapter.scale(f"{block}.{'down_proj' if down else 'gate_up_proj'}", rank))
    return None


# ---------------------------------------------------------------------- writing


def save_adapter(
    params: PyTree,
    mask: PyTree,
    config: DecoderConfig,
    folder: str | Path,
    *,
    base: str,
    use_rslora: bool = False,
    resized: bool = False,
) -> None:
    """Write the LoRA nodes of `params`, and what else `mask` says was trained, as PEFT does.

    Of several processes the first writes.

    Args:
      base: model_name_or_path, which PEFT needs to find the base.
      use_rslora: write alpha for the scale alpha / sqrt(rank).
      resized: write the embedding and the head in any case: their rows are not the base's. PEFT does the same.
    """
    folder = Path(folder)
    kept = EMBEDDINGS if resized else ()
    params = _at_hand(params, mask, kept)
    if not hosts.is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    out: dict[str, np.ndarray] = {}
    modules: dict[str, tuple[int, float]] = {}  # name without layer -> rank, alpha
    parameters: dict[str, tuple[int, float]] = {}
    whole: dict[str, None] = {}

    def alpha(rank: int, scale: float) -> float:
        value = scale * rank**0.5 if use_rslora else scale * rank
        return round(value) if abs(value - round(value)) < 1e-6 else value

    their = module_names(config)
    every: dict[Keys, set[int]] = defaultdict(set)  # modules, and the layers that have them
    adapted: dict[Keys, set[int]] = defaultdict(set)
    for keys, leaf, layers in located(params):
        if keys[-1] == "kernel":
            every[keys[:-1]] |= set(layers)
            adapted[keys[:-1]] |= set(layers) if is_adapter(leaf) else set()
    everywhere = lambda module: adapted[module] == every[module]  # else each layer's is named
    masks = jax.tree.leaves(mask, is_leaf=is_node)
    check_writable(params)
    for (keys, leaf, layers), its_mask in zip(located(params), masks, strict=True):
        trains = its_mask is True
        if keys[0] in kept and not trains:
            x = np.asarray(in_float32(leaf.plain() if is_adapter(leaf) else leaf))
            [part] = tensors(keys, config, layers)
            name = part.name.replace(".weight", ".base_layer.weight") if is_adapter(leaf) else part.name
            out[PREFIX + name] = x.swapaxes(-1, -2) if part.transposed else x
        if is_adapter(leaf) and "experts" not in keys:
            pair = _written(leaf)
            rank = pair.a.shape[-1]
            for layer in layers or (None,):
                module = PREFIX + module_name(keys[:-1], their, layer=layer)
                place = () if layer is None else (layer - layers.start,)
                out[f"{module}.lora_A.weight"], out[f"{module}.lora_B.weight"] = pair.a[place].T, pair.b[place].T
                if pair.magnitude is not None:
                    out[f"{module}.lora_magnitude_vector"] = pair.magnitude[place]
            is_router = keys[-2] == "gate" and config.experts is not None
            names = ["gate" if is_router else _target(keys[:-1], every.keys(), their)]
            if not everywhere(keys[:-1]):
                names = [module_name(keys[:-1], their, layer=layer) for layer in layers]
            for name in names:
                key = f"{name}.weight" if is_router else name
                (parameters if is_router else modules)[key] = rank, alpha(rank, pair.scale)
        elif trains and not is_node(leaf):
            x = np.asarray(leaf, np.float32)
            for part in tensors(keys, config, layers):
                piece = x[part.index] if part.index else x
                out[PREFIX + part.name] = piece.swapaxes(-1, -2) if part.transposed else piece
            whole[their.words.get(keys[-2], keys[-2])] = None
            if keys[0] == "embed_tokens" and config.tie_word_embeddings:
                # PEFT asks for both names of a tied pair.
                out[f"{PREFIX}{their.words.get('lm_head', 'lm_head')}.weight"] = x
    for name, blocks, (rank, scale), found in _join_experts(params, config):
        experts = ("layers", "mlp", "experts")
        some = any(module[:3] == experts and adapted[module] and not everywhere(module) for module in every)
        for parameter in [f"{block}.{name}" for block in blocks] if some else [name]:
            parameters[parameter] = rank, alpha(rank, scale)
        out |= {PREFIX + key: x for key, x in found.items()}

    nodes = [x for x in jax.tree.leaves(params, is_leaf=is_node) if is_adapter(x)]
    default = Counter([*modules.values(), *parameters.values()]).most_common(1)[0][0]
    other = {name: value for name, value in (modules | parameters).items() if value != default}
    options = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": default[0],
        "lora_alpha": default[1],
        "rank_pattern": {_pattern(name): rank for name, (rank, _) in other.items()},
        "alpha_pattern": {_pattern(name): a for name, (_, a) in other.items()},
        "lora_dropout": nodes[0].dropout,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": list(whole) or None,
        "ensure_weight_tying": bool(whole) and config.tie_word_embeddings,
        "use_rslora": use_rslora,
        "use_dora": any(isinstance(x, DoRA) for x in nodes),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    contiguous = {name: np.ascontiguousarray(x) for name, x in out.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(options, indent=2) + "\n")


def check_writable(params: PyTree) -> None:
    """Raise a ConfigError if there is an adapter that PEFT does not know."""
    for module, node in kernels(params):
        if is_adapter(node) and not isinstance(node, LoRA):
            raise ConfigError(
                f"{'.'.join(module)}: PEFT has no adapter like {type(node).__name__}: merge it "
                "(jtune.lora.merge) and write the model (jtune.interop.hf.save_model)"
            )


def _written(node: LoRA) -> Pair:
    """A node as PEFT has it. PiSSA becomes a plain adapter on the kernel as it was: what it is, less its start."""
    a, b = np.asarray(node.a, np.float32), np.asarray(node.b, np.float32)
    if isinstance(node, PiSSA):
        a0, b0 = np.asarray(node.a0, np.float32), np.asarray(node.b0, np.float32)
        a, b = np.concatenate([a, a0], axis=-1), np.concatenate([b, -b0], axis=-2)
    return Pair(a, b, node.scale, np.asarray(node.magnitude, np.float32) if isinstance(node, DoRA) else None)


def _at_hand(params: PyTree, mask: PyTree, kept: Sequence[str]) -> PyTree:
    """What is written, adapters and what was trained whole, where this process can read it; the rest as it is."""

    def fetch(path: Any, leaf: Any, trains: Any) -> Any:
        keep = path[0].key in kept
        if is_adapter(leaf):  # what it keeps of its start, too
            return map_fields(lambda name, x: x if name == "base" and not keep else jax.tree.map(spread.whole, x), leaf)
        return jax.tree.map(lambda x, its: spread.whole(x) if its or keep else x, leaf, trains)

    return jax.tree_util.tree_map_with_path(fetch, params, mask, is_leaf=is_node)


def _pattern(name: str) -> str:
    """A regular expression of PEFT's for what `target_modules` calls `name`: a whole name has nothing before it."""
    return re.escape(name) if re.search(r"\.\d+\.", name) else f".*\\.{re.escape(name)}"


def _target(module: Keys, every: Collection[Keys], their: Names) -> str:
    """What PEFT is to call a module: the last word of its name, or two where others end in the same word."""
    words = lambda keys: tuple(their.words.get(key, key) for key in keys)
    alike = [other for other in every if words(other)[-1] == words(module)[-1] and "experts" not in other]
    return ".".join(words(module)[-1:] if len({words(other)[-2] for other in alike}) == 1 else words(module)[-2:])


def _join_experts(
    params: PyTree, config: DecoderConfig
) -> Iterator[tuple[str, list[str], tuple[int, float], dict[str, np.ndarray]]]:
    """Adapters of experts as PEFT's parameters, stack by stack: (name, modules, (rank, scale), tensors).

    Gate and up become one adapter of their ranks together: `a` side by side, `b` block-diagonal.
    """
    for numbers, stack in numbered(params["layers"]):
        nodes = {
            name: _written(leaf["kernel"])
            for name, leaf in stack.get("mlp", {}).get("experts", {}).items()
            if is_adapter(leaf["kernel"])
        }
        block = [module_name(("layers", "mlp"), module_names(config), layer=layer) + ".experts" for layer in numbers]
        down, joined = nodes.get("down_proj"), _joined(nodes)
        if joined is not None:
            modules = [f"{name}.base_layer" for name in block] if down is not None else block
            yield "gate_up_proj", block, (joined.a.shape[-1], joined.scale), _files(joined, modules)
        if down is not None:
            yield "down_proj", block, (down.a.shape[-1], down.scale), _files(down, block)


def _joined(nodes: Mapping[str, Pair]) -> Pair | None:
    """One adapter of gate and up."""
    if "gate_up_proj" in nodes:
        return nodes["gate_up_proj"]
    found = [(nodes[name], half) for half, name in enumerate(("gate_proj", "up_proj")) if name in nodes]
    if not found:
        return None
    scale, rank = found[0][0].scale, sum(node.a.shape[-1] for node, _ in found)
    L, E, _, M = found[0][0].b.shape
    b, row = np.zeros((L, E, rank, 2 * M), np.float32), 0
    for node, half in found:
        r = node.a.shape[-1]
        b[:, :, row : row + r, half * M : (half + 1) * M] = node.b * np.float32(node.scale / scale)
        row += r
    return Pair(np.concatenate([node.a for node, _ in found], axis=-1), b, scale)


def _files(pair: Pair, modules: list[str]) -> dict[str, np.ndarray]:
    """PEFT's layout, for each layer: A `[experts * rank, in]`, B `[out, rank * experts]`."""
    found = {}
    for module, a, b in zip(modules, pair.a, pair.b, strict=True):
        E, inputs, rank = a.shape
        found[f"{module}.lora_A.weight"] = a.transpose(0, 2, 1).reshape(E * rank, inputs)
        found[f"{module}.lora_B.weight"] = b.transpose(2, 1, 0).reshape(-1, rank * E)
    return found
