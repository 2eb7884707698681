"""Training FLOPs per token, counted from shapes and from the mask of what trains.

A multiply and an add are two FLOPs; a look-up in the embedding is none. These are model FLOPs: those that the
mathematics of the update needs, without recomputation by remat or by a flash kernel. XLA's own count does not serve:
it counts the body of a loop once, however often it runs, and sees nothing inside kernels.

Per token, with N weights in the matrix products of the layers, H = embed * vocab of the head, A the forward FLOPs of
attention, n the weights of the adapters, r the share of tokens that carry a label (only these reach the head):

    full    6 (N + r H) + 3 A
    LoRA    4 (N + r H) + 6 n + 3 A        less the gradients by the input of layer 0, which nothing needs
    freeze  2 (N + r H) + 2 r H + A, and for each layer that trains, or lies above one, its backward pass

A kernel has its forward pass (2 a weight); the gradient by its input (2), if anything below it trains; the gradient by
itself (2), if it trains. These are the rules of arXiv:2001.08361 (appendix B) and of PaLM's model FLOPs utilisation
(arXiv:2204.02311, appendix B), but for causal attention, of which only the half that is not masked counts.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jtune.losses.units import UnitObjective
from jtune.models import DecoderConfig
from jtune.models.config import Layer
from jtune.models.decoder import numbered, stacks
from jtune.models.delta import delta_config
from jtune.models.value_head import VALUE_HEAD
from jtune.planning.chips import peak_flops
from jtune.train.program import Program
from jtune.tuning import adapter_mask, is_node, lora, partition
from jtune.tuning.lora import LoRA

# The order of the forward pass: a kernel needs its input gradient if something earlier trains.
_INTO_ATTENTION, _ATTENTION, _OUT_OF_ATTENTION, _INTO_MLP, _OUT_OF_MLP = range(5)
_STAGES_OF_A_LAYER = 5


def mean_attended(lengths: Sequence[int] | np.ndarray, window: int | None = None, *, chunked: bool = False) -> float:
    """How many tokens a token sees on average, itself included: causal, in segments of `lengths`, within `window`.

    Args:
      chunked: windows do not slide; each segment is cut into pieces of that length.

    >>> mean_attended([4]), mean_attended([4], window=2), mean_attended([1, 3]), mean_attended([4], 2, chunked=True)
    (2.5, 1.75, 1.75, 1.5)
    """
    n = np.asarray(lengths, np.float64)
    if chunked and window is not None:
        rest = n % window
        return float(((n - rest) * (window + 1) + rest * (rest + 1)).sum() / 2 / n.sum())
    full = n if window is None else np.minimum(n, window)  # positions i = 1..full see i tokens, the others `window`
    seen = full * (full + 1) / 2 + (n - full) * (window or 0)
    return float(seen.sum() / n.sum())


class Product(NamedTuple):
    """One matrix product of the model, in the order of the forward pass."""

    depth: int  # where it stands: layer * _STAGES_OF_A_LAYER + stage
    weights: float  # multiply-adds of a token
    adapter: float  # weights of its adapter, 0 if it has none
    adapter_out: float  # those of b alone
    trains: bool  # the kernel itself, not its adapter


def flops_per_token(
    config: DecoderConfig,
    params: Any,
    mask: Any,
    *,
    lengths: Sequence[int] | np.ndarray,
    label_share: float = 1.0,
) -> float:
    """Model FLOPs of one token: forward and backward.

    What it takes to reach norms and biases is not counted.

    Args:
      params: as `jtune.tuning.prepare` gives them, of anything with a `.shape`; nodes and stacks included.
      mask: tree of bool like it: what trains.
      lengths: tokens of the segments; what matters is how far a token sees on average.
      label_share: share of the tokens that carry a label, the only ones that go through the head.
    """
    products = list(_products(config, params, mask, label_share))
    embedding_trains = _any(mask["embed_tokens"])
    trained = [p.depth for p in products if p.trains or p.adapter]
    lowest = -1 if embedding_trains else min(trained, default=10**9)
    total = sum(_of_product(p, input_gradient=lowest < p.depth) for p in products)
    for number, layer in enumerate(config.layers):
        passes = 3 if lowest < number * _STAGES_OF_A_LAYER + _ATTENTION else 1  # the backward pass has four products
        total += passes * _mixing(config, layer, lengths)
    return total


def program_flops(program: Program, *, lengths: Sequence[int] | np.ndarray, label_share: float) -> float:
    """`flops_per_token` of a program, that of its reference included; and of mismatched answers, which are about as
    long as the others, the forward pass."""
    objective, config = program.objective, program.module.config
    given = {"lengths": lengths, "label_share": label_share}

    def forward(config: DecoderConfig, params: Any) -> float:
        return flops_per_token(config, params, jax.tree.map(lambda _: False, params), **given)

    reference = 0.0
    if program.second is not None:
        reference = forward(program.second.config, program.constants.second)
    elif objective.anchored:
        reference = forward(config, lora.split(program.params)[0])
    total = flops_per_token(config, program.params, program.mask, **given) + reference
    if isinstance(objective, UnitObjective) and objective.mismatched:
        total += forward(config, program.params) + reference
    return total


def recomputed_per_token(config: DecoderConfig, params: Any, *, lengths: Sequence[int] | np.ndarray) -> float:
    """What `remat: full` computes a second time, the forward pass of all layers. It is not among the model FLOPs."""
    nothing = jax.tree.map(lambda _: False, params)
    products = sum(2 * (p.weights + p.adapter) for p in _products(config, params, nothing, 0.0))
    return products + sum(_mixing(config, layer, lengths) for layer in config.layers)


def _mixing(config: DecoderConfig, layer: Layer, lengths: Sequence[int] | np.ndarray) -> float:
    """The forward pass of what mixes the tokens of one layer, without its products with parameters.

    Attention is two products, of queries with keys and of weights with values. The gated delta rule takes the state
    three times, however long the sequence is: what it gives for the key, what is written, what it gives for the query.
    A convolution has a product for each tap. That the rule is computed in chunks costs more, and is no model FLOPs.
    """
    if layer.linear:
        d = delta_config(config)
        channels = 2 * d.key_heads * d.key_dim + d.value_heads * d.value_dim
        return 6 * d.value_heads * d.key_dim * d.value_dim + 2 * d.taps * channels
    if layer.conv:
        assert config.short_conv is not None
        return 2 * config.short_conv.taps * config.hidden_size
    dims = 2 * layer.head_dim if layer.head_dim else config.qk_dim + config.value_dim
    seen = mean_attended(lengths, layer.window, chunked=layer.chunked)
    return 2 * config.num_attention_heads * dims * seen


def _of_product(p: Product, *, input_gradient: bool) -> float:
    forward = 2 * (p.weights + p.adapter)
    by_input = 2 * (p.weights + p.adapter - p.adapter_out) if input_gradient else 0
    by_adapter = 2 * p.adapter + 2 * p.adapter_out  # the gradient of a passes through b
    return forward + by_input + by_adapter + (2 * p.weights if p.trains else 0)


def _products(config: DecoderConfig, params: Any, mask: Any, label_share: float) -> Iterator[Product]:
    """Every matrix product with parameters, layer by layer, then the head."""
    for (numbers, stack), trains in zip(numbered(params["layers"]), stacks(mask["layers"]), strict=True):
        for names, kernel, its_mask in _kernels(stack, trains):
            share = config.experts.per_token / config.experts.count if config.experts and "experts" in names else 1.0
            for layer in numbers:
                yield _product(kernel, its_mask, layer * _STAGES_OF_A_LAYER + _stage(names), share / len(numbers))
    top = config.num_hidden_layers * _STAGES_OF_A_LAYER
    if VALUE_HEAD in params:  # in the place of the head
        yield _product(params[VALUE_HEAD]["kernel"], mask[VALUE_HEAD]["kernel"], top, label_share)
    elif config.tie_word_embeddings:
        size = config.vocab_size * config.hidden_size * label_share
        yield Product(top, size, 0, 0, _any(mask["embed_tokens"]))
    else:
        yield _product(params["lm_head"]["kernel"], mask["lm_head"]["kernel"], top, label_share)


def _stage(names: tuple[str, ...]) -> int:
    last = names[-1]
    if names[0] in ("self_attn", "linear_attn", "conv"):
        return _OUT_OF_ATTENTION if last in ("o_proj", "out_proj") else _INTO_ATTENTION
    return _OUT_OF_MLP if last == "down_proj" else _INTO_MLP


def _product(kernel: Any, mask: Any, depth: int, share: float) -> Product:
    """Of a kernel or a node of which `share` meets one token (of a stack: one layer; of experts: those chosen)."""
    weights = math.prod(kernel.shape) * share
    if not is_node(kernel):
        return Product(depth, weights, 0, 0, bool(mask))
    adapter = sum(x.size for x in jax.tree.leaves(partition(kernel, adapter_mask(kernel))[0])) * share
    out = kernel.b.size * share if isinstance(kernel, LoRA) else 0.0
    return Product(depth, weights, adapter, out, _any(partition(mask, adapter_mask(kernel))[1]))


def _kernels(tree: Any, mask: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Kernels of a stack with the names of their modules, and their masks."""
    for name, child in tree.items():
        if name == "kernel":
            yield names, child, mask[name]
        elif isinstance(child, dict) and name != "indexer":  # whose kernels no product is with
            yield from _kernels(child, mask[name], (*names, name))


def _any(mask: Any) -> bool:
    return any(jax.tree.leaves(mask))


log = logging.getLogger("jtune")


def make_rates(flops_per_token: float, mesh: Mesh) -> Callable[[float], dict[str, float]]:
    """From tokens a second to what is logged of them: model FLOPs a second, and their share of the peak (MFU) of chips
    whose peak is known. The formula: `jtune.planning.flops`.
    """
    peak = peak_flops(mesh.devices.flat[0].device_kind)

    def rates(speed: float) -> dict[str, float]:
        found = {"tokens_per_second": speed, "tflops_per_device": speed * flops_per_token / mesh.size / 1e12}
        return found | ({"mfu": speed * flops_per_token / (peak * mesh.size)} if peak else {})

    return rates
