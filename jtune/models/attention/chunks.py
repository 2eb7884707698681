"""Attention within chunks: a token sees the tokens of its segment from the last multiple of the chunk's length.

Chunks are segments of their own to every backend, and a cache has as many slots as a chunk has tokens.

Shape suffixes: B batch, T tokens, S slots of a cache.
"""

import jax
import jax.numpy as jnp


def cut_segments(segment_ids_BT: jax.Array, positions_BT: jax.Array, chunk: int) -> jax.Array:
    """Other ids for the chunks of each segment, int32 `[batch, seq]`; padding keeps 0.

    Args:
      positions: of a token in its segment, less than `seq`.

    >>> cut_segments(jnp.array([[1, 1, 1, 2, 2, 0]]), jnp.array([[0, 1, 2, 0, 1, 0]]), 2).tolist()
    [[4, 4, 5, 8, 8, 0]]
    """
    count = segment_ids_BT.shape[1] // chunk + 1
    return jnp.where(segment_ids_BT > 0, segment_ids_BT * count + positions_BT // chunk, 0)


def empty_slots_before(positions_B1: jax.Array, key_positions_BS: jax.Array, chunk: int) -> jax.Array:
    """The positions in the slots of a cache; -1, an empty slot, for those before the chunk of a row's new token."""
    return jnp.where(key_positions_BS >= positions_B1 // chunk * chunk, key_positions_BS, -1)
