"""Attention in plain XLA, for one row and key head: the reference that every other kernel must equal.

Shape suffixes: T tokens of queries, S tokens of keys, G query heads of a group, D head_dim, M = G * T.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# The score of masked pairs. It is finite, so that a row of padding gives numbers and not NaN.
MASKED = -1e30

# Remat policies can keep the output and the residuals of a backend by this name.
RESIDUALS = "attention_residuals"


def alibi_bias(positions_BS: jax.Array, heads: int, multiplier: float, dtype: str) -> jax.Array:
    """The bias of alibi (arXiv:2108.12409, section 3) for the scores of a key, float32 `[batch, heads, seq]`.

    It is `slope * position of the key`; the softmax turns position into distance. The published models round it to
    `dtype` before they multiply it by `multiplier`, so it is rounded here as well.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    bias_BHS = jnp.asarray(slopes, dtype)[None, :, None] * jnp.maximum(positions_BS, 0)[:, None, :].astype(dtype)
    return bias_BHS.astype(jnp.float32) * multiplier


def at_once(q_GTD, k_SD, v_SD, segment_ids_S, scale, window, softcap, bias_GS=None):
    """The reference: `[G, T, D]`, and the logarithm of the sum of weights, `[G, T, 1]`."""
    G, T, D = q_GTD.shape
    scores_GTS = scores_of(q_GTD.reshape(-1, D), k_SD, scale, softcap).reshape(G, T, -1)
    if bias_GS is not None:
        scores_GTS += bias_GS[:, None, :]
    scores_GTS = jnp.where(visible(segment_ids_S, 0, T, 0, window), scores_GTS, MASKED)
    weights = jax.nn.softmax(scores_GTS, axis=-1).astype(v_SD.dtype)
    sums_GT1 = jax.nn.logsumexp(scores_GTS, axis=-1, keepdims=True)
    return checkpoint_name((weights.reshape(G * T, -1) @ v_SD).reshape(G, T, -1), RESIDUALS), sums_GT1


def scores_of(q_MD, k_ND, scale: float, softcap: float | None) -> jax.Array:
    scores_MN = dot(q_MD, k_ND.T) * scale
    return scores_MN if softcap is None else softcap * jnp.tanh(scores_MN / softcap)


def dot(a, b) -> jax.Array:
    """`a @ b` in float32, for any dtype of the inputs."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def visible(segment_ids_S, begin: int, end: int, first: int, window: int | None) -> jax.Array:
    """Whether the queries from `begin` to `end` see the keys from `first` to `end`, bool `[queries, keys]`.

    Segments must be contiguous, so that distance in the row is distance in the segment.
    """
    distance = jnp.arange(begin, end)[:, None] - jnp.arange(first, end)[None, :]
    near = distance >= 0
    if window is not None:
        near &= distance < window
    return (segment_ids_S[begin:end, None] == segment_ids_S[None, first:end]) & near
