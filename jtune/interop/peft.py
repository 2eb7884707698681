"""PEFT adapters: adapter_config.json and adapter_model.safetensors, read onto a tree and written from one.

A mixture's experts are one parameter `[experts, out, in]` in PEFT's eyes, with gate and up joined; its adapter is a
pair of matrices for all experts (PEFT's `target_parameters`). Adapters from before that, with a pair for each expert's
module, are read as well.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jtune.errors import DataError
from jtune.interop import hf
from jtune.models import DecoderConfig
from jtune.models.names import module_name, tensors
from jtune.sharding import hosts, replicated, spread
from jtune.tuning.lora import LoRA, is_adapter_leaf, is_node

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PyTree = Any
Keys = tuple[str, ...]

# Options of an adapter_config.json that change what an adapter computes: the values under which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
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
      params: arrays, or nodes of adapters that were read before; layers in one stack.
      path: a folder, or a hub id (`hub`: options of `jtune.interop.hf.fetch`).
      subfolder: where the adapter is in it.

    Returns:
      The tree, and the names of the modules that the adapter holds whole (PEFT's `modules_to_save`).

    Raises:
      DataError: it is no LoRA adapter, is not for this model, or uses what jtune does not honour, by name.
    """
    adapter = _open(hf.fetch(path, **hub) / (subfolder or ""))

    def place(key_path: Any, leaf: Any) -> Any:
        keys = tuple(key.key for key in key_path)
        kernel = jax.tree.leaves(leaf)[0]  # under the nodes
        whole = _read_whole(adapter, keys, kernel, config)
        leaf = leaf if whole is kernel else whole
        pair = _read_pair(adapter, keys, config) if keys[-1] == "kernel" else None
        if pair is None:
            return leaf
        shape = kernel.shape
        expected = (*shape[:-1], pair.a.shape[-1]), (*shape[:-2], pair.a.shape[-1], shape[-1])
        if (pair.a.shape, pair.b.shape) != expected:
            raise DataError(
                f"{adapter.folder / WEIGHTS}: the adapter of {'.'.join(keys[:-1])} is {pair.a.shape} x {pair.b.shape}, "
                f"this model needs {expected[0]} x {expected[1]}: is it for another model?"
            )
        dropout = float(adapter.options.get("lora_dropout") or 0.0)
        return LoRA(leaf, _beside(kernel, pair.a), _beside(kernel, pair.b), pair.scale, dropout)

    loaded = jax.tree_util.tree_map_with_path(place, params, is_leaf=is_node)
    left = sorted(adapter.stored.keys() - adapter.used)
    if left:
        shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        raise DataError(f"{adapter.folder / WEIGHTS}: {shown} have no place in this model ({config.family})")
    return loaded, tuple(adapter.options.get("modules_to_save") or ())


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
        names = file.keys()
        stored = {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}
    return Adapter(folder, options, stored, set())


def _read_whole(adapter: Adapter, keys: Keys, leaf: jax.Array, config: DecoderConfig) -> jax.Array:
    """The leaf as the adapter holds it, if it does: modules saved whole, and the base of an adapted head."""
    parts = list(tensors(keys, config))
    if keys[0] == "lm_head":
        based = [part._replace(name=part.name.replace(".weight", ".base_layer.weight")) for part in parts]
        parts = based if all(part.name in adapter.stored for part in based) else parts
    if not all(part.name in adapter.stored for part in parts):
        return leaf
    out = np.empty(leaf.shape, leaf.dtype)
    for part in parts:
        x = adapter.stored[part.name]
        adapter.used.add(part.name)
        if (x.T if part.transposed else x).shape != leaf.shape[len(part.index) :]:
            raise DataError(
                f"{adapter.folder / WEIGHTS}: {part.name} has shape {list(x.shape)}: is it for another model?"
            )
        out[part.index] = x.T if part.transposed else x
    if keys[0] == "embed_tokens" and config.tie_word_embeddings:
        adapter.used.add("lm_head.weight")  # the same, repeated
    return spread.put(out, leaf.sharding)


def _read_pair(adapter: Adapter, keys: Keys, config: DecoderConfig) -> Pair | None:
    """The adapter of a kernel, all its layers stacked."""
    read = _read_experts if "experts" in keys else _read_module
    if keys[0] != "layers":
        return read(adapter, keys, config, None)
    found = [read(adapter, keys, config, layer) for layer in range(config.num_hidden_layers)]
    pairs = [pair for pair in found if pair is not None]
    if not pairs:
        return None
    if len(pairs) < len(found):
        missing = ", ".join(str(i) for i, pair in enumerate(found) if pair is None)
        raise DataError(
            f"{adapter.folder / WEIGHTS}: {'.'.join(keys[:-1])} has no adapter in layers {missing}; "
            "jtune reads adapters that all layers have"
        )
    # Layers of a lower rank are filled up with zeros; of another scale, have it in their b.
    rank, scale = max(pair.a.shape[-1] for pair in pairs), pairs[0].scale
    a = np.stack([_fill(pair.a, -1, rank) for pair in pairs])
    b = np.stack([_fill(pair.b * np.float32(pair.scale / scale), -2, rank) for pair in pairs])
    return Pair(a, b, scale)


def _fill(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, size - x.shape[axis])
    return np.pad(x, pad)


def _module_names(keys: Keys, config: DecoderConfig, layer: int | None, expert: int | None = None) -> list[str]:
    """A module's name in the family's files, and in transformers 5, which uses our words."""
    return [module_name(keys[:-1], family, layer=layer, expert=expert) for family in (config.family, "")]


def _read_module(adapter: Adapter, keys: Keys, config: DecoderConfig, layer: int | None, expert: int | None = None):
    for module in _module_names(keys, config, layer, expert):
        found = adapter.pair(module)
        if found is not None:
            a, b = found
            return Pair(a.T, b.T, adapter.scale(module, a.shape[0]))
    return None


def _read_experts(adapter: Adapter, keys: Keys, config: DecoderConfig, layer: int | None) -> Pair | None:
    """Adapters of one projection of all experts, `[experts, in, rank]` and `[experts, rank, out]`."""
    found = (_read_module(adapter, keys, config, layer, expert) for expert in range(config.num_experts))
    modules = [pair for pair in found if pair is not None]
    if len(modules) == config.num_experts:
        scale = modules[0].scale
        return Pair(
            np.stack([m.a for m in modules]), np.stack([m.b * np.float32(m.scale / scale) for m in modules]), scale
        )
    block = module_name(keys[: keys.index("experts")], "", layer=layer) + ".experts"
    down = keys[-2] == "down_proj"
    E, M = config.num_experts, config.intermediate_size
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
        if not down:
            b = b[..., :M] if keys[-2] == "gate_proj" else b[..., M:]
        return Pair(a, b, adapter.scale(f"{block}.{'down_proj' if down else 'gate_up_proj'}", rank))
    return None


# ---------------------------------------------------------------------- writing


def save_adapter(
    params: PyTree, mask: PyTree, config: DecoderConfig, folder: str | Path, *, base: str, use_rslora: bool = False
) -> None:
    """Write the LoRA nodes of `params`, and what else `mask` says was trained, as PEFT does.

    Of several processes the first writes.

    Args:
      base: model_name_or_path, which PEFT needs to find the base.
      use_rslora: write alpha for the scale alpha / sqrt(rank).
    """
    folder = Path(folder)
    params = _at_hand(params, mask)
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

    for keys, leaf, trains in _leaves(params, mask):
        if is_node(leaf) and "experts" not in keys:
            rank = leaf.a.shape[-1]
            a, b = np.asarray(leaf.a, np.float32), np.asarray(leaf.b, np.float32)
            for layer in range(len(a)) if keys[0] == "layers" else (None,):
                module = PREFIX + module_name(keys[:-1], "", layer=layer)
                out[f"{module}.lora_A.weight"] = (a if layer is None else a[layer]).T
                out[f"{module}.lora_B.weight"] = (b if layer is None else b[layer]).T
            is_router = keys[-2] == "gate" and config.num_experts > 0
            name = "gate.weight" if is_router else keys[-2]
            (parameters if is_router else modules)[name] = rank, alpha(rank, leaf.scale)
        elif trains and not is_node(leaf):
            x = np.asarray(leaf, np.float32)
            for part in tensors(keys, config):
                piece = x[part.index] if part.index else x
                out[PREFIX + part.name] = piece.T if part.transposed else piece
            whole[keys[-2]] = None
            if keys[0] == "embed_tokens" and config.tie_word_embeddings:
                out[PREFIX + "lm_head.weight"] = x  # PEFT asks for both names of a tied pair
    for name, (rank, scale), found in _join_experts(params):
        parameters[name] = rank, alpha(rank, scale)
        out |= {PREFIX + key: x for key, x in found.items()}

    default = Counter([*modules.values(), *parameters.values()]).most_common(1)[0][0]
    other = {name: value for name, value in (modules | parameters).items() if value != default}
    options = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": default[0],
        "lora_alpha": default[1],
        "rank_pattern": {f".*\\.{re.escape(name)}": rank for name, (rank, _) in other.items()},
        "alpha_pattern": {f".*\\.{re.escape(name)}": a for name, (_, a) in other.items()},
        "lora_dropout": next(x.dropout for x in jax.tree.leaves(params, is_leaf=is_node) if is_node(x)),
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": list(whole) or None,
        "ensure_weight_tying": bool(whole) and config.tie_word_embeddings,
        "use_rslora": use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    contiguous = {name: np.ascontiguousarray(x) for name, x in out.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(options, indent=2) + "\n")


def _at_hand(params: PyTree, mask: PyTree) -> PyTree:
    """What is written, adapters and what was trained whole, where this process can read it; the rest as it is."""

    def fetch(path: Any, leaf: Any, trains: bool) -> Any:
        return spread.whole(leaf) if trains or is_adapter_leaf(path) else leaf

    return jax.tree_util.tree_map_with_path(fetch, params, mask)


def _leaves(params: PyTree, mask: PyTree) -> Iterator[tuple[Keys, Any, bool]]:
    masks = jax.tree.leaves(mask, is_leaf=is_node)
    for (path, leaf), m in zip(jax.tree_util.tree_leaves_with_path(params, is_leaf=is_node), masks, strict=True):
        yield tuple(key.key for key in path), leaf, m is True


def _join_experts(params: PyTree) -> Iterator[tuple[str, tuple[int, float], dict[str, np.ndarray]]]:
    """Adapters of experts as PEFT's parameters, layer by layer: (name, (rank, scale), tensors).

    Gate and up become one adapter of their ranks together: `a` side by side, `b` block-diagonal.
    """
    mlp = params["layers"].get("mlp", {})
    if "experts" not in mlp:
        return
    nodes = {name: leaf["kernel"] for name, leaf in mlp["experts"].items() if is_node(leaf["kernel"])}
    gate, up, down = (nodes.get(name) for name in ("gate_proj", "up_proj", "down_proj"))
    block = "model.layers.{}.mlp.experts"

    def files(a: np.ndarray, b: np.ndarray, module: str) -> dict[str, np.ndarray]:
        """PEFT's layout: A `[experts * rank, in]`, B `[out, rank * experts]`."""
        E, inputs, rank = a.shape[1:]
        found = {}
        for layer in range(len(a)):
            found[f"{module.format(layer)}.lora_A.weight"] = a[layer].transpose(0, 2, 1).reshape(E * rank, inputs)
            found[f"{module.format(layer)}.lora_B.weight"] = b[layer].transpose(2, 1, 0).reshape(-1, rank * E)
        return found

    parts = [node for node in (gate, up) if node is not None]
    if parts:
        scale = parts[0].scale
        rank = sum(node.a.shape[-1] for node in parts)
        a = np.concatenate([np.asarray(node.a, np.float32) for node in parts], axis=-1)
        L, E, _, M = parts[0].b.shape
        b, row = np.zeros((L, E, rank, 2 * M), np.float32), 0
        for node, column in ((gate, 0), (up, M)):
            if node is not None:
                r = node.a.shape[-1]
                b[:, :, row : row + r, column : column + M] = np.asarray(node.b) * np.float32(node.scale / scale)
                row += r
        yield "gate_up_proj", (rank, scale), files(a, b, block + ".base_layer" if down is not None else block)
    if down is not None:
        a, b = np.asarray(down.a, np.float32), np.asarray(down.b, np.float32)
        yield "down_proj", (down.a.shape[-1], down.scale), files(a, b, block)
