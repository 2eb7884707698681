"""The gated delta rule (arXiv:2412.06464), which some layers have instead of attention.

A head has a state, a matrix S from keys to values, and knows nothing else of the past. For each token, S decays; then
the rule moves the value that S gives for the token's key towards the token's value, by a share beta of the difference:

    S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T,    output: S_t^T q_t

Shape suffixes: B batch, T tokens, D embed, M channels of the convolution, S inputs of it, H value heads, K dimensions
of a key, V dimensions of a value; in the rule: N chunks, C tokens of a chunk.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jtune.models.cache import Entry, LayerCache, read_state, write_state
from jtune.models.config import DecoderConfig
from jtune.models.config import Delta as DeltaConfig
from jtune.models.convolution import Convolution, number_runs
from jtune.models.kernels import Linear, parameter
from jtune.models.mlp import ACTIVATIONS
from jtune.models.norm import Norm
from jtune.sharding import constrain

CHUNK = 64  # tokens whose corrections are computed together

# States sum over a whole row. By default, TPUs round float32 products to bfloat16.
_dot = partial(jnp.matmul, precision="high")


class GatedDelta(nn.Module):
    """Queries, keys and values through a short convolution, the gated delta rule, and a norm with a gate."""

    config: DecoderConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, segment_ids_BT: jax.Array, layer_cache: LayerCache | None = None
    ) -> tuple[jax.Array, Entry | None]:
        """The output of the rule, `[batch, seq, embed]`, and the cache with the new tokens."""
        c, d = self.config, delta_config(self.config)
        B, T, _ = x_BTD.shape
        qkv_BTM, z_BTHV, beta_BTH, a_BTH = self._project(x_BTD)

        cached = read_state(layer_cache, T)
        convolved, inputs_BSM = Convolution(d.taps, name="conv1d")(qkv_BTM, segment_ids_BT, cached.get("inputs"))
        convolved = ACTIVATIONS[c.hidden_act](convolved).astype(x_BTD.dtype)

        q, k, v = jnp.split(convolved, [d.key_heads * d.key_dim, 2 * d.key_heads * d.key_dim], axis=-1)
        heads = lambda x, n: jnp.repeat(x.reshape(B, T, n, -1), d.value_heads // n, axis=2)
        rate_H = jnp.exp(parameter(self, "A_log", log_uniform, (d.value_heads,), (None,)).astype(jnp.float32))
        bias_H = parameter(self, "dt_bias", nn.initializers.ones, (d.value_heads,), (None,)).astype(jnp.float32)
        log_decay_BTH = -rate_H * jax.nn.softplus(a_BTH.astype(jnp.float32) + bias_H)
        beta_BTH = jax.nn.sigmoid(beta_BTH.astype(jnp.float32))
        inputs = heads(q, d.key_heads), heads(k, d.key_heads), heads(v, d.value_heads), log_decay_BTH, beta_BTH
        out_BTHV, state = over_rows(*inputs, segment_ids_BT, cached.get("state"), self.mesh)
        normed = Norm("rms", c.norm_eps, name="norm")(out_BTHV) * jax.nn.silu(z_BTHV.astype(jnp.float32))
        y_BTD = Linear(c.hidden_size, ("heads", "embed"), name="out_proj")(normed.astype(x_BTD.dtype).reshape(B, T, -1))
        return y_BTD, write_state(layer_cache, {"inputs": inputs_BSM, "state": state})

    def _project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The input of the convolution, the gate of the norm, and for each head the inputs of beta and of the decay."""
        d = delta_config(self.config)
        B, T, _ = x_BTD.shape
        K, V = d.key_heads * d.key_dim, d.value_heads * d.value_dim
        linear = lambda n, axis, name: Linear(n, ("embed", axis), name=name)(x_BTD)
        if d.joined:  # kernels are ordered by key head
            per = d.value_heads // d.key_heads
            by_head = lambda x: x.reshape(B, T, d.key_heads, -1)
            ends = [d.key_dim, 2 * d.key_dim, 2 * d.key_dim + per * d.value_dim]
            *qkv, z = jnp.split(by_head(linear(2 * K + 2 * V, "heads", "in_proj_qkvz")), ends, axis=-1)
            qkv_BTM = jnp.concatenate([x.reshape(B, T, -1) for x in qkv], axis=-1)
            beta, a = jnp.split(by_head(linear(2 * d.value_heads, None, "in_proj_ba")), 2, axis=-1)
        else:
            qkv_BTM, z = linear(2 * K + V, "heads", "in_proj_qkv"), linear(V, "heads", "in_proj_z")
            beta, a = linear(d.value_heads, None, "in_proj_b"), linear(d.value_heads, None, "in_proj_a")
        return qkv_BTM, z.reshape(B, T, d.value_heads, -1), beta.reshape(B, T, -1), a.reshape(B, T, -1)


def over_rows(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay: jax.Array,
    beta_BTH: jax.Array,
    segment_ids_BT: jax.Array,
    state: jax.Array | None,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    """The rule for queries and keys normalised to length one, each segment from an empty state, on a mesh as well.

    Args:
      q, k, v: of the dtype of the output.
      log_decay: float32 `[B, T, H]`, or `[B, T, H, K]`: a decay for each channel of the keys.
      state: of a cache, from which one new token of each row continues.

    Returns:
      The output, `[B, T, H, V]`, and the state after the last token, float32 `[B, H, K, V]`.
    """
    T, run_BT, real_BT = q_BTHK.shape[1], number_runs(segment_ids_BT), segment_ids_BT > 0
    if state is not None:
        run_BT = run_BT * 0
    wide = lambda x: x.astype(jnp.float32)
    q, k = unit(wide(q_BTHK)) * q_BTHK.shape[-1] ** -0.5, unit(wide(k_BTHK))
    # Padding changes no state.
    log_decay, beta_BTH = (
        jnp.where(real_BT.reshape(*real_BT.shape, *(1,) * (x.ndim - 2)), x, 0.0) for x in (log_decay, beta_BTH)
    )
    # A state depends on all tokens of a row, so devices that split rows elsewhere split heads here. There are two
    # constraints each way, because XLA can do each of them with one all-to-all.
    split_rows = lambda x: constrain(x, mesh, "batch", "sequence", "heads", *(None,) * (x.ndim - 3))
    whole_rows = lambda x: constrain(x, mesh, "batch", None, "whole_row_heads", *(None,) * (x.ndim - 3))
    q, k, v, log_decay, beta = (whole_rows(split_rows(x)) for x in (q, k, wide(v_BTHV), log_decay, beta_BTH))
    out_BTHV, last = gated_delta_rule(q, k, v, log_decay, beta, run_BT, state, chunk=min(CHUNK, T))
    return split_rows(whole_rows(out_BTHV)).astype(q_BTHK.dtype), last


def gated_delta_rule(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay: jax.Array,
    beta_BTH: jax.Array,
    run_BT: jax.Array,
    state_BHKV: jax.Array | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """The rule over rows, chunk by chunk (arXiv:2412.06464, section 3.3; arXiv:2406.06484 for the chunks).

    Within a chunk, each token corrects the result of the tokens before it. This is a triangular system; its solution is
    what each token writes, apart from the term of the chunk's first state. Between chunks only the state is passed on.

    Args:
      q, k, v, log_decay, beta: float32. A token of beta 0 and log_decay 0 changes nothing.
      log_decay: `[B, T, H]`, or `[B, T, H, K]`: a decay for each channel of the keys, each row of a state (Kimi Delta
        Attention, arXiv:2510.26692).
      run: int32, never decreasing along a row: each run starts from an empty state.
      state: the state at the start of run 0; default: empty.
      chunk: tokens per chunk; the result does not depend on it.

    Returns:
      The output of each token, float32 `[B, T, H, V]`, and the state after the last one, float32 `[B, H, K, V]`.
    """
    B, T, H, K = q_BTHK.shape
    V, fill = v_BTHV.shape[-1], -T % chunk

    def cut(x, mode="constant"):
        """`[B, T, ...]` -> `[N, B, C, ...]`; the last chunk is padded with tokens that change nothing."""
        x = jnp.pad(x, ((0, 0), (0, fill), *((0, 0),) * (x.ndim - 2)), mode=mode)
        return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    by_head = lambda x_BTHX: jnp.moveaxis(cut(x_BTHX), 3, 2)
    q_NBHCK, k_NBHCK, v_NBHCV = by_head(q_BTHK), by_head(k_BTHK), by_head(v_BTHV)
    of_channels = log_decay.ndim == 4
    beta_NBHC1 = by_head(beta_BTH)[..., None]
    # X: K where each channel has its own decay, else 1.
    total_NBHCX = jnp.cumsum(by_head(log_decay if of_channels else log_decay[..., None]), axis=-2)
    run_NBC = cut(run_BT, "edge")
    before_NB1 = jnp.pad(run_NBC[:-1, :, -1:], ((1, 0), (0, 0), (0, 0)))  # the run of the token before the chunk

    # The decay until token i reads: of the write of token j, and of the state before the chunk.
    sees_NBCC = (run_NBC[..., :, None] == run_NBC[..., None, :]) & jnp.tri(chunk, dtype=bool)
    sees_NB1CC = sees_NBCC[:, :, None]
    left_NBHCX = jnp.where((run_NBC == before_NB1)[:, :, None, :, None], jnp.exp(total_NBHCX), 0)
    lasting_NBHCX = jnp.where(sees_NB1CC[..., -1, :, None], jnp.exp(total_NBHCX[..., -1:, :] - total_NBHCX), 0)

    transposed = lambda x: jnp.swapaxes(x, -1, -2)
    if of_channels:
        products = jax.checkpoint(decayed_products)
        with_keys = lambda x: jnp.where(sees_NB1CC, products(x, k_NBHCK, total_NBHCX), 0)
    else:
        differences = total_NBHCX - transposed(total_NBHCX)
        left_NBHCC = jnp.exp(jnp.where(sees_NB1CC, differences, -jnp.inf))
        with_keys = lambda x: _dot(x, transposed(k_NBHCK)) * left_NBHCC
    sides = jnp.concatenate([v_NBHCV * beta_NBHC1, k_NBHCK * beta_NBHC1 * left_NBHCX], axis=-1)
    solved = _dot(inverse(with_keys(k_NBHCK * beta_NBHC1)), sides)
    written_NBHCV, read_NBHCK = jnp.split(solved, [V], axis=-1)
    within_NBHCC = with_keys(q_NBHCK)

    def turn(state_BHKV, x):
        q_BHCK, within_BHCC, written_BHCV, read_BHCK, lasting_BHCK, left_BHX = x
        written_BHCV = written_BHCV - _dot(read_BHCK, state_BHKV)
        out_BHCV = _dot(q_BHCK, state_BHKV) + _dot(within_BHCC, written_BHCV)
        state_BHKV = state_BHKV * left_BHX[..., None] + _dot(transposed(lasting_BHCK), written_BHCV)
        return state_BHKV, out_BHCV

    if state_BHKV is None:
        state_BHKV = jnp.zeros((B, H, K, V), jnp.float32)
    lasting_NBHCK, left_NBHX = k_NBHCK * lasting_NBHCX, left_NBHCX[..., -1, :]
    chunks = q_NBHCK * left_NBHCX, within_NBHCC, written_NBHCV, read_NBHCK, lasting_NBHCK, left_NBHX
    # The backward pass keeps only the state before each chunk and recomputes the rest, which is smaller and quick to
    # compute.
    turn = jax.checkpoint(turn, prevent_cse=False)
    state_BHKV, out_NBHCV = jax.lax.scan(turn, state_BHKV, chunks)
    out_BTHV = out_NBHCV.transpose(1, 0, 3, 2, 4).reshape(B, T + fill, H, V)
    return out_BTHV[:, :T], state_BHKV


def decayed_products(a_XCK: jax.Array, b_XCK: jax.Array, total_XCK: jax.Array) -> jax.Array:
    """`sum_k a[i, k] b[j, k] exp(total[i, k] - total[j, k])` for j <= i, else 0: `[..., C, C]`.

    `total` never grows along C. Only a difference of two totals is small: `exp(-total[j])` alone overflows. So the two
    halves of the tokens meet in one product, each decayed to or from the token between them; then the halves of each
    half, and so on.
    """
    C, K = a_XCK.shape[-2:]
    size = 1 << (C - 1).bit_length()
    fill = lambda x, mode: jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, size - C), (0, 0)), mode=mode)
    # The blocks of a chunk are one axis: XLA's code for CPUs fails on arrays of eight axes.
    cut = lambda x: x.reshape(*a_XCK.shape[:-2], -1, 2, size // 2, K)
    a, b, total = fill(a_XCK, "constant"), fill(b_XCK, "constant"), fill(total_XCK, "edge")
    blocks = []
    while size > 1:
        (_, late), (early, _), (first, second) = ((cut(x)[..., 0, :, :], cut(x)[..., 1, :, :]) for x in (a, b, total))
        between = first[..., -1:, :]
        blocks.append(_dot(late * jnp.exp(second - between), jnp.swapaxes(early * jnp.exp(between - first), -1, -2)))
        size //= 2
    found = jnp.sum(a * b, axis=-1)[..., None, None]
    for block in reversed(blocks):
        halves = found.reshape(*block.shape[:-2], 2, *block.shape[-2:])
        above = jnp.concatenate([halves[..., 0, :, :], jnp.zeros_like(block)], axis=-1)
        found = jnp.concatenate([above, jnp.concatenate([block, halves[..., 1, :, :]], axis=-1)], axis=-2)
    return found.reshape(*a_XCK.shape[:-2], *found.shape[-2:])[..., :C, :C]


@jax.custom_vjp
def inverse(lower: jax.Array) -> jax.Array:
    """The inverse of a matrix `[..., n, n]` with ones on its diagonal; only the part below the diagonal is read.

    By blocks, [[A, 0], [B, C]] has the inverse [[A', 0], [-C' B A', C']], with blocks of one row, then two, then four.
    Products are fast everywhere, and split over devices. Triangular solves are neither; and on CPUs, two of them at the
    same time deadlock in the BLAS that jaxlib takes from scipy.
    """
    n = lower.shape[-1]
    found, size, block = jnp.broadcast_to(jnp.eye(n, dtype=lower.dtype), lower.shape), 1, jnp.arange(n)
    dot = partial(jnp.matmul, precision="highest")  # no later step corrects its rounding
    while size < n:
        between = (block[:, None] > block[None, :]) & (block[:, None] // 2 == block[None, :] // 2)
        found = found - dot(dot(found, jnp.where(between, lower, 0)), found)
        size, block = 2 * size, block // 2
    return found


def _inverse_forward(lower):
    found = inverse(lower)
    return found, found


def _inverse_backward(found, d_found):
    transposed = jnp.swapaxes(found, -1, -2)
    return (jnp.tril(-_dot(_dot(transposed, d_found), transposed), -1),)


inverse.defvjp(_inverse_forward, _inverse_backward)


def unit(x: jax.Array) -> jax.Array:
    """Vectors of the last axis, normalised to length one."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def delta_config(config: DecoderConfig) -> DeltaConfig:
    """`config.delta`, which must not be None."""
    assert config.delta is not None
    return config.delta


def log_uniform(key, shape, dtype):
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0))
