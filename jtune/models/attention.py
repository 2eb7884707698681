"""Attention within segments, through one function; the one file that knows which kernel computes it.

Shape suffixes: B batch, T tokens of queries, S tokens of keys, H query heads, K key/value heads, G = H/K queries of a
group, D head_dim; of one block: Q queries, N keys, M = G*Q.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jtune.models.config import DecoderConfig
from jtune.sharding import constrain
from jtune.sharding.mesh import BATCH_AXES

# Scores of masked pairs. Finite, so that a row of padding gives numbers and not NaN.
MASKED = -1e30

BACKENDS = ("xla", "blocks", "splash", "flash")

# The name of what a backend gives and keeps for its backward pass, for remat policies.
RESIDUALS = "attention_residuals"

# Scores that the CPU holds at a time, of as many heads as this allows: 2**25 float32 are 128 MiB.
MAPPED_SCORES = 2**25

LANES = 128  # what splash wants head_dim and row lengths to be multiples of

WIDEST_FLASH_HEAD = 256


def choose(
    flash_attn: str,
    platform: str,
    config: DecoderConfig | None = None,
    dtype: Any = jnp.bfloat16,
    device: Any = None,
) -> tuple[str, str]:
    """(backend, why) for LLaMA-Factory's `flash_attn` on a platform ("cpu", "gpu", "tpu").

    A kernel that cannot do what the model of `config` needs is not chosen.

    Args:
      dtype: of activations.
      device: where the kernel for GPUs is tried out before it is chosen; None: it is taken to work.

    >>> choose("auto", "tpu")[0], choose("auto", "gpu")[0], choose("auto", "cpu")[0], choose("disabled", "tpu")[0]
    ('splash', 'flash', 'blocks', 'xla')
    """
    if flash_attn in ("disabled", "sdpa"):
        return "xla", f"flash_attn: {flash_attn}"
    if config is not None and config.alibi is not None:
        return "xla", "all scores at once, since the others add no biases (alibi) to them"
    if platform == "tpu" and config is not None and config.sinks:
        return "blocks", "block by block of queries, since the TPU kernel has no attention sinks"
    if platform == "tpu":
        return "splash", "the fused TPU kernel: segments, windows and soft-caps inside, no scores in memory"
    why = "block by block of queries, so that scores of one block exist at a time"
    if platform == "gpu":
        head_dim = 128 if config is None else max(config.qk_dim, config.value_dim)
        obstacle = _flash_obstacle(jnp.dtype(dtype), head_dim, config and config.attention_softcap, device)
        if obstacle is None:
            return "flash", "a fused GPU kernel: segments, windows, soft-caps and sinks inside, no scores in memory"
        why += f"; not the GPU kernel: {obstacle}"
    return "blocks", why


def attend(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    segment_ids_BS: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: jax.Array | None = None,
    bias_BHS: jax.Array | None = None,
    backend: str = "xla",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Causal attention that never crosses a segment.

    Args:
      q, k, v: of one dtype; grouped-query attention when there are fewer key heads.
      segment_ids: int32 `[batch, seq]`; tokens see tokens of their own segment, at or before their place in the row.
      window: a token sees itself and the `window - 1` tokens before it.
      softcap: scores become `softcap * tanh(scores / softcap)` (arXiv:2408.00118).
      sinks: a score of each head that competes with those of the keys, and gives nothing.
      bias: float32, added to the scores of a key. Only "xla" has it.
      backend: "xla", all scores at once: the reference; "blocks", "splash", "flash": see `choose`.
      mesh: where the arrays lie; rows over `batch`, tokens over `sequence`, heads over `heads` and `kv_heads`.

    Returns:
      `[batch, seq, heads, head_dim of v]` in the dtype of `q`. Softmax is in float32.
    """
    if (backend == "splash" and sinks_H is not None) or (backend != "xla" and bias_BHS is not None):
        raise ValueError(f"attention backend {backend!r} has no {'sinks' if bias_BHS is None else 'biases'}")
    if backend == "splash":
        return _splash(q_BTHD, k_BSKD, v_BSKD, segment_ids_BS, scale, window, softcap, mesh)
    if backend == "flash":
        out_BTHV, sums_BTH = _flash(q_BTHD, k_BSKD, v_BSKD, segment_ids_BS, scale, window, softcap, mesh)
        return _with_sinks(out_BTHV, sums_BTH, sinks_H)
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    # Queries stay where their tokens are; keys and values of the whole row come to them.
    k_BSKD, v_BSKD = (constrain(x, mesh, "batch", None, "kv_heads", None) for x in (k_BSKD, v_BSKD))
    B, T, H, D = q_BTHD.shape
    K, V = k_BSKD.shape[2], v_BSKD.shape[3]
    q_BKGTD = q_BTHD.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k_BKSD, v_BKSD = (x.transpose(0, 2, 1, 3) for x in (k_BSKD, v_BSKD))
    split = mesh is not None and mesh.shape["context"] > 1  # then rows are in parts already, one on each device
    compute: Callable = _at_once if backend == "xla" or split else _in_blocks
    one: Callable = lambda q, k, v, segment_ids: compute(q, k, v, segment_ids, scale, window, softcap)
    together = MAPPED_SCORES // max(1, H // K * _block(T) * T)
    if backend == "blocks" and (mesh is None or mesh.size == 1) and together < B * K and jax.default_backend() == "cpu":
        flat = lambda x: x.reshape(B * K, *x.shape[2:])
        parts = *map(flat, (q_BKGTD, k_BKSD, v_BKSD)), jnp.repeat(segment_ids_BS, K, axis=0)
        out, sums = jax.lax.map(lambda part: one(*part), parts, batch_size=max(1, together))
        sums = sums.reshape(B, K, *sums.shape[1:])
    elif bias_BHS is not None:
        one = lambda q, k, v, segment_ids, bias: _at_once(q, k, v, segment_ids, scale, window, softcap, bias)
        over_heads = jax.vmap(one, in_axes=(0, 0, 0, None, 0))
        bias_BKGS = bias_BHS.reshape(B, K, H // K, -1)
        out, sums = jax.vmap(over_heads)(q_BKGTD, k_BKSD, v_BKSD, segment_ids_BS, bias_BKGS)
    else:
        over_heads = jax.vmap(one, in_axes=(0, 0, 0, None))
        out, sums = jax.vmap(over_heads)(q_BKGTD, k_BKSD, v_BKSD, segment_ids_BS)
    out_BTHV = out.reshape(B, H, T, V).transpose(0, 2, 1, 3)
    return _with_sinks(out_BTHV, sums.reshape(B, H, T).transpose(0, 2, 1), sinks_H)


def _with_sinks(out_BTHV: jax.Array, sums_BTH: jax.Array, sinks_H: jax.Array | None) -> jax.Array:
    """What a sink leaves: it follows from how large all other weights are together, the logarithm of their sum."""
    if sinks_H is None:
        return out_BTHV
    others_BTH = jax.nn.sigmoid(sums_BTH - sinks_H.astype(jnp.float32))
    return (out_BTHV * others_BTH[..., None]).astype(out_BTHV.dtype)


def attend_cached(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: jax.Array | None = None,
    bias_BHS: jax.Array | None = None,
) -> jax.Array:
    """`attend` of new tokens to what a cache holds: `[batch, T, heads, head_dim of v]`.

    Args:
      positions: of the new tokens in their sequence.
      key_positions: of what is in the slots of the cache; negative: nothing.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    q_BTKGD = q_BTHD.reshape(B, T, K, H // K, D)
    scores = jnp.einsum("BTKGD,BSKD->BKGTS", q_BTKGD, k_BSKD, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias_BHS is not None:
        scores += bias_BHS.reshape(B, K, H // K, 1, -1)
    distance_BTS = positions_BT[:, :, None] - key_positions_BS[:, None, :]
    seen_BTS = (key_positions_BS[:, None, :] >= 0) & (distance_BTS >= 0)
    if window is not None:
        seen_BTS &= distance_BTS < window
    scores = jnp.where(seen_BTS[:, None, None], scores, MASKED)
    if sinks_H is not None:
        sinks = jnp.broadcast_to(sinks_H.astype(jnp.float32).reshape(1, K, H // K, 1, 1), (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sinks], -1), axis=-1)[..., :-1]
    else:
        weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("BKGTS,BSKV->BTKGV", weights.astype(v_BSKD.dtype), v_BSKD)
    return out.reshape(B, T, H, -1).astype(q_BTHD.dtype)


def alibi_bias(positions_BS: jax.Array, heads: int, multiplier: float, dtype: str) -> jax.Array:
    """What alibi (arXiv:2108.12409, section 3) adds to the scores of a key, float32 `[batch, heads, seq]`.

    It is `slope * position of the key`; the softmax makes it one of distance. The published models round it to `dtype`,
    before they multiply it by `multiplier`: that is part of what they are.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    bias_BHS = jnp.asarray(slopes, dtype)[None, :, None] * jnp.maximum(positions_BS, 0)[:, None, :].astype(dtype)
    return bias_BHS.astype(jnp.float32) * multiplier


# ---------------------------------------------------------------------- plain XLA, of one row and key head; M = G * Q


def _at_once(q_GTD, k_SD, v_SD, segment_ids_S, scale, window, softcap, bias_GS=None):
    """The reference: what the others must equal. `[G, T, D]` and the logarithm of the sum of weights, `[G, T, 1]`."""
    G, T, D = q_GTD.shape
    scores_GTS = _scores(q_GTD.reshape(-1, D), k_SD, scale, softcap).reshape(G, T, -1)
    if bias_GS is not None:
        scores_GTS += bias_GS[:, None, :]
    scores_GTS = jnp.where(_visible(segment_ids_S, 0, T, 0, window), scores_GTS, MASKED)
    weights = jax.nn.softmax(scores_GTS, axis=-1).astype(v_SD.dtype)
    sums_GT1 = jax.nn.logsumexp(scores_GTS, axis=-1, keepdims=True)
    return checkpoint_name((weights.reshape(G * T, -1) @ v_SD).reshape(G, T, -1), RESIDUALS), sums_GT1


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _in_blocks(q_GTD, k_SD, v_SD, segment_ids_S, scale, window, softcap):
    """A block of queries at a time, with the keys that it can see: none after its last query, nor any out of the window
    of its first. The backward pass forms the scores of a block again from their log-sum-exp, as flash attention does
    (arXiv:2205.14135): what is kept is linear in the row.
    """
    return _in_blocks_forward(q_GTD, k_SD, v_SD, segment_ids_S, scale, window, softcap)[0]


def _in_blocks_forward(q_GTD, k_SD, v_SD, segment_ids_S, scale, window, softcap):
    G, T, D = q_GTD.shape
    outs, sums = [], []
    for begin, end, first in _cuts(T, window):
        scores_MN = _scores(q_GTD[:, begin:end].reshape(-1, D), k_SD[first:end], scale, softcap)
        seen = _visible(segment_ids_S, begin, end, first, window)
        scores_MN = jnp.where(seen, scores_MN.reshape(G, end - begin, -1), MASKED).reshape(scores_MN.shape)
        largest_M1 = jnp.max(scores_MN, axis=-1, keepdims=True)
        weights_MN = jnp.exp(scores_MN - largest_M1)
        total_M1 = jnp.sum(weights_MN, axis=-1, keepdims=True)
        out_MD = _dot(weights_MN.astype(v_SD.dtype), v_SD[first:end]) / total_M1
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
        scores_MN = _scores(q_MD, k_ND, scale, softcap)
        seen = _visible(segment_ids_S, begin, end, first, window)
        weights_MN = jnp.exp(scores_MN - queries(sums_GT1))
        weights_MN = jnp.where(seen, weights_MN.reshape(G, end - begin, -1), 0.0).reshape(scores_MN.shape)
        d_scores_MN = weights_MN * (_dot(d_out_MD, v_ND.T) - queries(means_GT1)) * scale
        if softcap is not None:
            d_scores_MN *= 1.0 - jnp.square(scores_MN / softcap)
        d_scores_MN = d_scores_MN.astype(k_SD.dtype)
        d_q.append(_dot(d_scores_MN, k_ND).astype(q_GTD.dtype).reshape(G, -1, D))
        d_k_SD = d_k_SD.at[first:end].add(_dot(d_scores_MN.T, q_MD))
        d_v_SD = d_v_SD.at[first:end].add(_dot(weights_MN.T.astype(v_SD.dtype), d_out_MD))
    return jnp.concatenate(d_q, axis=1), d_k_SD.astype(k_SD.dtype), d_v_SD.astype(v_SD.dtype), None


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _scores(q_MD, k_ND, scale: float, softcap: float | None) -> jax.Array:
    scores_MN = _dot(q_MD, k_ND.T) * scale
    return scores_MN if softcap is None else softcap * jnp.tanh(scores_MN / softcap)


def _dot(a, b) -> jax.Array:
    """`a @ b`, float32 whatever they are in."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _visible(segment_ids_S, begin: int, end: int, first: int, window: int | None) -> jax.Array:
    """Which keys from `first` to `end` the queries from `begin` to `end` see, bool `[queries, keys]`. Segments are
    contiguous, so distance in the row is distance in the segment."""
    distance = jnp.arange(begin, end)[:, None] - jnp.arange(first, end)[None, :]
    near = distance >= 0
    if window is not None:
        near &= distance < window
    return (segment_ids_S[begin:end, None] == segment_ids_S[None, first:end]) & near


def _cuts(T: int, window: int | None) -> list[tuple[int, int, int]]:
    """The blocks of a row: first and last query (exclusive), and the first key that any of them sees."""
    starts = range(0, T, _block(T))
    return [(b, min(b + _block(T), T), 0 if window is None else max(0, b - window + 1)) for b in starts]


def _block(T: int) -> int:
    """Queries of a block: an eighth of the row, since what lies above the diagonal is saved in steps of a block."""
    return max(128, -(-T // 8 // 64) * 64)


# ---------------------------------------------------------------------- kernels over a mesh


class Parts(NamedTuple):
    """How a mesh cuts attention up."""

    axes: tuple[tuple[str, ...] | None, str | None, str | None]  # that rows, heads, and queries of a row lie over
    tensor: int
    context: int


def _parts(mesh: Mesh | None, q_BTHD: jax.Array, k_BSKD: jax.Array) -> Parts:
    """What does not divide is computed on each device."""
    sizes = dict(mesh.shape) if mesh is not None else {}
    rows = tuple(axis for axis in BATCH_AXES if sizes.get(axis, 1) > 1)
    if q_BTHD.shape[0] % math.prod(sizes[axis] for axis in rows):
        rows = ()
    tensor, context = sizes.get("tensor", 1), sizes.get("context", 1)
    tensor = tensor if q_BTHD.shape[2] % tensor == 0 and k_BSKD.shape[2] % tensor == 0 else 1
    axes = rows or None, "tensor" if tensor > 1 else None, "context" if context > 1 else None
    return Parts(axes, tensor, context)


# ---------------------------------------------------------------------- GPU: flash.py


def _flash(q_BTHD, k_BSKD, v_BSKD, segment_ids_BS, scale, window, softcap, mesh: Mesh | None, interpret=False):
    """Flash attention over the mesh, as splash: `[B, T, H, V]`, and logarithms of the sums of weights, `[B, T, H]`.

    Rows are filled up to whole blocks with tokens of segment 0, heads to a power of two with zeros.
    """
    from jtune.models.flash import ROW_MULTIPLE, Options, flash, plan_of  # Pallas takes a moment to import

    T, V = q_BTHD.shape[1], v_BSKD.shape[3]
    width = _power_of_two(max(q_BTHD.shape[3], V))
    parts = _parts(mesh, q_BTHD, k_BSKD)
    pad = -T % (ROW_MULTIPLE * parts.context)
    fill = lambda x: jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, width - x.shape[3])))
    first_BT, last_BS = _bounds(jnp.pad(segment_ids_BS, ((0, 0), (0, pad))), window)
    offsets = jnp.arange(parts.context, dtype=jnp.int32) * ((T + pad) // parts.context)
    options = Options(scale, softcap, plan_of(width), interpret)
    local: Callable = lambda *args: flash(*args, options)
    if mesh is not None and mesh.size > 1:
        rows, heads, sequence = parts.axes
        keys = P(rows, None, heads)
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(rows, sequence, heads), keys, keys, P(rows, sequence), P(rows), P(sequence)),
            out_specs=(P(rows, sequence, heads), P(rows, heads, sequence)),
            check_vma=False,
        )
    out_BTHD, sums_BHT = local(fill(q_BTHD), fill(k_BSKD), fill(v_BSKD), first_BT, last_BS, offsets)
    return out_BTHD[:, :T, :, :V], sums_BHT.transpose(0, 2, 1)[:, :T]


def _bounds(segment_ids_BS: jax.Array, window: int | None) -> tuple[jax.Array, jax.Array]:
    """The first key that each query sees, and the last query that sees each key: int32 `[B, S]`. Segments are
    contiguous."""
    at_S = jnp.arange(segment_ids_BS.shape[1], dtype=jnp.int32)
    changes = segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]
    begins, ends = (jnp.pad(changes, ((0, 0), side), constant_values=True) for side in ((1, 0), (0, 1)))
    first_BS = jax.lax.cummax(jnp.where(begins, at_S, 0), axis=1)
    last_BS = jax.lax.cummin(jnp.where(ends, at_S, at_S.size), axis=1, reverse=True)
    if window is not None:
        first_BS, last_BS = jnp.maximum(first_BS, at_S - window + 1), jnp.minimum(last_BS, at_S + window - 1)
    return first_BS, last_BS


def _power_of_two(n: int) -> int:
    """The next one, and at least what a product of blocks takes."""
    return max(16, 1 << (n - 1).bit_length())


def _flash_obstacle(dtype: jnp.dtype, head_dim: int, softcap: float | None, device: Any) -> str | None:
    """Why the GPU kernel is not to be chosen, or None."""
    if dtype.itemsize != 2:
        return f"it computes in 16 bits, activations are {dtype.name} (bf16: true changes that)"
    if head_dim > WIDEST_FLASH_HEAD:
        return f"heads of {head_dim} dimensions do not fit into it, {WIDEST_FLASH_HEAD} is the most"
    return None if device is None else _tried(device, dtype, _power_of_two(head_dim), softcap)


@lru_cache
def _tried(device: Any, dtype: jnp.dtype, head_dim: int, softcap: float | None) -> str | None:
    """What goes wrong when the kernels run on a device, or None: they must compile for it (which takes seconds), and
    give what plain attention gives. No run starts on a kernel that is wrong there."""
    q, k, v = (
        jax.random.normal(jax.random.key(i), (1, 512, heads, head_dim), dtype) for i, heads in enumerate((2, 1, 1))
    )
    segment_ids = jnp.asarray(np.repeat(np.arange(1, 4), (100, 30, 382))[None], jnp.int32)
    options = {"scale": head_dim**-0.5, "softcap": softcap}

    def found(backend: str, q, k, v):
        out = lambda q, k, v: attend(q, k, v, segment_ids, backend=backend, **options).astype(jnp.float32)
        return jax.jit(jax.grad(lambda q, k, v: jnp.sum(out(q, k, v) ** 2), argnums=(0, 1, 2)))(q, k, v)

    with jax.default_device(device):
        try:
            ours = found("flash", q, k, v)
        except Exception as error:  # whatever a compiler or driver raises
            return f"it does not work on {device.device_kind} ({type(error).__name__}: {str(error)[:200]})"
        exact = found("xla", *(x.astype(jnp.float32) for x in (q, k, v)))
    off = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(ours, exact))
    return None if off < 0.02 else f"its gradients are off by {off:.1%} on {device.device_kind}"


# ---------------------------------------------------------------------- TPU: splash attention, which comes with jax


def _splash(q_BTHD, k_BSKD, v_BSKD, segment_ids_BS, scale, window, softcap, mesh: Mesh | None, interpret=False):
    """Splash attention over the mesh: each device has its rows, its heads and, with `context`, its queries.

    What does not divide (heads over `tensor`) is computed on each device. Rows are filled up to whole lanes with tokens
    of segment 0, heads with zeros, which change no score.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    _, T, H, D = q_BTHD.shape
    V = v_BSKD.shape[3]
    width = max(D, V) + -max(D, V) % LANES
    parts = _parts(mesh, q_BTHD, k_BSKD)
    pad = -T % (LANES * parts.context)
    fill = lambda x: jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, width - x.shape[3]))).transpose(0, 2, 1, 3)
    # The kernel does not scale. In the precision of q, as its products are.
    q_BHTD, k_BKSD, v_BKSD = fill(q_BTHD * jnp.asarray(scale, q_BTHD.dtype)), fill(k_BSKD), fill(v_BSKD)
    segments = jnp.pad(segment_ids_BS, ((0, 0), (0, pad)))
    kernel = _splash_kernel(T + pad, H, parts.tensor, parts.context, window, softcap, interpret)

    def local(kernel, q, k, v, of_queries, of_keys):
        return jax.vmap(lambda q, k, v, a, b: kernel(q, k, v, SegmentIds(q=a, kv=b)))(q, k, v, of_queries, of_keys)

    if mesh is not None and mesh.size > 1:
        rows, heads, sequence = parts.axes
        kept = jax.sharding.NamedSharding(mesh, P(heads, sequence))
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(
                kernel.manual_sharding_spec(kept),
                P(rows, heads, sequence),
                P(rows, heads),
                P(rows, heads),
                P(rows, sequence),
                P(rows),
            ),
            out_specs=P(rows, heads, sequence),
            check_vma=False,
        )
    out_BHTD = local(kernel, q_BHTD, k_BKSD, v_BKSD, segments, segments)
    return out_BHTD.transpose(0, 2, 1, 3)[:, :T, :, :V].astype(q_BTHD.dtype)


@lru_cache
def _splash_kernel(T, heads, head_shards, q_seq_shards, window, softcap, interpret) -> Callable:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    one = splash.CausalMask((T, T)) if window is None else splash.LocalMask((T, T), (window - 1, 0), 0)
    of_queries = next(b for b in (1024, 512, 256, 128) if T // q_seq_shards % b == 0)
    of_keys = next(b for b in (1024, 512, 256, 128) if T % b == 0)
    blocks = splash.BlockSizes(
        block_q=of_queries,
        block_kv=of_keys,
        block_kv_compute=of_keys,
        block_q_dkv=of_queries,
        block_kv_dkv=of_keys,
        block_kv_dkv_compute=of_keys,
        use_fused_bwd_kernel=True,
    )
    with jax.ensure_compile_time_eval():  # its tables are constants, also when first made while tracing
        return splash.make_splash_mha(
            splash.MultiHeadMask([one] * heads),
            block_sizes=blocks,
            head_shards=head_shards,
            q_seq_shards=q_seq_shards,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name=RESIDUALS,
            interpret=interpret,
        )
