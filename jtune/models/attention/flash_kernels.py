"""Flash attention within segments for GPUs (arXiv:2205.14135, 2307.08691): Pallas kernels that Triton compiles.

Segments are contiguous. So a query sees the keys from a first one up to itself, and the queries from a key up to a last
one see that key; a window only moves these bounds. Neither bound ever decreases along a row: a block of queries visits
the keys from the first key of its first query on, and blocks in which every query sees every key need no mask.

One program computes each sum over keys or over queries, in order, so the bits are the same every time. The alternative,
cuDNN's kernels for segments, needs the largest number of segments of a row at compile time, stores as much for each
segment as for a whole row, and gives different bits each time.

Shape suffixes: B rows, T tokens of queries, S tokens of keys, H query heads, K key/value heads, G = H/K queries of a
group, D head_dim; of one block: Q queries, N keys; M and N either way.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jtune.models.attention.reference import MASKED, RESIDUALS

LOG2_E = math.log2(math.e)  # the kernels compute weights as powers of two, as the hardware does

ROW_MULTIPLE = 128  # lengths of rows must be multiples of it


class Blocks(NamedTuple):
    """The block sizes of a kernel."""

    queries: int
    keys: int
    warps: int
    stages: int  # of the pipeline that prefetches blocks


class Plan(NamedTuple):
    """The blocks of all three kernels, for one head_dim."""

    forward: Blocks
    by_queries: Blocks  # the gradient of queries
    by_keys: Blocks  # the gradients of keys and values


def plan_of(head_dim: int) -> Plan:
    """The blocks for a head_dim, a power of two: the fastest of those tried on an H200, for segments of a few hundred
    and of thousands of tokens (scripts/bench/attention.py --sweep)."""
    if head_dim <= 64:
        return Plan(Blocks(128, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(128, 64, 4, 2))
    if head_dim <= 128:
        return Plan(Blocks(128, 64, 4, 2), Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2))
    return Plan(Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2))


class Options(NamedTuple):
    """Static options, the same for all heads."""

    scale: float
    softcap: float | None
    plan: Plan
    interpret: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def flash(q_BTHD, k_BSKD, v_BSKD, first_BT, last_BS, offset_1, options: Options):
    """Attention of queries to the keys that they see.

    Args:
      q, k, v: of one dtype; D a power of two, T and S multiples of ROW_MULTIPLE.
      first: int32 `[B, T]`, the first key that a query sees. It must not decrease along a row.
      last: int32 `[B, S]`, the last query that sees a key, numbered as keys are. It must not decrease along a row.
      offset: int32 `[1]`, the number of the first query.

    Returns:
      `[B, T, H, D]`, and the natural logarithm of the sum of weights, float32 `[B, H, T]`.
    """
    return _forward(q_BTHD, k_BSKD, v_BSKD, first_BT, last_BS, offset_1, options)[0]


def _forward(q_BTHD, k_BSKD, v_BSKD, first_BT, last_BS, offset_1, options: Options):
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    blocks = options.plan.forward
    queries, keys = _of_queries(blocks, D), _all_keys(S, D, H // K)
    out_BTHD, sums_BHT = pl.pallas_call(
        partial(_forward_kernel, options=options),
        grid=(T // blocks.queries, B, H),
        in_specs=[_OFFSET, _first_of_queries(blocks), queries, keys, keys],
        out_specs=[queries, _one_per_query(blocks)],
        out_shape=[
            jax.ShapeDtypeStruct(q_BTHD.shape, q_BTHD.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ],
        name="flash_forward",
        **_compiled(blocks, options),
    )(offset_1, first_BT, q_BTHD, k_BSKD, v_BSKD)
    out_BTHD, sums_BHT = (checkpoint_name(x, RESIDUALS) for x in (out_BTHD, sums_BHT))
    return (out_BTHD, sums_BHT), (q_BTHD, k_BSKD, v_BSKD, first_BT, last_BS, offset_1, out_BTHD, sums_BHT)


def _backward(options: Options, residuals, d_outs):
    d_out_BTHD, d_sums_BHT = d_outs
    q_BTHD, k_BSKD, v_BSKD, first_BT, last_BS, offset_1, out_BTHD, sums_BHT = residuals
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    G = H // K
    # Through the softmax: d score = weight * (d weight - mean of d weight), and this mean is d out . out. The sum has
    # the weights themselves as its derivative.
    means_BTH = jnp.sum(d_out_BTHD.astype(jnp.float32) * out_BTHD.astype(jnp.float32), axis=-1)
    means_BHT = means_BTH.transpose(0, 2, 1) - d_sums_BHT

    blocks = options.plan.by_queries
    queries, keys, one = _of_queries(blocks, D), _all_keys(S, D, G), _one_per_query(blocks)
    d_q_BTHD = pl.pallas_call(
        partial(_by_queries_kernel, options=options),
        grid=(T // blocks.queries, B, H),
        in_specs=[_OFFSET, _first_of_queries(blocks), queries, keys, keys, queries, one, one],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(q_BTHD.shape, q_BTHD.dtype),
        name="flash_by_queries",
        **_compiled(blocks, options),
    )(offset_1, first_BT, q_BTHD, k_BSKD, v_BSKD, d_out_BTHD, sums_BHT, means_BHT)

    blocks = options.plan.by_keys
    keys = pl.BlockSpec((None, blocks.keys, None, D), lambda n, b, k: (b, n, k, 0))
    group = pl.BlockSpec((None, T, None, G, D), lambda n, b, k: (b, 0, k, 0, 0))
    one = pl.BlockSpec((None, None, G, T), lambda n, b, k: (b, k, 0, 0))
    grouped = lambda x: x.reshape(B, T, K, G, D)
    d_k_BSKD, d_v_BSKD = pl.pallas_call(
        partial(_by_keys_kernel, options=options),
        grid=(S // blocks.keys, B, K),
        in_specs=[
            _OFFSET,
            pl.BlockSpec((None, blocks.keys), lambda n, b, k: (b, n)),
            group,
            keys,
            keys,
            group,
            one,
            one,
        ],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BSKD, v_BSKD)],
        name="flash_by_keys",
        **_compiled(blocks, options),
    )(
        offset_1,
        last_BS,
        grouped(q_BTHD),
        k_BSKD,
        v_BSKD,
        grouped(d_out_BTHD),
        sums_BHT.reshape(B, K, G, T),
        means_BHT.reshape(B, K, G, T),
    )
    return d_q_BTHD, d_k_BSKD, d_v_BSKD, None, None, None


flash.defvjp(_forward, _backward)


# ---------------------------------------------------------------------- the inputs of a program of the grid

_OFFSET = pl.BlockSpec((1,), lambda n, b, h: (0,))


def _of_queries(blocks: Blocks, D: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, blocks.queries, None, D), lambda n, b, h: (b, n, h, 0))


def _first_of_queries(blocks: Blocks) -> pl.BlockSpec:
    return pl.BlockSpec((None, blocks.queries), lambda n, b, h: (b, n))


def _one_per_query(blocks: Blocks) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, blocks.queries), lambda n, b, h: (b, h, n))


def _all_keys(S: int, D: int, G: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, S, None, D), lambda n, b, h: (b, 0, h // G, 0))


def _compiled(blocks: Blocks, options: Options) -> dict:
    params = triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)
    return {"compiler_params": params, "interpret": options.interpret}


# ---------------------------------------------------------------------- the kernels, of one block, row and head


def _forward_kernel(offset_ref, first_ref, q_ref, k_ref, v_ref, out_ref, sums_ref, *, options: Options):
    blocks = options.plan.forward
    q_QD, first_Q = q_ref[...], first_ref[...]
    begin = offset_ref[0] + pl.program_id(0) * blocks.queries
    query_Q = begin + jnp.arange(blocks.queries)

    def visit(masked: bool, n, carry):
        out_QD, largest_Q, total_Q = carry
        keys = pl.ds(n * blocks.keys, blocks.keys)
        scores_QN = _scores(q_QD, k_ref[keys, :], options)[0]
        if masked:
            key_N = n * blocks.keys + jnp.arange(blocks.keys)
            scores_QN = _masked(scores_QN, first_Q, key_N, query_Q)
        now_Q = jnp.maximum(largest_Q, jnp.max(scores_QN, axis=1))
        weights_QN = jnp.exp2(scores_QN - now_Q[:, None])
        shrink_Q = jnp.exp2(largest_Q - now_Q)
        v_ND = v_ref[keys, :]
        out_QD = out_QD * shrink_Q[:, None] + _dot(weights_QN.astype(v_ND.dtype), v_ND)
        return out_QD, now_Q, total_Q * shrink_Q + jnp.sum(weights_QN, axis=1)

    zeros_Q = jnp.zeros((blocks.queries,), jnp.float32)
    carry = jnp.zeros(q_QD.shape, jnp.float32), zeros_Q - jnp.inf, zeros_Q
    out_QD, largest_Q, total_Q = _over_keys(first_ref, begin, blocks, visit, carry)
    out_ref[...] = (out_QD / total_Q[:, None]).astype(out_ref.dtype)
    sums_ref[...] = (largest_Q + jnp.log2(total_Q)) / LOG2_E


def _by_queries_kernel(
    offset_ref, first_ref, q_ref, k_ref, v_ref, d_out_ref, sums_ref, means_ref, d_q_ref, *, options: Options
):
    blocks = options.plan.by_queries
    q_QD, first_Q, d_out_QD = q_ref[...], first_ref[...], d_out_ref[...]
    sums_Q, means_Q = sums_ref[...] * LOG2_E, means_ref[...]
    begin = offset_ref[0] + pl.program_id(0) * blocks.queries
    query_Q = begin + jnp.arange(blocks.queries)

    def visit(masked: bool, n, d_q_QD):
        keys = pl.ds(n * blocks.keys, blocks.keys)
        k_ND, v_ND = k_ref[keys, :], v_ref[keys, :]
        scores_QN, slope_QN = _scores(q_QD, k_ND, options)
        if masked:
            key_N = n * blocks.keys + jnp.arange(blocks.keys)
            scores_QN = _masked(scores_QN, first_Q, key_N, query_Q)
        weights_QN = jnp.exp2(scores_QN - sums_Q[:, None])
        d_scores_QN = weights_QN * (_dot(d_out_QD, v_ND.T) - means_Q[:, None]) * slope_QN
        return d_q_QD + _dot(d_scores_QN.astype(k_ND.dtype), k_ND)

    d_q_QD = _over_keys(first_ref, begin, blocks, visit, jnp.zeros(q_QD.shape, jnp.float32))
    d_q_ref[...] = (d_q_QD * options.scale).astype(d_q_ref.dtype)


def _by_keys_kernel(
    offset_ref, last_ref, q_ref, k_ref, v_ref, d_out_ref, sums_ref, means_ref, d_k_ref, d_v_ref, *, options: Options
):
    blocks = options.plan.by_keys
    T, G = q_ref.shape[:2]
    k_ND, v_ND, last_N = k_ref[...], v_ref[...], last_ref[...]
    begin = pl.program_id(0) * blocks.keys
    key_N = begin + jnp.arange(blocks.keys)

    def visit(g, masked: bool, n, carry):
        d_k_ND, d_v_ND = carry
        queries = pl.ds(n * blocks.queries, blocks.queries)
        q_QD, d_out_QD = q_ref[queries, g, :], d_out_ref[queries, g, :]
        scores_NQ, slope_NQ = _scores(k_ND, q_QD, options)
        if masked:
            query_Q = offset_ref[0] + n * blocks.queries + jnp.arange(blocks.queries)
            scores_NQ = _masked(scores_NQ, key_N, query_Q, last_N)
        weights_NQ = jnp.exp2(scores_NQ - sums_ref[g, queries][None, :] * LOG2_E)
        d_v_ND += _dot(weights_NQ.astype(d_out_QD.dtype), d_out_QD)
        d_scores_NQ = weights_NQ * (_dot(v_ND, d_out_QD.T) - means_ref[g, queries][None, :]) * slope_NQ
        return d_k_ND + _dot(d_scores_NQ.astype(q_QD.dtype), q_QD), d_v_ND

    def head(g, carry):
        return _over_queries(last_ref, begin, offset_ref[0], T, blocks, partial(visit, g), carry)

    zeros_ND = jnp.zeros(k_ND.shape, jnp.float32)
    d_k_ND, d_v_ND = jax.lax.fori_loop(0, G, head, (zeros_ND, zeros_ND))
    d_k_ref[...] = (d_k_ND * options.scale).astype(d_k_ref.dtype)
    d_v_ref[...] = d_v_ND.astype(d_v_ref.dtype)


def _scores(a, b, options: Options):
    """Scores of all pairs, in units of log 2, and the factor of their derivative (without the scale)."""
    products = _dot(a, b.T) * options.scale
    if options.softcap is None:
        return products * LOG2_E, 1.0
    capped = jnp.tanh(products / options.softcap)
    return capped * (options.softcap * LOG2_E), 1.0 - capped * capped


def _masked(scores_MN, low_M, number_N, high_M):
    """The scores with those masked whose second number is not between the low and the high bound of the first."""
    seen_MN = (number_N[None, :] >= low_M[:, None]) & (number_N[None, :] <= high_M[:, None])
    return jnp.where(seen_MN, scores_MN, MASKED)


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _over_keys(first_ref, begin, blocks: Blocks, visit, carry):
    """`visit(masked, n, carry)` for the blocks n of keys that a block of queries, from number `begin` on, can see:
    blocks with a mask, then blocks that every query sees whole, then blocks with a mask."""
    lowest, highest = first_ref[0], first_ref[blocks.queries - 1]
    low, high = _div(lowest, blocks.keys), _up(begin + blocks.queries, blocks.keys)
    return _in_three(low, _up(highest, blocks.keys), _div(begin + 1, blocks.keys), high, visit, carry)


def _over_queries(last_ref, begin, offset, T: int, blocks: Blocks, visit, carry):
    """The same for the blocks of queries, of T from number `offset` on, that can see a block of keys."""
    lowest, highest = last_ref[0], last_ref[blocks.keys - 1]
    low = _div(jnp.maximum(begin - offset, 0), blocks.queries)
    high = jnp.minimum(_up(jnp.maximum(highest + 1 - offset, 0), blocks.queries), T // blocks.queries)
    all_from = _up(jnp.maximum(begin + blocks.keys - 1 - offset, 0), blocks.queries)
    all_to = _div(jnp.maximum(lowest + 1 - offset, 0), blocks.queries)
    return _in_three(low, all_from, all_to, high, visit, carry)


def _in_three(low, all_from, all_to, high, visit, carry):
    all_from = jnp.minimum(jnp.maximum(all_from, low), jnp.maximum(high, low))
    all_to = jnp.minimum(jnp.maximum(all_to, all_from), jnp.maximum(high, low))
    carry = jax.lax.fori_loop(low, all_from, partial(visit, True), carry)
    carry = jax.lax.fori_loop(all_from, all_to, partial(visit, False), carry)
    return jax.lax.fori_loop(all_to, high, partial(visit, True), carry)


def _div(a, b: int):
    return jax.lax.div(a, jnp.int32(b))  # Python's `//` floors, with a branch for negative numbers; there are none


def _up(a, b: int):
    return _div(a + (b - 1), b)
