"""PEFT adapters written from a tree: adapter_config.json and adapter_model.safetensors."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jtune.distributed import processes
from jtune.errors import ConfigError, JtuneError, NonFiniteError
from jtune.interop.peft_options import CONFIG, EMBEDDINGS, PREFIX, WEIGHTS
from jtune.interop.peft_read import Pair
from jtune.interop.weights import grouped, is_finite
from jtune.models import DecoderConfig
from jtune.models.decoder import numbered
from jtune.models.families import module_names
from jtune.models.families.base import Names
from jtune.models.names import located, mixture, module_name, tensors
from jtune.sharding import arrays
from jtune.tuning import is_node
from jtune.tuning.lora import DoRA, LoRA, PiSSA
from jtune.tuning.nodes import in_float32, is_adapter, map_fields

PyTree = Any
Keys = tuple[str, ...]
Sized = tuple[int, float]  # rank, alpha

# Modules that PEFT takes for a mixture's experts as transformers 4 had them, wherever they are, if a target names them.
# Their weights may be targets instead, which PEFT supports for adapters without dropout or DoRA.
EXPERTS = ("gate_proj", "up_proj", "down_proj")


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

    Raises:
      ConfigError: there is an adapter that PEFT does not know.
      NonFiniteError: what is to be written holds NaN or infinity.
    """
    folder = Path(folder)
    params = _at_hand(params, mask, EMBEDDINGS if resized else ())
    if not processes.is_first():
        return
    found, options = contents(params, mask, config, base=base, use_rslora=use_rslora, resized=resized)
    found = {name: np.ascontiguousarray(x) for name, x in found.items()}
    wrong = grouped(name.removeprefix(PREFIX) for name, x in found.items() if not is_finite(x))
    if wrong:
        raise NonFiniteError(f"{folder / WEIGHTS} is not written: not finite (NaN or infinity): {', '.join(wrong)}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(options, indent=2) + "\n")


def check_writable(params: PyTree, mask: PyTree, config: DecoderConfig, *, resized: bool = False) -> None:
    """Form the adapter of shapes alone, so that what cannot be written is known before anything is computed.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ConfigError: what has no place in a PEFT adapter, by the name of its module.
    """
    nothing = lambda x: np.broadcast_to(np.float32(0), x.shape)  # takes no memory
    contents(jax.tree.map(nothing, params), mask, config, base="", resized=resized)


def contents(
    params: PyTree, mask: PyTree, config: DecoderConfig, *, base: str, use_rslora: bool = False, resized: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What the two files of an adapter hold: tensors by name, float32, and options. For the arguments see
    `save_adapter`."""
    kept = EMBEDDINGS if resized else ()
    out: dict[str, np.ndarray] = {}
    modules: dict[str, Sized] = {}  # name without layer
    parameters: dict[str, Sized] = {}
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

    def write(keys: Keys, leaf: Any, layers: range, trains: bool) -> None:
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
            by_weight = config.experts is not None and (keys[-2] == "gate" or (keys[-2] in EXPERTS and _is_plain(leaf)))
            names = [_target(keys[:-1], every.keys(), their)]
            if not everywhere(keys[:-1]):
                names = [module_name(keys[:-1], their, layer=layer) for layer in layers]
            for name in names:
                key = f"{name}.weight" if by_weight else name
                (parameters if by_weight else modules)[key] = rank, alpha(rank, pair.scale)
        elif trains and not is_node(leaf):
            x = np.asarray(leaf, np.float32)
            for part in tensors(keys, config, layers):
                piece = x[part.index] if part.index else x
                out[PREFIX + part.name] = piece.swapaxes(-1, -2) if part.transposed else piece
            word = their.words.get(keys[-2], keys[-2])
            if config.wrapper is not None and keys[0] in ("embed_tokens", "norm"):  # other towers may have one, too
                word = f"{their.prefix.rpartition('.')[2]}.{word}"
            whole[word] = None
            if keys[0] == "embed_tokens" and config.tie_word_embeddings:
                # PEFT asks for both names of a tied pair.
                out[f"{PREFIX}{their.words.get('lm_head', 'lm_head')}.weight"] = x

    masks = jax.tree.leaves(mask, is_leaf=is_node)
    for (keys, leaf, layers), its_mask in zip(located(params), masks, strict=True):
        _check_known(keys, leaf)
        try:
            write(keys, leaf, layers, its_mask is True)
        except JtuneError:
            raise
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"{'.'.join(keys[:-1])}: a PEFT adapter has no place for it: {error!r}") from error
    for name, blocks, (rank, scale), found in _join_experts(params, config):
        experts = (*mixture(config), "experts")
        some = any(module[:3] == experts and adapted[module] and not everywhere(module) for module in every)
        for parameter in [f"{block}.{name}" for block in blocks] if some else [name]:
            parameters[parameter] = rank, alpha(rank, scale)
        out |= {PREFIX + key: x for key, x in found.items()}
    nodes = [x for x in jax.tree.leaves(params, is_leaf=is_node) if is_adapter(x)]
    return out, _options(nodes, modules, parameters, list(whole), config, base=base, use_rslora=use_rslora)


def _options(
    nodes: Sequence[Any],
    modules: Mapping[str, Sized],
    parameters: Mapping[str, Sized],
    whole: Sequence[str],
    config: DecoderConfig,
    *,
    base: str,
    use_rslora: bool,
) -> dict[str, Any]:
    """The content of adapter_config.json."""
    default = Counter([*modules.values(), *parameters.values()]).most_common(1)[0][0]
    head = module_name(("lm_head",), module_names(config))
    other = {name: value for name, value in {**modules, **parameters}.items() if value != default}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": default[0],
        "lora_alpha": default[1],
        "rank_pattern": {_pattern(name, head): rank for name, (rank, _) in other.items()},
        "alpha_pattern": {_pattern(name, head): a for name, (_, a) in other.items()},
        "lora_dropout": nodes[0].dropout,
        "target_modules": sorted(modules) if config.wrapper is None else _inside(sorted(modules), head, config),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": list(whole) or None,
        "ensure_weight_tying": bool(whole) and config.tie_word_embeddings,
        "use_rslora": use_rslora,
        "use_dora": any(isinstance(x, DoRA) for x in nodes),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _check_known(keys: Keys, node: Any) -> None:
    """Raise a ConfigError for an adapter that PEFT does not know."""
    if is_adapter(node) and not isinstance(node, LoRA):
        raise ConfigError(
            f"{'.'.join(keys[:-1])}: PEFT has no adapter like {type(node).__name__}: merge it "
            "(jtune.lora.merge) and write the model (jtune.interop.hf.save_model)"
        )


def _is_plain(node: LoRA) -> bool:
    return not node.dropout and not isinstance(node, DoRA)


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
            return map_fields(lambda name, x: x if name == "base" and not keep else jax.tree.map(arrays.whole, x), leaf)
        return jax.tree.map(lambda x, its: arrays.whole(x) if its or keep else x, leaf, trains)

    return jax.tree_util.tree_map_with_path(fetch, params, mask, is_leaf=is_node)


def _pattern(name: str, head: str) -> str:
    """A regular expression of PEFT's for what `target_modules` calls `name`: a whole name has nothing before it.

    Args:
      head: the module that lies in no other.
    """
    return re.escape(name) if name == head or re.search(r"\.\d+\.", name) else f".*\\.{re.escape(name)}"


def _inside(names: Sequence[str], head: str, config: DecoderConfig) -> str:
    """A regular expression of PEFT's for these modules of the text stack: other towers may have such modules, too."""
    prefix = module_names(config).prefix
    whole = [name for name in names if name == head or name.startswith(f"{prefix}.")]
    ends = "|".join(re.escape(name) for name in names if name not in whole)
    return "|".join([*map(re.escape, whole), *([rf"{re.escape(prefix)}\..*\.({ends})"] if ends else [])])


def _target(module: Keys, every: Collection[Keys], their: Names) -> str:
    """What PEFT is to call a module: the last word of its name, or two where others end in the same word."""
    words = lambda keys: module_name(keys, their, layer=0, expert=0).split(".")
    alike = [other for other in every if words(other)[-1] == words(module)[-1] and "experts" not in other]
    one_parent = len({*(".".join(words(other)[-2:-1]) for other in alike)}) == 1
    return ".".join(words(module)[-1 if one_parent else -2 :])


def _join_experts(
    params: PyTree, config: DecoderConfig
) -> Iterator[tuple[str, list[str], tuple[int, float], dict[str, np.ndarray]]]:
    """Adapters of experts as PEFT's parameters, stack by stack: (name, modules, (rank, scale), tensors).

    Gate and up become one adapter of their ranks together: `a` side by side, `b` block-diagonal.
    """
    for numbers, stack in numbered(params["layers"]):
        nodes = {
            name: _written(leaf["kernel"])
            for name, leaf in stack.get(mixture(config)[-1], {}).get("experts", {}).items()
            if is_adapter(leaf["kernel"])
        }
        their = module_names(config)
        block = [module_name(mixture(config), their, layer=layer) + ".experts" for layer in numbers]
        files = partial(_files, swapped=their.swapped_experts)
        down, joined = nodes.get("down_proj"), _joined(nodes)
        if joined is not None:
            modules = [f"{name}.base_layer" for name in block] if down is not None else block
            yield "gate_up_proj", block, (joined.a.shape[-1], joined.scale), files(joined, modules)
        if down is not None:
            yield "down_proj", block, (down.a.shape[-1], down.scale), files(down, block)


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


def _files(pair: Pair, modules: list[str], *, swapped: bool) -> dict[str, np.ndarray]:
    """PEFT's layout, for each layer: A `[experts * rank, in]`, B `[out, rank * experts]`; `swapped`: in is out."""
    found = {}
    for module, a, b in zip(modules, pair.a, pair.b, strict=True):
        if swapped:
            a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
        E, inputs, rank = a.shape
        found[f"{module}.lora_A.weight"] = a.transpose(0, 2, 1).reshape(E * rank, inputs)
        found[f"{module}.lora_B.weight"] = b.transpose(2, 1, 0).reshape(-1, rank * E)
    return found
