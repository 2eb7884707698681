"""Where each parameter lies in a Hugging Face checkpoint: one map, read by loading, saving and adapters alike.

The tree already has Hugging Face's names. What is left: the prefix `model.`, the layer's number, `weight` for kernels
and scales, and the few families whose files use other words.
"""

from collections.abc import Iterator
from typing import NamedTuple

from jtune.models.config import DecoderConfig

Path = tuple[str, ...]

# family -> words of our modules -> words in its files
WORDS = {
    "mixtral": {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
}
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


class Tensor(NamedTuple):
    """One tensor of a checkpoint, and the part of a leaf that it holds."""

    name: str  # of the tensor
    index: tuple[int, ...]  # into the leading axes (layer, expert) of the leaf
    transposed: bool  # files hold kernels as [out, in]


def module_name(path: Path, family: str, *, layer: int | None = None, expert: int | None = None) -> str:
    """The dotted module name of a path without its leaf, as in the files of `family`.

    >>> module_name(("layers", "mlp", "experts", "up_proj"), "mixtral", layer=3, expert=0)
    'model.layers.3.block_sparse_moe.experts.0.w3'
    """
    if path[0] == "lm_head":
        return "lm_head"
    words = WORDS.get(family, {})
    parts = ["model"]
    for part in path:
        parts.append(words.get(part, part))
        if part == "layers":
            parts.append(str(layer))
        if part == "experts":
            parts.append(str(expert))
    return ".".join(parts)


def tensors(path: Path, config: DecoderConfig, *, first_layer: int = 0, layers: int | None = None) -> Iterator[Tensor]:
    """The tensors that make up the leaf at `path`, e.g. `("layers", "self_attn", "q_proj", "kernel")`.

    Args:
      first_layer, layers: for a stack that does not hold all layers.
    """
    modules, leaf = path[:-1], path[-1]
    count = config.num_hidden_layers if layers is None else layers
    for layer in range(count) if modules[0] == "layers" else (None,):
        for expert in range(config.num_experts) if "experts" in modules else (None,):
            number = None if layer is None else first_layer + layer
            name = module_name(modules, config.family, layer=number, expert=expert)
            index = tuple(i for i in (layer, expert) if i is not None)
            yield Tensor(f"{name}.{LEAVES[leaf]}", index, leaf == "kernel")
