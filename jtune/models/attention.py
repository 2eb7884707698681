"""Attention within segments, through one function; the one file that knows which kernel computes it.

Shape suffixes: B batch, T tokens of queries, S tokens of keys, H query heads, K key/value heads, G = H/K queries of a
group, D head_dim.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jtune.sharding import constrain
from jtune.sharding.mesh import BATCH_AXES

# Scores of masked pairs. Finite, so that a row of padding gives numbers and not NaN.
MASKED = -1e30

BACKENDS = ("xla", "blocks", "splash")

# The name under which splash keeps its softmax statistics, for remat policies.
SPLASH_RESIDUALS = "splash_residuals"

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
    split = mesh is not None and mesh.shape["context"] > 1  # then rows are in parts already, one on each device
    block = _block(T) if backend == "blocks" and not split else T
    q_BKGTD = q_BTHD.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k_BKSD, v_BKSD = (x.transpose(0, 2, 1, 3) for x in (k_BSKD, v_BSKD))
    one = partial(_row, scale=scale, window=window, softcap=softcap, block=block)
    if backend == "blocks" and (mesh is None or mesh.size == 1) and jax.default_backend() == "cpu":
        # A core works on one head at a time: its scores stay in the cache, and products of two matrices run several
        # times as fast on CPUs as products of two batches of them.
        flat = lambda x: x.reshape(B * K, *x.shape[2:])
        out = jax.lax.map(
            lambda xs: one(*xs), (*map(flat, (q_BKGTD, k_BKSD, v_BKSD)), jnp.repeat(segment_ids_BS, K, axis=0))
        )
    else:
        over_heads = jax.vmap(one, in_axes=(0, 0, 0, None))
        out = jax.vmap(over_heads)(q_BKGTD, k_BKSD, v_BKSD, segment_ids_BS)
    return out.reshape(B, K, H // K, T, D).transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


# ---------------------------------------------------------------------- plain XLA, at once or in blocks of queries


def _visible(of_queries, of_keys, queries, keys, window: int | None) -> jax.Array:
    """bool `[queries, keys]`. Segments are contiguous, so distance in the row is distance in the segment."""
    distance = queries[:, None] - keys[None, :]
    near = distance >= 0
    if window is not None:
        near &= distance < window
    return (of_queries[:, None] == of_keys[None, :]) & near


def _block(T: int) -> int:
    """Queries of a block: an eighth of the row, since what lies above the diagonal is saved in steps of a block."""
    return max(128, -(-T // 8 // 64) * 64)


def _row(q_GTD, k_SD, v_SD, segment_ids_S, *, scale, window, softcap, block: int) -> jax.Array:
    """Attention of the queries of one row and key head. A block sees no key after its last query, nor any that is out
    of the window of its first. The backward pass forms its scores again: what is kept is linear in the row."""
    G, T, D = q_GTD.shape

    def attend_block(q_GQD, k_ND, v_ND, of_queries, of_keys, queries, keys):
        scores_QN = q_GQD.reshape(-1, D) @ k_ND.T
        scores_QN = scores_QN.astype(jnp.float32) * scale
        if softcap is not None:
            scores_QN = softcap * jnp.tanh(scores_QN / softcap)
        seen = _visible(of_queries, of_keys, queries, keys, window)
        scores_GQN = jnp.where(seen, scores_QN.reshape(G, -1, len(keys)), MASKED)
        weights = jax.nn.softmax(scores_GQN, axis=-1).astype(v_ND.dtype)
        return (weights.reshape(-1, len(keys)) @ v_ND).reshape(q_GQD.shape)

    out = []
    for begin in range(0, T, block):
        end = min(begin + block, T)
        first = 0 if window is None else max(0, begin - window + 1)
        compute = attend_block if block >= T else jax.checkpoint(attend_block, prevent_cse=False)
        out.append(
            compute(
                q_GTD[:, begin:end],
                k_SD[first:end],
                v_SD[first:end],
                segment_ids_S[begin:end],
                segment_ids_S[first:end],
                jnp.arange(begin, end),
                jnp.arange(first, end),
            )
        )
    return jnp.concatenate(out, axis=1)


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
            residual_checkpoint_name=SPLASH_RESIDUALS,
            interpret=interpret,
        )
