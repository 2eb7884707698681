"""Attention of new tokens to the tokens in a cache."""

import jax
import jax.numpy as jnp

from jtune.models.attention.reference import MASKED


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
    """`attend` of new tokens to the keys and values of a cache: `[batch, T, heads, head_dim of v]`.

    Args:
      positions: of the new tokens in their sequence.
      key_positions: of the tokens in the slots of the cache; negative: an empty slot.
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
