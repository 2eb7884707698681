"""Flash attention on GPUs, over a mesh. The kernels are in flash_kernels.py."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jtune.models.attention.shards import shards_of


def flash_attention(q_BTHD, k_BSKD, v_BSKD, segment_ids_BS, scale, window, softcap, mesh: Mesh | None, interpret=False):
    """Flash attention over the mesh, split as splash: `[B, T, H, V]`, and logs of the sums of weights, `[B, T, H]`.

    Rows are padded to whole blocks with tokens of segment 0, heads to a power of two with zeros.
    """
    from jtune.models.attention.flash_kernels import ROW_MULTIPLE, Options, flash, plan_of

    T, V = q_BTHD.shape[1], v_BSKD.shape[3]
    width = power_of_two(max(q_BTHD.shape[3], V))
    shards = shards_of(mesh, q_BTHD, k_BSKD)
    pad = -T % (ROW_MULTIPLE * shards.context)
    fill = lambda x: jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, width - x.shape[3])))
    first_BT, last_BS = bounds(jnp.pad(segment_ids_BS, ((0, 0), (0, pad))), window)
    offsets = jnp.arange(shards.context, dtype=jnp.int32) * ((T + pad) // shards.context)
    options = Options(scale, softcap, plan_of(width), interpret)
    local: Callable = lambda *args: flash(*args, options)
    if mesh is not None and mesh.size > 1:
        rows, heads, sequence = shards.axes
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


def bounds(segment_ids_BS: jax.Array, window: int | None) -> tuple[jax.Array, jax.Array]:
    """The first key that each query sees, and the last query that sees each key: int32 `[B, S]`.

    Segments must be contiguous.
    """
    at_S = jnp.arange(segment_ids_BS.shape[1], dtype=jnp.int32)
    changes = segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]
    begins, ends = (jnp.pad(changes, ((0, 0), side), constant_values=True) for side in ((1, 0), (0, 1)))
    first_BS = jax.lax.cummax(jnp.where(begins, at_S, 0), axis=1)
    last_BS = jax.lax.cummin(jnp.where(ends, at_S, at_S.size), axis=1, reverse=True)
    if window is not None:
        first_BS, last_BS = jnp.maximum(first_BS, at_S - window + 1), jnp.minimum(last_BS, at_S + window - 1)
    return first_BS, last_BS


def power_of_two(n: int) -> int:
    """The next power of two, at least 16, the smallest that a product of blocks takes."""
    return max(16, 1 << (n - 1).bit_length())
