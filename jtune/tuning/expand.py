"""Block expansion (LLaMA Pro, arXiv:2401.02415): layers are added to a model that then computes the same as before.

    params, decoder = expand(params, decoder, 8)       every fourth of 32 layers is followed by a copy: 40 layers

A copy's products that lead back to the residual (`o_proj`, `down_proj`) are zero, so that it adds nothing until it is
trained; what was there is never changed by training the copies alone (`use_llama_pro`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtune.errors import ConfigError, DataError
from jtune.models import DecoderConfig
from jtune.models.decoder import numbered
from jtune.models.families import decoder_config, full_config
from jtune.tuning.freeze import borders, cut_layers
from jtune.tuning.nodes import Path, kernels

PyTree = Any

TO_RESIDUAL = ("o_proj", "out_proj", "down_proj")  # of attention, of the delta rule, of an MLP or experts


def order(count: int, num_expand: int) -> list[int]:
    """Of each layer of the expanded model, the layer that it is a copy of; the second of a pair is the new one.

    >>> order(4, 2)
    [0, 1, 1, 2, 3, 3]

    Raises:
      ConfigError: the new ones cannot be evenly spaced.
    """
    if num_expand < 1 or count % num_expand:
        raise ConfigError(f"`num_layers` {count} should be divisible by `num_expand` {num_expand}.")
    split = count // num_expand
    return [i for layer in range(count) for i in [layer] * (1 + ((layer + 1) % split == 0))]


def expand(params: PyTree, decoder: DecoderConfig, num_expand: int) -> tuple[PyTree, DecoderConfig]:
    """The parameters and the decoder with `num_expand` more layers; the logits are what they were.

    Args:
      params: of arrays, as they are read.

    Raises:
      ConfigError: `num_expand` does not divide the number of layers.
    """
    copied = order(decoder.num_hidden_layers, num_expand)
    parts = []
    for numbers, stack in numbered(params["layers"]):
        here = [i for i in copied if i in numbers]
        index = np.array(here) - numbers.start
        is_new = np.array([i > 0 and here[i] == here[i - 1] for i in range(len(here))])

        def copy(path: Any, x: jax.Array, index=index, is_new=is_new) -> jax.Array:
            silent = any(key.key in TO_RESIDUAL for key in path)
            x = jnp.take(x, index, axis=0)
            return jnp.where(is_new.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros((), x.dtype), x) if silent else x

        parts.append(jax.jit(lambda stack, copy=copy: jax.tree_util.tree_map_with_path(copy, stack))(stack))
    layers = tuple(decoder.layers[i] for i in copied)
    grown = replace(decoder, num_hidden_layers=len(layers), layers=layers)
    return {**params, "layers": tuple(parts) if len(parts) > 1 else parts[0]}, grown


def expand_config(source: Mapping[str, Any], num_expand: int) -> dict[str, Any]:
    """The config.json of the expanded model: more layers, and lists that say something of each layer longer.

    Raises:
      ConfigError: `num_expand` does not divide the number of layers.
      DataError: the layers differ in a way that a longer model cannot be described in.
    """
    decoder = decoder_config(source)
    if decoder.wrapper is not None:
        raise DataError(f"config.json: {decoder.wrapper} is an image-text model: only text models can be expanded")
    copied = order(decoder.num_hidden_layers, num_expand)
    layers = tuple(decoder.layers[i] for i in copied)
    wanted = replace(decoder, num_hidden_layers=len(layers), layers=layers)
    full, _ = full_config(source)
    found = dict(source)
    for key in {"num_hidden_layers", "n_layer"} & (source.keys() | full.keys()):
        found[key] = len(copied)
    for key, value in full.items():  # what the family fills in, too: it would fill in another list
        if isinstance(value, list) and len(value) == decoder.num_hidden_layers and "layer" in key:
            found[key] = [value[i] for i in copied]
    if "mlp_only_layers" in full:
        found["mlp_only_layers"] = [i for i, layer in enumerate(layers) if not layer.sparse]
        found["decoder_sparse_step"] = 1
    for key in ("first_k_dense_replace", "num_dense_layers"):
        if full.get(key):
            found[key] = sum(not layer.sparse for layer in layers)
    if full.get("scale_depth"):  # MiniCPM divides it by the root of the number of layers
        found["scale_depth"] = full["scale_depth"] * (len(copied) / decoder.num_hidden_layers) ** 0.5
    rounded = lambda x: replace(x, residual_multiplier=round(x.residual_multiplier, 12))
    try:
        same = rounded(decoder_config(found)) == rounded(wanted)
    except DataError:
        same = False
    if not same:
        raise DataError(
            f"config.json: {decoder.family}: its layers differ by a rule that counts them, which a model with layers "
            "added does not follow: choose num_expand so that it does, or a model whose layers are alike"
        )
    return found


def on_layers(
    params: PyTree,
    layers: Collection[int],
    modules: Sequence[Path],
    add: Callable[[PyTree, list[str], int], PyTree],
) -> PyTree:
    """Apply `add` to the layers of these numbers alone; stacks are cut where they begin and end.

    Args:
      modules: the paths of those that are meant (`jtune.tuning.select`); of these, a stack gets what it has.
      add: (a tree that has these layers as its only stack, names of modules, the first layer's number) -> the tree.
    """
    parts = []
    for numbers, stack in numbered(cut_layers(params, borders(layers))["layers"]):
        here = {path for path, _ in kernels({"layers": stack})}
        names = [".".join(path) for path in modules if path in here]
        first = numbers.start
        parts.append(add({"layers": stack}, names, first)["layers"] if names and first in layers else stack)
    return {**params, "layers": tuple(parts) if len(parts) > 1 else parts[0]}
