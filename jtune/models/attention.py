"""Attention within segments, through one function; the one file that knows which kernel computes it.

Shape suffixes: B batch, T tokens, H query heads, K key/value heads, G = H/K queries of a group, D head_dim.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jtune.sharding import constrain

# Scores of masked pairs. Finite, so that a row of padding gives numbers and not NaN.
MASKED = -1e30


def attend(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Causal attention that never crosses a segment.

    Args:
      q, k, v: of one dtype; grouped-query attention when there are fewer key heads.
      segment_ids: int32 `[batch, seq]`; tokens see tokens of their own segment, at or before their place in the row.
      window: a token sees itself and the `window - 1` tokens before it.
      softcap: scores become `softcap * tanh(scores / softcap)` (arXiv:2408.00118).
      backend: "xla", or "auto" for the best one of the platform, which so far is "xla" on all.
      mesh: where the arrays lie; rows over `batch`, tokens over `sequence`, heads over `heads` and `kv_heads`.

    Returns:
      `[batch, seq, heads, head_dim]` in the dtype of `q`. Softmax is in float32.
    """
    if backend not in ("auto", "xla"):
        raise ValueError(f"attention backend {backend!r}: expected 'auto' or 'xla'")
    # Queries stay where their tokens are; keys and values of the whole row come to them.
    k_BTKD, v_BTKD = (constrain(x, mesh, "batch", None, "kv_heads", None) for x in (k_BTKD, v_BTKD))
    B, T, H, D = q_BTHD.shape
    K = k_BTKD.shape[2]
    q_BTKGD = q_BTHD.reshape(B, T, K, H // K, D)
    scores = jnp.einsum("BTKGD,BSKD->BKGTS", q_BTKGD, k_BTKD, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    allowed_BTS = constrain(visible(segment_ids_BT, window), mesh, "batch", "sequence", None)
    scores = jnp.where(allowed_BTS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BTKD.dtype)
    return jnp.einsum("BKGTS,BSKD->BTKGD", weights, v_BTKD).reshape(B, T, H, D)


def visible(segment_ids_BT: jax.Array, window: int | None) -> jax.Array:
    """bool `[batch, seq, seq]`: whether the token of the second axis sees the token of the third.

    Segments are contiguous, so distance in the row is distance in the segment.
    """
    T = segment_ids_BT.shape[1]
    distance = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    near = distance >= 0
    if window is not None:
        near &= distance < window
    return (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]) & near
