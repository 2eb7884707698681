"""From the parameters that were read to those that are trained: one function for all ways of tuning."""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jtune.config import FinetuningArguments
from jtune.config.stages import rules_of
from jtune.errors import ConfigError
from jtune.models import DecoderConfig
from jtune.models.decoder import numbered
from jtune.models.families import file_names
from jtune.tuning import lora
from jtune.tuning.expand import on_layers
from jtune.tuning.freeze import expanded_layers, freeze
from jtune.tuning.masks import full_mask
from jtune.tuning.nodes import adapter_mask, count, is_adapter, is_node, map_fields, select

log = logging.getLogger("jtune")

PyTree = Any


def prepare(
    params: PyTree,
    args: FinetuningArguments,
    decoder: DecoderConfig,
    *,
    adapters: Sequence[str] = (),
    load_adapter: Callable[[PyTree, DecoderConfig, str], tuple[PyTree, Sequence[str]]],
    key: jax.Array,
    frozen_dtype: Any,
) -> tuple[PyTree, PyTree]:
    """Apply the tuning that `args` asks for.

    Args:
      adapters: PEFT adapters; merged in order, but for the last, which goes on being trained unless
        `create_new_adapter`.
      load_adapter: `jtune.interop.peft.load_adapter`.
      frozen_dtype: frozen leaves are cast to it where that makes them smaller. What trains is float32, or bfloat16
        with `pure_bf16`.

    Returns:
      The parameters and, of the same structure, a tree of bool: what trains.

    Raises:
      ConfigError: a name that matches nothing, or contradicts another.
    """
    if args.finetuning_type == "full":
        mask = full_mask(params)
    elif args.finetuning_type == "freeze":
        params, mask = freeze(
            params,
            args.freeze_trainable_layers,
            args.freeze_trainable_modules,
            args.freeze_extra_modules,
            expanded=args.use_llama_pro,
        )
    else:
        params, whole = with_adapter(params, args, decoder, adapters, load_adapter, key)
        mask = whole_modules(params, adapter_mask(params), whole)
    if rules_of(args.stage).scores and "lm_head" in mask:  # no score depends on it
        mask = {**mask, "lm_head": jax.tree.map(lambda _: False, mask["lm_head"])}
    return in_dtypes(params, mask, jnp.bfloat16 if args.pure_bf16 else jnp.float32, frozen_dtype), mask


def in_dtypes(params: PyTree, mask: PyTree, trained: Any, frozen: Any) -> PyTree:
    """What trains in one dtype, the rest in another where that is smaller; but what a node keeps beside its base, and
    does not train, is in the dtype that the node chose."""

    def cast(x: Any, trains: Any) -> Any:
        if is_node(x):
            of = lambda name, v: cast(v, getattr(trains, name)) if name in ("base", *x.adapter) else v
            return map_fields(of, x)
        smaller = jnp.dtype(frozen).itemsize < x.dtype.itemsize
        return x.astype(trained) if trains else x.astype(frozen) if smaller else x

    return jax.tree.map(cast, params, mask, is_leaf=is_node)


def with_adapter(
    params: PyTree, args: FinetuningArguments, decoder: DecoderConfig, adapters: Sequence[str], load_adapter, key
) -> tuple[PyTree, Sequence[str]]:
    """The parameters with the one adapter that is trained, on top of those that are merged; what trains whole."""
    to_merge, resumed = (adapters, None) if args.create_new_adapter or not adapters else (adapters[:-1], adapters[-1])
    for path in to_merge:
        log.info("merging adapter %s into the base", path)
        params = lora.merge(load_adapter(params, decoder, path)[0])
    if resumed is None:
        add = partial(
            lora.add,
            rank=args.lora_rank,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            form="dora" if args.use_dora else "pissa" if args.pissa_init else "lora",
            use_rslora=args.use_rslora,
            svd_iterations=args.pissa_iter,
            rank_pattern=args.rank_pattern,
            alpha_pattern=args.alpha_pattern,
            names=file_names(decoder),
        )
        if not args.use_llama_pro:
            return add(params, args.lora_target, key=key), args.additional_target
        modules = select(params, args.lora_target, file_names(decoder))
        expanded = expanded_layers(decoder.num_hidden_layers, args.freeze_trainable_layers)
        in_stack = lambda tree, names, first: add(tree, names, key=jax.random.fold_in(key, first))
        return on_layers(params, expanded, modules, in_stack), args.additional_target
    log.info("training goes on from adapter %s: rank, alpha and targets are its own", resumed)
    return load_adapter(params, decoder, resumed)


def whole_modules(params: PyTree, mask: PyTree, names: Sequence[str]) -> PyTree:
    """Flip the leaves of the modules that `additional_target` names, by the end of their names as PEFT has it.

    Raises:
      ConfigError: a name that matches nothing, or a module that has an adapter or does not train.
    """
    matched = set()

    def flip(path: Any, leaf: Any, trains: Any) -> Any:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][:-1]
        modules = [".".join(keys[: i + 1]) for i in range(len(keys))]
        hit = [name for name in names if any(module.endswith(name) for module in modules)]
        matched.update(hit)
        if hit and is_adapter(leaf):
            raise ConfigError(
                f"additional_target: {hit[0]!r} has an adapter already (lora_target): name it in one only"
            )
        if hit and is_node(leaf):
            raise ConfigError(
                f"additional_target: {hit[0]!r} is kept as {leaf.describe()}, which cannot train: put it in lora_target"
            )
        return True if hit else trains

    flipped = jax.tree_util.tree_map_with_path(flip, params, mask, is_leaf=is_node)
    missing = [name for name in names if name not in matched]
    if missing:
        there = list(dict.fromkeys(key.key for path, _ in jax.tree_util.tree_leaves_with_path(mask) for key in path[:-1]
                                   if isinstance(key, jax.tree_util.DictKey) and key.key != "layers"))  # fmt: skip
        tied = " This model's head is its embed_tokens." if "lm_head" in missing else ""
        raise ConfigError(f"additional_target: {', '.join(missing)} not found.{tied} There are: {', '.join(there)}")
    return flipped


def describe_trainable(params: PyTree, mask: PyTree) -> str:
    """What trains, module by module, and how much of the whole that is.

    >>> print(describe_trainable(*prepare(...)))                                                        # doctest: +SKIP
    trains 81,920 of 412,352 parameters (19.9%):
      layers.*.self_attn.{q_proj,v_proj}: LoRA of rank 8, scale 2
    """
    groups: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    nodes = jax.tree.map(lambda x, m: (x, m), params, mask, is_leaf=is_node)
    is_pair = lambda x: isinstance(x, tuple) and len(x) == 2 and not isinstance(x[0], dict)
    first: dict[int, str] = _layer_spans(params)
    for path, (x, m) in jax.tree_util.tree_leaves_with_path(nodes, is_leaf=is_pair):
        if not any(jax.tree.leaves(m)):
            continue
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names[0] == "layers":
            stack = next((key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)), 0)
            names[0] = f"layers.{first[stack]}"
        how = x.describe() if is_node(x) else "whole"
        module = names[:-1]
        groups[".".join(module[:-1]), how][module[-1]] = None
    sizes = jax.tree.map(lambda x, trains: x.size if trains else 0, params, mask)
    trained, total = sum(jax.tree.leaves(sizes)), count(params)
    lines = [f"trains {trained:,} of {total:,} parameters ({trained / total:.2%}):"]
    for (parent, how), modules in groups.items():
        inner = next(iter(modules)) if len(modules) == 1 else "{" + ",".join(modules) + "}"
        lines.append(f"  {parent + '.' if parent else ''}{inner}: {how}")
    return "\n".join(lines)


def _layer_spans(params: PyTree) -> dict[int, str]:
    """How each stack of layers is called: `*` if there is one, else `4-7`."""
    found = [numbers for numbers, _ in numbered(params["layers"])]
    if len(found) == 1:
        return {0: "*"}
    return {i: f"{n[0]}-{n[-1]}" if len(n) > 1 else str(n[0]) for i, n in enumerate(found)}
