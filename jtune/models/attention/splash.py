"""Splash attention on TPUs, over a mesh. The kernel comes with jax."""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jtune.models.attention.reference import RESIDUALS
from jtune.models.attention.shards import shards_of

LANES = 128  # splash needs head_dim and row lengths to be multiples of it


def splash_attention(
    q_BTHD, k_BSKD, v_BSKD, segment_ids_BS, scale, window, softcap, mesh: Mesh | None, interpret=False
):
    """Splash attention over the mesh: each device has its rows, its heads and, with `context`, its queries.

    If `tensor` does not divide the heads, each device computes all of them. Rows are padded to whole lanes with tokens
    of segment 0, heads with zeros, which change no score.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    _, T, H, D = q_BTHD.shape
    V = v_BSKD.shape[3]
    width = max(D, V) + -max(D, V) % LANES
    shards = shards_of(mesh, q_BTHD, k_BSKD)
    pad = -T % (LANES * shards.context)
    fill = lambda x: jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, width - x.shape[3]))).transpose(0, 2, 1, 3)
    # The kernel does not scale scores. The scale is in the dtype of q, as the products of the kernel are.
    q_BHTD, k_BKSD, v_BKSD = fill(q_BTHD * jnp.asarray(scale, q_BTHD.dtype)), fill(k_BSKD), fill(v_BSKD)
    segments = jnp.pad(segment_ids_BS, ((0, 0), (0, pad)))
    kernel = _splash_kernel(T + pad, H, shards.tensor, shards.context, window, softcap, largest_block(width), interpret)

    def local(kernel, q, k, v, of_queries, of_keys):
        return jax.vmap(lambda q, k, v, a, b: kernel(q, k, v, SegmentIds(q=a, kv=b)))(q, k, v, of_queries, of_keys)

    if mesh is not None and mesh.size > 1:
        rows, heads, sequence = shards.axes
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


def largest_block(width: int) -> int:
    """Tokens of the largest block whose queries, keys and values the kernel can hold, for heads of `width` dimensions.

    A TPU compiles 1024 for heads of 256, and refuses them for heads of 512: 16 MiB of its memory are for a kernel.

    >>> [largest_block(width) for width in (128, 256, 384, 512, 1024)]
    [1024, 1024, 512, 512, 256]
    """
    return next(block for block in (1024, 512, 256, LANES) if block * width <= 1024 * 256 or block == LANES)


@lru_cache
def _splash_kernel(T, heads, head_shards, q_seq_shards, window, softcap, largest, interpret) -> Callable:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    one = splash.CausalMask((T, T)) if window is None else splash.LocalMask((T, T), (window - 1, 0), 0)
    sizes = [size for size in (1024, 512, 256, LANES) if size <= largest]
    of_queries = next(size for size in sizes if T // q_seq_shards % size == 0)
    of_keys = next(size for size in sizes if T % size == 0)
    blocks = splash.BlockSizes(
        block_q=of_queries,
        block_kv=of_keys,
        block_kv_compute=of_keys,
        block_q_dkv=of_queries,
        block_kv_dkv=of_keys,
        block_kv_dkv_compute=of_keys,
        use_fused_bwd_kernel=True,
    )
    with jax.ensure_compile_time_eval():  # its tables are constants, even if this is called while tracing
        return splash.make_splash_mha(
            splash.MultiHeadMask([one] * heads),
            block_sizes=blocks,
            head_shards=head_shards,
            q_seq_shards=q_seq_shards,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name=RESIDUALS,
            interpret=interpret,
        )
