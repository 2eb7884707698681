"""Attention within segments: one function, which calls the chosen kernel.

Shape suffixes: B batch, T tokens of queries, S tokens of keys, H query heads, K key/value heads, G = H/K queries of a
group, D head_dim; of one block: Q queries, N keys, M = G*Q.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jtune.models.attention.blocks import block_size, in_blocks
from jtune.models.attention.flash import flash_attention
from jtune.models.attention.reference import at_once
from jtune.models.attention.splash import splash_attention
from jtune.sharding import constrain

BACKENDS = ("xla", "blocks", "splash", "flash")

# On CPUs, scores in memory at a time; they limit the number of heads. 2**25 float32 are 128 MiB.
MAPPED_SCORES = 2**25


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
      segment_ids: int32 `[batch, seq]`; a token sees the tokens of its own segment up to itself.
      window: a token sees itself and the `window - 1` tokens before it.
      softcap: scores become `softcap * tanh(scores / softcap)` (arXiv:2408.00118).
      sinks: a score per head that competes with those of the keys, and has no value.
      bias: float32, added to the scores of a key. Only "xla" supports it.
      backend: "xla": all scores at once, the reference; "blocks", "splash", "flash": see `choose`.
      mesh: of the arrays; rows are split over `batch`, tokens over `sequence`, heads over `heads` and `kv_heads`.

    Returns:
      `[batch, seq, heads, head_dim of v]` in the dtype of `q`. Softmax is in float32.
    """
    if (backend == "splash" and sinks_H is not None) or (backend != "xla" and bias_BHS is not None):
        raise ValueError(f"attention backend {backend!r} has no {'sinks' if bias_BHS is None else 'biases'}")
    if backend == "splash":
        return splash_attention(q_BTHD, k_BSKD, v_BSKD, segment_ids_BS, scale, window, softcap, mesh)
    if backend == "flash":
        out_BTHV, sums_BTH = flash_attention(q_BTHD, k_BSKD, v_BSKD, segment_ids_BS, scale, window, softcap, mesh)
        return _with_sinks(out_BTHV, sums_BTH, sinks_H)
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    # Queries stay on the devices of their tokens, which all-gather the keys and values of the whole row.
    k_BSKD, v_BSKD = (constrain(x, mesh, "batch", None, "kv_heads", None) for x in (k_BSKD, v_BSKD))
    B, T, H, D = q_BTHD.shape
    K, V = k_BSKD.shape[2], v_BSKD.shape[3]
    q_BKGTD = q_BTHD.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k_BKSD, v_BKSD = (x.transpose(0, 2, 1, 3) for x in (k_BSKD, v_BSKD))
    split = mesh is not None and mesh.shape["context"] > 1  # then each device has a shard of a row already
    compute: Callable = at_once if backend == "xla" or split else in_blocks
    one: Callable = lambda q, k, v, segment_ids: compute(q, k, v, segment_ids, scale, window, softcap)
    together = MAPPED_SCORES // max(1, H // K * block_size(T) * T)
    if backend == "blocks" and (mesh is None or mesh.size == 1) and together < B * K and jax.default_backend() == "cpu":
        flat = lambda x: x.reshape(B * K, *x.shape[2:])
        heads = *map(flat, (q_BKGTD, k_BKSD, v_BKSD)), jnp.repeat(segment_ids_BS, K, axis=0)
        out, sums = jax.lax.map(lambda head: one(*head), heads, batch_size=max(1, together))
        sums = sums.reshape(B, K, *sums.shape[1:])
    elif bias_BHS is not None:
        one = lambda q, k, v, segment_ids, bias: at_once(q, k, v, segment_ids, scale, window, softcap, bias)
        over_heads = jax.vmap(one, in_axes=(0, 0, 0, None, 0))
        bias_BKGS = bias_BHS.reshape(B, K, H // K, -1)
        out, sums = jax.vmap(over_heads)(q_BKGTD, k_BKSD, v_BKSD, segment_ids_BS, bias_BKGS)
    else:
        over_heads = jax.vmap(one, in_axes=(0, 0, 0, None))
        out, sums = jax.vmap(over_heads)(q_BKGTD, k_BKSD, v_BKSD, segment_ids_BS)
    out_BTHV = out.reshape(B, H, T, V).transpose(0, 2, 1, 3)
    return _with_sinks(out_BTHV, sums.reshape(B, H, T).transpose(0, 2, 1), sinks_H)


def _with_sinks(out_BTHV: jax.Array, sums_BTH: jax.Array, sinks_H: jax.Array | None) -> jax.Array:
    """Scale the output by the weight that a sink leaves, which follows from the log-sum of the other weights."""
    if sinks_H is None:
        return out_BTHV
    others_BTH = jax.nn.sigmoid(sums_BTH - sinks_H.astype(jnp.float32))
    return (out_BTHV * others_BTH[..., None]).astype(out_BTHV.dtype)
