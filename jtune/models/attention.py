"""Attention within segments, through one function; the one file that knows which kernel computes it.

Shape suffixes: B batch, T tokens of queries, S tokens of keys, H query heads, K key/value heads, G = H/K queries of a
group, D head_dim; of one block: Q queries, N keys, M = G*Q.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jtune.sharding import constrain
from jtune.sharding.mesh import BATCH_AXES

# Scores of masked pairs. Finite, so that a row of padding gives numbers and not NaN.
MASKED = -1e30

BACKENDS = ("xla", "blocks", "splash")

# The name of what a backend keeps for its backward pass, for remat policies.
RESIDUALS = "attention_residuals"

# Scores that the CPU holds at a time, of as many heads as this allows: 2**25 float32 are 128 MiB.
MAPPED_SCORES = 2**25

LANES = 128  # what splash wants head_dim and row lengths to be multiples of


def choose(flash_attn: str, platform: str) -> tuple[str, str]:
    """(backend, why) for LLaMA-Factory's `flash_attn` on a platform ("cpu", "gpu", "tpu").

    >>> choose("auto", "tpu")[0], choose("auto", "cpu")[0], choose("disabled", "tpu")[0]
    ('splash', 'blocks', 'xla')
    """
    if flash_attn in ("disabled", "sdpa"):
        return "xla", f"flash_attn: {flash_attn}"
    if platform == "tpu":
        return "splash", "the fused TPU kernel: segments, windows and soft-caps inside, no scores in memory"
    return "blocks", "block by block of queries, so that scores of one block exist at a time"


def attend(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    segment_ids_BS: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "xla",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Causal attention that never crosses a segment.

    Args:
      q, k, v: of one dtype; grouped-query attention when there are fewer key heads.
      segment_ids: int32 `[batch, seq]`; tokens see tokens of their own segment, at or before their place in the row.
      window: a token sees itself and the `window - 1` tokens before it.
      softcap: scores become `softcap * tanh(scores / softcap)` (arXiv:2408.00118).
      backend: "xla", all scores at once: the reference; "blocks", "splash": see `choose`.
      mesh: where the arrays lie; rows over `batch`, tokens over `sequence`, heads over `heads` and `kv_heads`.

    Returns:
      `[batch, seq, heads, head_dim]` in the dtype of `q`. Softmax is in float32.
    """
    if backend == "splash":
        return _splash(q_BTHD, k_BSKD, v_BSKD, segment_ids_BS, scale, window, softcap, mesh)
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    # Queries stay where their tokens are; keys and values of the whole row come to them.
    k_BSKD, v_BSKD = (constrain(x, mesh, "batch", None, "kv_heads", None) for x in (k_BSKD, v_BSKD))
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    q_BKGTD = q_BTHD.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k_BKSD, v_BKSD = (x.transpose(0, 2, 1, 3) for x in (k_BSKD, v_BSKD))
    split = mesh is not None and mesh.shape["context"] > 1  # then rows are in parts already, one on each device
    compute: Callable = _at_once if backend == "xla" or split else _in_blocks
    one = lambda q, k, v, segment_ids: compute(q, k, v, segment_ids, scale, window, softcap)
    together = MAPPED_SCORES // max(1, H // K * _block(T) * T)
    if backend == "blocks" and (mesh is None or mesh.size == 1) and together < B * K and jax.default_backend() == "cpu":
        flat = lambda x: x.reshape(B * K, *x.shape[2:])
        parts = *map(flat, (q_BKGTD, k_BKSD, v_BKSD)), jnp.repeat(segment_ids_BS, K, axis=0)
        out = jax.lax.map(lambda part: one(*part), parts, batch_size=max(1, together))
    else:
        over_heads = jax.vmap(one, in_axes=(0, 0, 0, None))
        out = jax.vmap(over_heads)(q_BKGTD, k_BKSD, v_BKSD, segment_ids_BS)
    return out.reshape(B, K, H // K, T, D).transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


# ---------------------------------------------------------------------- plain XLA, of one row and key head; M = G * Q


def _at_once(q_GTD, k_SD, v_SD, segment_ids_S, scale, window, softcap) -> jax.Array:
    """The reference: what the others must equal."""
    G, T, D = q_GTD.shape
    scores_MS = _scores(q_GTD.reshape(-1, D), k_SD, scale, softcap)
    scores_GTS = jnp.where(_visible(segment_ids_S, 0, T, 0, window), scores_MS.reshape(G, T, -1), MASKED)
    weights = jax.nn.softmax(scores_GTS, axis=-1).astype(v_SD.dtype)
    return (weights.reshape(G * T, -1) @ v_SD).reshape(G, T, D)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _in_blocks(q_GTD, k_SD, v_SD, segment_ids_S, scale, window, softcap) -> jax.Array:
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
        outs.append(out_MD.astype(q_GTD.dtype).reshape(G, -1, D))
        sums.append((largest_M1 + jnp.log(total_M1)).reshape(G, -1, 1))
    out_GTD = checkpoint_name(jnp.concatenate(outs, axis=1), RESIDUALS)
    sums_GT1 = checkpoint_name(jnp.concatenate(sums, axis=1), RESIDUALS)
    return out_GTD, (q_GTD, k_SD, v_SD, segment_ids_S, out_GTD, sums_GT1)


def _in_blocks_backward(scale, window, softcap, residuals, d_out_GTD):
    q_GTD, k_SD, v_SD, segment_ids_S, out_GTD, sums_GT1 = residuals
    G, T, D = q_GTD.shape
    # Through the softmax: d score = weight * (d weight - mean of d weight), and this mean is d out . out.
    means_GT1 = jnp.sum(d_out_GTD.astype(jnp.float32) * out_GTD.astype(jnp.float32), axis=-1, keepdims=True)
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


# ---------------------------------------------------------------------- TPU: splash attention, which comes with jax


def _splash(q_BTHD, k_BSKD, v_BSKD, segment_ids_BS, scale, window, softcap, mesh: Mesh | None, interpret=False):
    """Splash attention over the mesh: each device has its rows, its heads and, with `context`, its queries.

    What does not divide (heads over `tensor`) is computed on each device. Rows are filled up to whole lanes with tokens
    of segment 0, heads with zeros, which change no score.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    _, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    axes = dict(mesh.shape) if mesh is not None else {}
    context = axes.get("context", 1)
    tensor = axes.get("tensor", 1)
    tensor = tensor if H % tensor == 0 and K % tensor == 0 else 1
    pad = -T % (LANES * context)
    fill = lambda x: jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, -D % LANES))).transpose(0, 2, 1, 3)
    # The kernel does not scale. In the precision of q, as its products are.
    q_BHTD, k_BKSD, v_BKSD = fill(q_BTHD * jnp.asarray(scale, q_BTHD.dtype)), fill(k_BSKD), fill(v_BSKD)
    segments = jnp.pad(segment_ids_BS, ((0, 0), (0, pad)))
    kernel = _splash_kernel(T + pad, H, tensor, context, window, softcap, interpret)

    def local(kernel, q, k, v, of_queries, of_keys):
        return jax.vmap(lambda q, k, v, a, b: kernel(q, k, v, SegmentIds(q=a, kv=b)))(q, k, v, of_queries, of_keys)

    if mesh is not None and mesh.size > 1:
        rows = tuple(axis for axis in BATCH_AXES if axes.get(axis, 1) > 1) or None
        heads, sequence = ("tensor" if tensor > 1 else None), ("context" if context > 1 else None)
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
    return out_BHTD.transpose(0, 2, 1, 3)[:, :T, :, :D].astype(q_BTHD.dtype)


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
