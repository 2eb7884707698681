"""The place of each parameter in a Hugging Face checkpoint: one map for loading, saving and adapters.

The tree already has Hugging Face's names. The map adds the prefix `model.`, the number of the layer, `weight` for
kernels and scales, and the names that differ in a family's files (`jtune.models.families.base.Names`).
"""

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax

from jtune.models.config import DecoderConfig
from jtune.models.decoder import numbered
from jtune.models.families import file_names
from jtune.models.families.base import Names
from jtune.models.value_head import VALUE_HEAD

Path = tuple[str, ...]

# Heads that lie outside of the model: in LLaMA-Factory's file, and in transformers' classifiers.
HEADS = {VALUE_HEAD: "v_head.summary", "score": "score"}
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


class Tensor(NamedTuple):
    """One tensor of a checkpoint, and its part of a leaf."""

    name: str  # of the tensor
    index: tuple[int, ...]  # into the leading axes (layer, expert, head) of the leaf
    transposed: bool  # files hold kernels as [..., out, in]


def module_name(path: Path, their: Names, *, layer: int | None = None, expert: int | None = None) -> str:
    """The dotted module name of a path without its leaf.

    >>> from jtune.models.families.mixtral import WORDS
    >>> module_name(("layers", "mlp", "experts", "up_proj"), Names(words=WORDS), layer=3, expert=0)
    'model.layers.3.block_sparse_moe.experts.0.w3'
    """
    return _renamed(_dotted(path, their, layer, expert), their)


def _renamed(name: str, their: Names) -> str:
    for pattern, replacement in their.patterns:
        name = re.sub(pattern, replacement, name)
    return name


def _dotted(path: Path, their: Names, layer: int | None, expert: int | None) -> str:
    if path[0] == "lm_head":
        return their.words.get("lm_head", "lm_head")
    if path[0] in HEADS:
        return HEADS[path[0]]
    words = [their.prefix]
    for word in path:
        words += [name for name in [their.words.get(word, word)] if name]
        if word == "layers":
            words.append(str(layer))
        if word == "experts" and not their.stacked_experts:
            words.append(str(expert))
    return ".".join(words)


def mixture(config: DecoderConfig) -> Path:
    """The path of the module with router and experts, in the layers that have them."""
    return "layers", "moe" if config.experts is not None and config.experts.beside else "mlp"


def tensors(path: Path, config: DecoderConfig, layers: range) -> Iterator[Tensor]:
    """The tensors that make up the leaf at `path`, e.g. `("layers", "self_attn", "q_proj", "kernel")`.

    Args:
      layers: the layers of the leaf (see `located`).
    """
    their, modules, leaf = file_names(config), path[:-1], path[-1]
    one_each = "experts" in modules and not their.stacked_experts  # a tensor for each expert
    number = config.experts.count if config.experts is not None and one_each else 0
    as_is = any(knows(modules, name, their) for name in their.as_is)
    heads = {"q_norm": config.num_attention_heads, "k_norm": config.num_key_value_heads}
    for layer in layers or (None,):
        for expert in range(number) if one_each else (None,):
            for head in range(heads[modules[-1]]) if modules[-1] in their.per_head else (None,):
                name = _dotted(modules, their, layer, expert)
                name += f".{LEAVES.get(leaf, leaf)}" if head is None else f".{head}.{LEAVES.get(leaf, leaf)}"
                place = None if layer is None else layer - layers.start
                index = tuple(i for i in (place, expert, head) if i is not None)
                yield Tensor(_renamed(name, their), index, leaf == "kernel" and not as_is)


def further_heads(names: Collection[str], layers: int) -> set[str]:
    """The tensors of a checkpoint that predict tokens after the next (arXiv:2404.19737), which a decoder has not.

    They have a module of their own, or are layers after the last, which begin with a kernel `eh_proj`.

    >>> names = ["model.layers.1.eh_proj.weight", "model.layers.1.mlp.up_proj.weight", "mtp.fc.weight", "lm_head"]
    >>> sorted(further_heads(names, layers=1))
    ['model.layers.1.eh_proj.weight', 'model.layers.1.mlp.up_proj.weight', 'mtp.fc.weight']
    """
    begun = {name.removesuffix("eh_proj.weight") for name in names if name.endswith(".eh_proj.weight")}
    begun = {stem for stem in begun if int((re.search(r"\.(\d+)\.$", stem) or [0, "0"])[1]) >= layers}
    return {name for name in names if name.startswith((*begun,)) or re.search(r"(^|\.)mtp[._]", name)}


def located(params: Any) -> list[tuple[Path, Any, range]]:
    """Every leaf of a parameter tree, in the order of `jax.tree.leaves`: its path, the leaf, and its layers.

    A leaf outside of the layers has none. A node in the place of a kernel counts as one leaf. Layers may be in one
    stack or in several.
    """
    layers = [numbers for numbers, _ in numbered(params["layers"])]
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: hasattr(x, "project")):
        keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        stack = next((key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)), 0)
        leaves.append((keys, leaf, layers[stack] if keys[0] == "layers" else range(0)))
    return leaves


def knows(path: Path, wanted: str, their: Names) -> bool:
    """Whether `wanted` names the module at `path`: it is the end of its name, in jtune's words or the family's.

    >>> knows(("layers", "self_attn", "qkv_proj"), "c_attn", Names(words={"qkv_proj": "c_attn"}))
    True
    """
    ends = tuple(wanted.split("."))
    theirs = tuple(part for word in path for part in their.words.get(word, word).split("."))
    return any(p[-len(ends) :] == ends for p in (path, theirs))
