"""Adam of one parameter (arXiv:1412.6980), its moments in float32 or in 8 bits, or one second moment for many numbers;
and Lion's and Adagrad's rules beside it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtune.train.optimizers import blocks
from jtune.train.optimizers.leafwise import Moments, Path, Rule, Shape, joined, keys, zeros


class Kept(NamedTuple):
    """How a moment is stored: made, read as float32, and written as arrays of `Moments`."""

    init: Callable[[Shape], Moments]
    read: Callable[[Moments], jax.Array]
    write: Callable[[jax.Array], dict[str, jax.Array]]


def whole(name: str) -> Kept:
    """In float32, of the parameter's shape."""
    same = lambda shape: zeros(**{name: (shape, tuple(range(len(shape))))})
    return Kept(same, lambda moments: moments.arrays[name], lambda x: {name: x})


def in_blocks(name: str, block: tuple[int, int], *, signed: bool) -> Kept:
    """In 8 bits: see `jtune.train.optimizers.blocks`."""
    return Kept(
        lambda shape: blocks.empty(name, shape, block, signed),
        lambda moments: blocks.read(moments, name, block, signed),
        lambda x: blocks.write(name, x, block, signed),
    )


def adam(
    beta1: float,
    beta2: float,
    epsilon: float,
    *,
    block: tuple[int, int] | None = None,
    raw_epsilon: bool = False,
) -> Rule:
    """`m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon)`.

    Args:
      block: of 8-bit moments, see `blocks.blocks`; None: float32.
      raw_epsilon: epsilon is added to the root of `v` before its bias is corrected, as transformers' own AdamW did,
        which GaLore, APOLLO and LLaMA-Factory's Muon are made of.
    """
    first, second = whole("mu"), whole("nu")
    if block is not None:
        first, second = in_blocks("mu", block, signed=True), in_blocks("nu", block, signed=False)

    def init(shape: Shape) -> Moments:
        return joined(first.init(shape), second.init(shape))

    def update(g: jax.Array, p: jax.Array, moments: Moments, count: jax.Array) -> tuple[jax.Array, Moments]:
        mu = beta1 * first.read(moments) + (1 - beta1) * g
        nu = beta2 * second.read(moments) + (1 - beta2) * g * g
        direction = _direction(mu, nu, beta1, beta2, epsilon, count, raw_epsilon)
        return direction, moments.replace(**first.write(mu), **second.write(nu))

    return Rule(init, update)


def _direction(mu, nu, beta1: float, beta2: float, epsilon: float, count: jax.Array, raw_epsilon: bool) -> jax.Array:
    bias1, root2 = unbiased(beta1, count), jnp.sqrt(unbiased(beta2, count))
    root = jnp.sqrt(nu) + epsilon * (1.0 if raw_epsilon else root2)
    return mu / root * (root2 / bias1)


def unbiased(beta: float, count: jax.Array) -> jax.Array:
    """`1 - beta^(count + 1)`, by what a moment that began at zero falls short. Not as a power of float32's 0.999."""
    return -jnp.expm1((count + 1).astype(jnp.float32) * math.log(beta)) if beta > 0 else jnp.float32(1)


def adam_mini(path: Path, stacked: int, head_dim: int, beta1: float, beta2: float, epsilon: float) -> Rule:
    """Adam with one second moment for each block of a parameter (Adam-mini, arXiv:2406.16793, version 1.1.1).

    A block is a head of queries or keys, a neuron (a row of torch's weight) of other projections, a token of
    embeddings and heads, and any other tensor as a whole; biases have Adam's.

    Args:
      stacked: leading dimensions that are stacks.
      head_dim: numbers of a head. (The package divides the hidden size by the number of heads instead, which is the
        same in most models.)
    """
    name = ".".join(keys(path))
    first = whole("mu")

    def cut(shape: Shape) -> tuple[Shape, tuple[int, ...], Shape, tuple[int | None, ...]]:
        """How the gradient is reshaped, over which of its axes the mean goes, and the second moment."""
        last = len(shape) - 1
        lead = tuple(range(stacked))
        if "bias" in name:
            return shape, (), shape, tuple(range(len(shape)))
        if any(word in name for word in ("q_proj", "k_proj")) and shape[last] % head_dim == 0:
            heads = (*shape[:last], shape[last] // head_dim, head_dim)
            return heads, (last - 1, last + 1), (*shape[: last - 1], heads[last]), (*lead, last)
        if last - stacked == 1 and any(word in name for word in ROWS):
            row = last - 1 if keys(path)[-1] == "embedding" else last  # torch's weights are [out, in], embeddings not
            over = last if row == last - 1 else last - 1
            return shape, (over,), (*shape[:stacked], shape[row]), (*lead, row)
        return shape, tuple(range(stacked, len(shape))), shape[:stacked], lead

    def init(shape: Shape) -> Moments:
        _, _, second, dims = cut(shape)
        return joined(first.init(shape), zeros(nu=(second, dims)))

    def update(g: jax.Array, p: jax.Array, moments: Moments, count: jax.Array) -> tuple[jax.Array, Moments]:
        seen, over, _, _ = cut(g.shape)
        mu = beta1 * first.read(moments) + (1 - beta1) * g
        square = jnp.mean(jnp.square(g.reshape(seen)), axis=over)
        nu = beta2 * moments.arrays["nu"] + (1 - beta2) * square
        spread = jnp.expand_dims(nu, over)
        direction = _direction(mu.reshape(seen), spread, beta1, beta2, epsilon, count, raw_epsilon=False)
        return direction.reshape(g.shape), moments.replace(mu=mu, nu=nu)

    return Rule(init, update)


# Words in the names of tensors whose rows are blocks of Adam-mini.
ROWS = ("embed", "lm_head", "output", "v_proj", "o_proj", "mlp", "linear", "feed_forward")


def lion(beta1: float, beta2: float, block: tuple[int, int] | None) -> Rule:
    """`sign(beta1 m + (1 - beta1) g)` (arXiv:2302.06675); `block` as of `adam`."""
    kept = whole("mu") if block is None else in_blocks("mu", block, signed=True)

    def update(g: jax.Array, p: jax.Array, moments: Moments, count: jax.Array) -> tuple[jax.Array, Moments]:
        mu = kept.read(moments)
        new = beta2 * mu + (1 - beta2) * g
        return jnp.sign(beta1 * mu + (1 - beta1) * g), moments.replace(**kept.write(new))

    return Rule(kept.init, update)


def adagrad(epsilon: float, lr_decay: float) -> Rule:
    """`g / (sqrt(sum of g^2) + epsilon)` as torch has it (optax adds epsilon inside the root), divided by
    `1 + lr_decay * updates`.
    """
    kept: Any = whole("nu")

    def update(g: jax.Array, p: jax.Array, moments: Moments, count: jax.Array) -> tuple[jax.Array, Moments]:
        nu = kept.read(moments) + g * g
        return g / (jnp.sqrt(nu) + epsilon) / (1 + lr_decay * count), moments.replace(nu=nu)

    return Rule(kept.init, update)
