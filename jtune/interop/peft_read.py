"""PEFT adapters read onto a tree.

A mixture's experts are one parameter `[experts, out, in]` in PEFT's eyes, with gate and up joined; its adapter is a
pair of matrices for all experts (PEFT's `target_parameters`). Adapters from before that, with a pair for each expert's
module, are read as well.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jtune.errors import DataError
from jtune.interop import hf
from jtune.interop.layout import in_place
from jtune.interop.peft_options import CONFIG, EMBEDDINGS, PREFIX, WEIGHTS, note_base, read_options, selective, start_of
from jtune.interop.weights import grouped, is_finite
from jtune.models import DecoderConfig
from jtune.models.families import file_names, module_names
from jtune.models.names import located, module_name, tensors
from jtune.sharding import arrays, replicated
from jtune.tuning import is_node
from jtune.tuning.freeze import cut_layers
from jtune.tuning.lora import DoRA, LoRA, PiSSA, taken_out
from jtune.tuning.nodes import in_float32, is_adapter

PyTree = Any
Keys = tuple[str, ...]


class Pair(NamedTuple):
    """An adapter as it lies in our tree."""

    a: np.ndarray  # float32 [..., in, rank]
    b: np.ndarray  # float32 [..., rank, out]
    scale: float
    magnitude: np.ndarray | None = None  # float32 [..., out], of a DoRA adapter
    each: tuple[tuple[int, float], ...] = ()  # rank and scale as they are stored, of each layer


class Adapter(NamedTuple):
    """What a folder holds; `used` collects the names of the tensors that found their place."""

    folder: Path
    options: Mapping[str, Any]
    stored: Mapping[str, np.ndarray]
    used: set[str]
    start: Literal["pissa", "olora"] | None  # what the base lacks

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
        r, alpha = (self._of(module, key, pattern) for key, pattern in (("r", "rank_pattern"), _ALPHA))
        if r != rank:
            raise DataError(
                f"{self.folder / WEIGHTS}: the adapter of {module} is of rank {rank}, {CONFIG} says {r} (r, "
                "rank_pattern): one of the two is not this adapter's"
            )
        return alpha / rank**0.5 if self.options.get("use_rslora") else alpha / rank

    def _of(self, module: str, key: str, pattern: str) -> Any:
        for expression, value in (self.options.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({expression})$", module):
                return value
        return self.options[key]


_ALPHA = "lora_alpha", "alpha_pattern"


def load_adapter(
    params: PyTree,
    config: DecoderConfig,
    path: str,
    *,
    subfolder: str | None = None,
    base: str | None = None,
    **hub: Any,
) -> tuple[PyTree, tuple[str, ...]]:
    """Put a PEFT adapter onto `params`: kernels become LoRA nodes, modules saved whole replace those of the base.

    Args:
      params: arrays, or nodes of adapters that were read before.
      path: a folder, or a hub id (`hub`: options of `jtune.interop.hf.fetch`).
      subfolder: where the adapter is in it.
      base: what `params` were read from: an adapter that names another is noted.

    Returns:
      The tree, and the names of the modules that the adapter holds whole (PEFT's `modules_to_save`).

    Raises:
      DataError: it is no LoRA adapter, is not for this model, or uses what jtune does not honour, by name.
    """
    adapter = _open(hf.fetch(path, **hub) / (subfolder or ""), config)
    note_base(adapter.options, adapter.folder, base)
    _check_tied(adapter, config)
    if on_embedding := next((name for name in adapter.stored if ".lora_embedding_" in name), None):
        raise DataError(
            f"{adapter.folder / WEIGHTS}: {on_embedding}: jtune has no LoRA on embeddings; merge the adapter with PEFT"
        )
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
        if adapter.start is not None:
            return _on_the_rest(adapter, keys, leaf, pair, dropout)
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
    return loaded, trained_whole(adapter.options, params, config)


def trained_whole(options: Mapping[str, Any], params: PyTree, config: DecoderConfig) -> tuple[str, ...]:
    """The modules of `params` that an adapter_config.json says were trained whole, or rows of them.

    PEFT's names are the ends of a module's name in transformers' model ("wte", "model.embed_tokens").
    """
    there = dict.fromkeys((keys[:-1], layers.start if layers else None) for keys, _, layers in located(params))
    names: dict[str, None] = {}
    for name in (*(options.get("modules_to_save") or ()), *_token_modules(options)):
        meant = [
            ".".join(keys)
            for keys, layer in there
            for their in (file_names(config), module_names(config))
            if "experts" not in keys and module_name(keys, their, layer=layer).endswith(name)
        ]
        known = any(".".join(keys[:i]).endswith(name) for keys, _ in there for i in range(1, len(keys) + 1))
        names |= dict.fromkeys([name] if known or not meant else meant)
    return tuple(names)


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
    return arrays.put(x, everywhere)


def _open(folder: Path, config: DecoderConfig) -> Adapter:
    options = read_options(folder)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(folder / WEIGHTS, "np"))
        except FileNotFoundError as error:
            raise DataError(f"{folder}: {CONFIG} is there, but {WEIGHTS} is not") from error
        except (SafetensorError, OSError) as error:
            raise DataError(f"{folder / WEIGHTS}: not a complete safetensors file: {error}") from error
        every = list(file.keys())
        ours = in_place((name.removeprefix(PREFIX) for name in every), config)
        stored = {ours[name.removeprefix(PREFIX)]: file.get_tensor(name) for name in every}
    if len(stored) < len(every):
        twice = sorted(name for name in every if name.startswith(PREFIX) and name.removeprefix(PREFIX) in every)
        raise DataError(f"{folder / WEIGHTS}: {twice[0]} is there twice, with {PREFIX} and without")
    wrong = grouped(name for name, x in sorted(stored.items()) if not is_finite(x))
    if wrong:
        raise DataError(f"{folder / WEIGHTS}: not finite (NaN or infinity): {', '.join(wrong)}")
    return Adapter(folder, options, stored, set(), start_of(options, folder / CONFIG))


def has_own_head(folder: Path, config: DecoderConfig) -> bool:
    """Whether an adapter makes two tables of the one that a tied model has: PEFT then computes with two.

    So it is if one of the two is in `modules_to_save`, or only some of its rows are trained, or the head has an
    adapter; unless the file holds the same for both. What is wrong with the files is told when they are read.
    """
    if not config.tie_word_embeddings:
        return False
    [part] = tensors(("embed_tokens", "embedding"), config, range(0))
    stem, head = part.name.removesuffix(".weight"), hf.head_name(config).removesuffix(".weight")
    try:
        options = read_options(folder)
        with safe_open(folder / WEIGHTS, "np") as file:
            every = {name.removeprefix(PREFIX): name for name in file.keys()}  # noqa: SIM118
            names = {ours: every[name] for name, ours in in_place(every, config).items()}
            tables = ("weight", "token_adapter.trainable_tokens_delta")
            held = {name: file.get_tensor(names[name]) for x in (stem, head) for end in tables
                    if (name := f"{x}.{end}") in names}  # fmt: skip
    except (DataError, SafetensorError, OSError):
        return False
    mine, heads = (held.get(f"{x}.weight") for x in (stem, head))
    trained = {name.rpartition(".")[2] for name in options.get("modules_to_save") or ()}
    apart = heads is not None and (mine is None or not np.array_equal(mine, heads))
    apart |= heads is None and mine is not None and stem.rpartition(".")[2] in trained
    apart |= head.rpartition(".")[2] in trained and not options.get("ensure_weight_tying")
    mine, heads = (held.get(f"{x}.token_adapter.trainable_tokens_delta") for x in (stem, head))
    tokens = _token_modules(options)
    ids = [next((list(t) for name, t in tokens.items() if x.endswith(name)), None) for x in (stem, head)]
    apart |= heads is not None and (mine is None or ids[1] not in (None, ids[0]) or not np.array_equal(mine, heads))
    return apart or any(name.startswith(f"{head}.lora_") for name in names)


def _check_tied(adapter: Adapter, config: DecoderConfig) -> None:
    """Refuse an adapter with a head of its own on one table: its reader has not untied the two."""
    if has_own_head(adapter.folder, config):
        raise DataError(
            f"{adapter.folder / WEIGHTS}: this model's head is its embedding (tie_word_embeddings), and the adapter "
            "has a head of its own: read both with jtune.load_model"
        )


def _on_the_rest(adapter: Adapter, keys: Keys, leaf: Any, pair: Pair, dropout: float) -> PiSSA:
    """The node of an adapter whose base lacks the adapter's start (see `peft_options.start_of`)."""
    init, where = adapter.options["init_lora_weights"], f"{adapter.folder / CONFIG}"
    module = ".".join(keys[:-1])
    if "experts" in keys or (is_node(leaf) and not is_adapter(leaf)):
        raise DataError(f"{where}: init_lora_weights={init!r} is not supported for {module}: {_kind(leaf, keys)}")
    if f"{module}.base_layer.weight" in adapter.stored:
        raise DataError(f"{where}: init_lora_weights={init!r} is not supported for {module}, whose base is stored, too")
    if adapter.start == "pissa" and not all(scale > 0 for _, scale in pair.each):
        raise DataError(f"{where}: init_lora_weights={init!r} needs lora_alpha above 0")
    kernel = leaf if not is_adapter(leaf) else in_float32(leaf).astype(leaf.dtype)
    rest, a0, b0 = taken_out(kernel, adapter.start, pair.a.shape[-1], pair.scale, pair.each)
    return PiSSA(rest, _beside(kernel, pair.a), _beside(kernel, pair.b), pair.scale, dropout, a0, b0)


def _kind(leaf: Any, keys: Keys) -> str:
    return "experts" if "experts" in keys else f"its base is kept as {leaf.describe()}"


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
        adapter.used.add(hf.head_name(config))  # the same, repeated
    return arrays.put(out, leaf.sharding)


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
    rank = max(pair.a.shape[-1] for pair in pairs)
    scale = next((pair.scale for pair in pairs if pair.scale), 1.0)
    a = np.stack([_fill(pair.a, -1, rank) for pair in pairs])
    b = np.stack([_fill(pair.b * np.float32(pair.scale / scale), -2, rank) for pair in pairs])
    magnitudes = [pair.magnitude for pair in pairs if pair.magnitude is not None]
    each = tuple((pair.a.shape[-1], pair.scale) for pair in pairs)
    return Pair(a, b, scale, np.stack(magnitudes) if magnitudes else None, each)


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
            scale = adapter.scale(module, a.shape[0])
            return Pair(a.T, b.T, scale, adapter.magnitude(module), ((a.shape[0], scale),))
    return None


def _read_experts(adapter: Adapter, keys: Keys, config: DecoderConfig, layer: int | None) -> Pair | None:
    """Adapters of one projection of all experts, `[experts, in, rank]` and `[experts, rank, out]`."""
    assert config.experts is not None
    E, M = config.experts.count, config.experts.intermediate_size
    found = (_read_module(adapter, keys, config, layer, expert) for expert in range(E))
    modules = [pair for pair in found if pair is not None]
    if len(modules) == E:
        scale = next((m.scale for m in modules if m.scale), 1.0)
        return Pair(
            np.stack([m.a for m in modules]), np.stack([m.b * np.float32(m.scale / scale) for m in modules]), scale
        )
    their, down = module_names(config), keys[-2] == "down_proj"
    block = module_name(keys[: keys.index("experts")], their, layer=layer) + ".experts"
    inputs, outputs = (M, config.hidden_size) if down else (config.hidden_size, 2 * M)
    if their.swapped_experts:
        inputs, outputs = outputs, inputs
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
        if their.swapped_experts:
            a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
        if keys[-2] in ("gate_proj", "up_proj"):
            b = b[..., :M] if keys[-2] == "gate_proj" else b[..., M:]
        return Pair(a, b, adapter.scale(f"{block}.{'down_proj' if down else 'gate_up_proj'}", rank))
    return None
