"""Muon of one matrix, as LLaMA-Factory has it from Moonlight (arXiv:2502.16982)."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jtune.train.optimizers.leafwise import Moments, Rule, Shape, whole_matrices, zeros

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7


def muon(stacked: int, sharding: NamedSharding | None, dtype: jnp.dtype) -> Rule:
    """Momentum, made nearly orthogonal, times `0.2 sqrt(max(in, out))`: a root mean square like AdamW's.

    Args:
      stacked: leading dimensions that are stacks; each matrix of them is made orthogonal on its own.
      sharding: of the parameter: see `whole_matrices`.
      dtype: of the products; the reference has bfloat16 always.
    """

    def init(shape: Shape) -> Moments:
        return zeros(mu=(shape, tuple(range(len(shape)))))

    def update(g: jax.Array, p: jax.Array, moments: Moments, count: jax.Array) -> tuple[jax.Array, Moments]:
        mu = MOMENTUM * moments.arrays["mu"] + g
        u = whole_matrices(orthogonalized, (g + MOMENTUM * mu).astype(dtype), stacked, sharding)
        return u.astype(jnp.float32) * (0.2 * math.sqrt(max(g.shape[-2:]))), moments.replace(mu=mu)

    return Rule(init, update)


def orthogonalized(x: jax.Array) -> jax.Array:
    """Five steps of a Newton-Schulz iteration on a matrix: its singular vectors, its singular values all near 1.

    optax has the same, but only behind a momentum of another kind.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonalized(x.T).T
    a, b, c = COEFFICIENTS
    x = x / (jnp.linalg.norm(x) + EPSILON)

    def step(_: int, x: jax.Array) -> jax.Array:
        gram = x @ x.T
        return a * x + (b * gram + c * gram @ gram) @ x

    return jax.lax.fori_loop(0, STEPS, step, x)
