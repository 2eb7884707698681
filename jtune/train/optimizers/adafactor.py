"""Adafactor of one parameter (arXiv:1804.04235), as `transformers.optimization.Adafactor` computes it for the Trainer:
no first moment, the learning rate given from outside.

optax.scale_by_factored_rms factors the two largest dimensions, which in a stack of small layers may be the wrong ones.
"""

import jax
import jax.numpy as jnp

from jtune.train.optimizers.leafwise import Moments, Rule, Shape, zeros

EPSILON = 1e-30  # added to squares
CLIP = 1.0  # of the root mean square of a tensor's direction
DECAY = 0.8  # the second moment forgets 1 - t^-0.8


def adafactor(stacked: int) -> Rule:
    """The direction is `g / sqrt(v)`, scaled down to a root mean square of 1; of matrices, `v` is made of the means of
    its rows and of its columns.

    Args:
      stacked: leading dimensions that are stacks.
    """
    factored = lambda shape: len(shape) - stacked >= 2

    def init(shape: Shape) -> Moments:
        dims = tuple(range(len(shape)))
        if not factored(shape):
            return zeros(nu=(shape, dims))
        without = lambda d: (tuple(shape[i] for i in dims if i != d), tuple(i for i in dims if i != d))
        return zeros(nu_row=without(dims[-1]), nu_column=without(dims[-2]))

    def update(g: jax.Array, p: jax.Array, moments: Moments, count: jax.Array) -> tuple[jax.Array, Moments]:
        decay = 1 - (count + 1).astype(jnp.float32) ** -DECAY
        square = g * g + EPSILON
        old = moments.arrays
        if factored(g.shape):
            row = decay * old["nu_row"] + (1 - decay) * jnp.mean(square, axis=-1)
            column = decay * old["nu_column"] + (1 - decay) * jnp.mean(square, axis=-2)
            relative = row / jnp.mean(row, axis=-1, keepdims=True)
            direction = g * jax.lax.rsqrt(relative)[..., None] * jax.lax.rsqrt(column)[..., None, :]
            moments = moments.replace(nu_row=row, nu_column=column)
        else:
            nu = decay * old["nu"] + (1 - decay) * square
            direction = g * jax.lax.rsqrt(nu)
            moments = moments.replace(nu=nu)
        own = tuple(range(stacked, g.ndim))  # all but the stacks
        rms = jnp.sqrt(jnp.mean(direction * direction, axis=own, keepdims=True))
        return direction / jnp.maximum(1.0, rms / CLIP), moments

    return Rule(init, update)
