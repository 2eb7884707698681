"""GaLore (arXiv:2403.03507) and APOLLO (arXiv:2412.05270): Adam's moments of a matrix in a subspace of low rank.

Kernels are `[in, out]`, torch's weights `[out, in]`: what the references call left is the last dimension here.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jtune.train.optimizers.adam import adam, unbiased
from jtune.train.optimizers.leafwise import Moments, Rule, Shape, joined, whole_matrices, zeros


def shrinks_input(shape: Shape, kind: str = "std") -> bool:
    """Whether the input dimension is projected (the references' "right") or the output dimension ("left").

    >>> shrinks_input((64, 256)), shrinks_input((64, 256), "reverse_std"), shrinks_input((256, 64))
    (True, False, False)
    """
    if kind in ("left", "right"):
        return kind == "right"
    return (shape[-1] >= shape[-2]) == (kind == "std")


def galore(
    inner: Callable[[Shape], Rule],
    *,
    stacked: int,
    rank: int,
    interval: int,
    scale: float,
    kind: str = "std",
    sharding: NamedSharding | None = None,
) -> Rule:
    """`inner` on the gradient projected on its own leading singular vectors, its direction projected back and scaled.

    The vectors are those of the gradient of every `interval`-th update. They are unique but for their signs, which
    moments of the updates before would see: here the largest number of each is positive, on whatever device.

    Args:
      inner: of the projected gradient's shape.
      stacked: leading dimensions that are stacks.
      kind: galore_proj_type; "full" is not built.
      sharding: of the parameter: see `whole_matrices`.
    """

    def small(shape: Shape) -> tuple[Shape, tuple[int | None, ...], Shape, tuple[int | None, ...]]:
        """The projected gradient's shape, and what it follows; the same of the projection."""
        *stack, inputs, outputs = shape
        dims = tuple(range(stacked))
        r = min(rank, inputs, outputs)
        if shrinks_input(shape, kind):
            return (*stack, r, outputs), (*dims, None, stacked + 1), (*stack, inputs, r), (*dims, stacked, None)
        return (*stack, inputs, r), (*dims, stacked, None), (*stack, outputs, r), (*dims, stacked + 1, None)

    def init(shape: Shape) -> Moments:
        low, dims, projection, along = small(shape)
        below = inner(low).init(low)
        follow = lambda x: tuple(None if d is None else dims[d] for d in x)
        moments = Moments(below.arrays, tuple((name, follow(x)) for name, x in below.follows))
        return joined(moments, zeros(projection=(projection, along)))

    def vectors(g: jax.Array) -> jax.Array:
        """`[in or out, rank]` of one matrix `[in, out]`."""
        u, _, vt = jnp.linalg.svd(g, full_matrices=False)
        found = u if shrinks_input(g.shape, kind) else vt.T
        found = found[:, : min(rank, *g.shape)]
        largest = jnp.take_along_axis(found, jnp.argmax(jnp.abs(found), axis=0)[None], axis=0)
        return found * jnp.where(largest < 0, -1.0, 1.0)

    def update(g: jax.Array, p: jax.Array, moments: Moments, count: jax.Array) -> tuple[jax.Array, Moments]:
        projection = jax.lax.cond(
            count % interval == 0,
            lambda: whole_matrices(vectors, g, stacked, sharding),
            lambda: moments.arrays["projection"],
        )
        transposed = jnp.swapaxes(projection, -1, -2)
        own = shrinks_input(g.shape, kind)
        low = transposed @ g if own else g @ projection
        direction, moments = inner(low.shape).update(low, p, moments, count)
        full = projection @ direction if own else direction @ transposed
        return full * scale, moments.replace(projection=projection)

    return Rule(init, update)


GROWTH = 1.01  # of the norm of a direction from one update to the next, at most


def apollo(
    key: jax.Array,
    *,
    stacked: int,
    rank: int,
    interval: int,
    scale: float,
    per_channel: bool,
    betas: tuple[float, float],
    epsilon: float,
) -> Rule:
    """The gradient, each of its channels (or all of it) scaled as Adam would scale it in a random subspace.

    The projection is drawn anew from `key` and the update's number whenever it is needed: nothing of it is kept.

    Args:
      key: of this parameter.
      stacked: leading dimensions that are stacks.
      per_channel: apollo_scale_type channel: a factor for each number of the larger dimension; else one for a matrix.
    """
    inner = adam(*betas, epsilon, raw_epsilon=True)

    def low_shape(shape: Shape) -> tuple[Shape, tuple[int | None, ...]]:
        *stack, inputs, outputs = shape
        dims = tuple(range(stacked))
        if shrinks_input(shape):
            return (*stack, rank, outputs), (*dims, None, stacked + 1)
        return (*stack, inputs, rank), (*dims, stacked, None)

    def init(shape: Shape) -> Moments:
        low = low_shape(shape)
        return zeros(mu=low, nu=low, norm=(shape[:stacked], tuple(range(stacked))))

    def update(g: jax.Array, p: jax.Array, moments: Moments, count: jax.Array) -> tuple[jax.Array, Moments]:
        own = shrinks_input(g.shape)
        *stack, inputs, outputs = g.shape
        drawn = jax.random.fold_in(key, count // interval)
        projection = jax.random.normal(drawn, (*stack, inputs if own else outputs, rank)) / math.sqrt(rank)
        low = jnp.swapaxes(projection, -1, -2) @ g if own else g @ projection
        whole, moments = inner.update(low, p, moments, count)
        # Bias corrections belong to the step, not to the scaling: norms of the limiter must not see them.
        step = jnp.sqrt(unbiased(betas[1], count)) / unbiased(betas[0], count)
        norm: Any = lambda x, axis: jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=True))
        over = ((-2 if own else -1),) if per_channel else (-2, -1)
        scaled = g * (norm(whole / step, over) / (norm(low, over) + 1e-8))
        length = norm(scaled, (-2, -1))
        before = moments.arrays["norm"][..., None, None]
        limit = jnp.maximum(length / (before + 1e-8), GROWTH) / GROWTH
        limit = jnp.where(count == 0, 1.0, limit)
        moments = moments.replace(norm=(length / limit)[..., 0, 0])
        return scaled / limit * (step * math.sqrt(scale)), moments

    return Rule(init, update)
