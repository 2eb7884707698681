"""Attention in plain XLA, one block of queries at a time: memory linear in the row.

Shape suffixes: T tokens of queries, S tokens of keys, G query heads of a group, D head_dim; of one block: Q queries,
N keys, M = G * Q.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jtune.models.attention.reference import MASKED, RESIDUALS, dot, scores_of, visible


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def in_blocks(q_GTD, k_SD, v_SD, segment_ids_S, scale, window, softcap):
    """Attention of one block of queries at a time to the keys that it can see.

    These end with the last query, and begin with the window of the first. The backward pass recomputes the scores of a
    block from their log-sum-exp, as flash attention does (arXiv:2205.14135), so residuals are linear in the row.
    """
    return _in_blocks_forward(q_GTD, k_SD, v_SD, segment_ids_S, scale, window, softcap)[0]


def _in_blocks_forward(q_GTD, k_SD, v_SD, segment_ids_S, scale, window, softcap):
    G, T, D = q_GTD.shape
    outs, sums = [], []
    for begin, end, first in _cuts(T, window):
        scores_MN = scores_of(q_GTD[:, begin:end].reshape(-1, D), k_SD[first:end], scale, softcap)
        seen = visible(segment_ids_S, begin, end, first, window)
        scores_MN = jnp.where(seen, scores_MN.reshape(G, end - begin, -1), MASKED).reshape(scores_MN.shape)
        largest_M1 = jnp.max(scores_MN, axis=-1, keepdims=True)
        weights_MN = jnp.exp(scores_MN - largest_M1)
        total_M1 = jnp.sum(weights_MN, axis=-1, keepdims=True)
        out_MD = dot(weights_MN.astype(v_SD.dtype), v_SD[first:end]) / total_M1
        outs.append(out_MD.astype(q_GTD.dtype).reshape(G, end - begin, -1))
        sums.append((largest_M1 + jnp.log(total_M1)).reshape(G, -1, 1))
    out_GTD = checkpoint_name(jnp.concatenate(outs, axis=1), RESIDUALS)
    sums_GT1 = checkpoint_name(jnp.concatenate(sums, axis=1), RESIDUALS)
    return (out_GTD, sums_GT1), (q_GTD, k_SD, v_SD, segment_ids_S, out_GTD, sums_GT1)


def _in_blocks_backward(scale, window, softcap, residuals, d_outs):
    d_out_GTD, d_sums_GT1 = d_outs
    q_GTD, k_SD, v_SD, segment_ids_S, out_GTD, sums_GT1 = residuals
    G, T, D = q_GTD.shape
    # Through the softmax: d score = weight * (d weight - mean of d weight), and this mean is d out . out. The sum has
    # the weights themselves as its derivative.
    means_GT1 = jnp.sum(d_out_GTD.astype(jnp.float32) * out_GTD.astype(jnp.float32), axis=-1, keepdims=True)
    means_GT1 -= d_sums_GT1
    d_q, d_k_SD, d_v_SD = [], jnp.zeros(k_SD.shape, jnp.float32), jnp.zeros(v_SD.shape, jnp.float32)
    for begin, end, first in _cuts(T, window):
        queries = lambda x_GTX, b=begin, e=end: x_GTX[:, b:e].reshape(-1, x_GTX.shape[-1])
        q_MD, d_out_MD, k_ND, v_ND = queries(q_GTD), queries(d_out_GTD), k_SD[first:end], v_SD[first:end]
        scores_MN = scores_of(q_MD, k_ND, scale, softcap)
        seen = visible(segment_ids_S, begin, end, first, window)
        weights_MN = jnp.exp(scores_MN - queries(sums_GT1))
        weights_MN = jnp.where(seen, weights_MN.reshape(G, end - begin, -1), 0.0).reshape(scores_MN.shape)
        d_scores_MN = weights_MN * (dot(d_out_MD, v_ND.T) - queries(means_GT1)) * scale
        if softcap is not None:
            d_scores_MN *= 1.0 - jnp.square(scores_MN / softcap)
        d_scores_MN = d_scores_MN.astype(k_SD.dtype)
        d_q.append(dot(d_scores_MN, k_ND).astype(q_GTD.dtype).reshape(G, -1, D))
        d_k_SD = d_k_SD.at[first:end].add(dot(d_scores_MN.T, q_MD))
        d_v_SD = d_v_SD.at[first:end].add(dot(weights_MN.T.astype(v_SD.dtype), d_out_MD))
    return jnp.concatenate(d_q, axis=1), d_k_SD.astype(k_SD.dtype), d_v_SD.astype(v_SD.dtype), None


in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _cuts(T: int, window: int | None) -> list[tuple[int, int, int]]:
    """The blocks of a row: first and last query (exclusive), and the first key that any of them sees."""
    starts = range(0, T, block_size(T))
    return [(b, min(b + block_size(T), T), 0 if window is None else max(0, b - window + 1)) for b in starts]


def block_size(T: int) -> int:
    """Queries per block: an eighth of the row. Scores above the diagonal are skipped in steps of a block."""
    return max(128, -(-T // 8 // 64) * 64)
