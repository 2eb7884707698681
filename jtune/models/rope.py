"""Rotary position embeddings.

Shape suffixes: B batch, T tokens, H heads, D head_dim, F frequencies, one for two rotated dimensions.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jtune.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position, float32 `[F]`, highest first, for segments up to `rope.original_length`."""
    dim = rope.dim or head_dim
    plain = rope.theta ** -(np.arange(0, dim, 2, dtype=np.float32) / dim)
    if rope.kind == "proportional":
        return np.where(np.arange(dim // 2) < (rope.turning or 0), plain, 0).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain, dim)
    if rope.kind == "longrope":
        return plain / np.asarray(rope.short_factor, np.float32)
    return plain


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Stretch long waves, keep short waves, and blend those between by their length (the Llama 3.1 model card)."""
    wavelengths = 2 * np.pi / plain
    # The place of a wave between the long end (0) and the short end (1).
    ratio = rope.original_length / wavelengths
    between = max(rope.high_freq_factor - rope.low_freq_factor, 1e-9)  # Llama 4 has no waves between
    kept = np.clip((ratio - rope.low_freq_factor) / between, 0, 1)
    return ((1 - kept) * plain / rope.factor + kept * plain).astype(np.float32)


def _yarn(rope: Rope, plain: np.ndarray, dim: int) -> np.ndarray:
    """NTK-by-parts (arXiv:2309.00071, section 3.2): a linear ramp over dimensions, from kept to stretched."""

    def dimension(rotations: float) -> float:
        """The dimension that rotates `rotations` times over the original length."""
        return dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return (ramp * plain / rope.factor + (1 - ramp) * plain).astype(np.float32)


def cos_sin(rope: Rope, head_dim: int, positions_BT: jax.Array, segment_ids_BT: jax.Array):
    """Float32 `[batch, seq, 1, F]` each.

    Where frequencies depend on the length of a sequence (dynamic, longrope), each segment has its own length, so
    packing changes nothing.
    """
    frequencies_F = jnp.asarray(frequencies(rope, head_dim))
    if rope.kind in ("dynamic", "longrope"):
        length_BT1 = _lengths(positions_BT, segment_ids_BT)[..., None]
        frequencies_F = _by_length(rope, head_dim, length_BT1.astype(jnp.float32), frequencies_F)
    angles_BTF = positions_BT[..., None].astype(jnp.float32) * frequencies_F
    angles_BT1F = angles_BTF[:, :, None, :]
    if rope.clockwise:
        angles_BT1F = -angles_BT1F
    return jnp.cos(angles_BT1F) * rope.attention_factor, jnp.sin(angles_BT1F) * rope.attention_factor


def _lengths(positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """The length so far of the segment of each token."""

    def of_row(positions_T, segment_ids_T):
        last = jax.ops.segment_max(positions_T, segment_ids_T, num_segments=positions_T.shape[0] + 1)
        return last[segment_ids_T] + 1

    return jax.vmap(of_row)(positions_BT, segment_ids_BT)


def _by_length(rope: Rope, head_dim: int, length_BT1: jax.Array, short_F: jax.Array) -> jax.Array:
    """`[batch, seq, F]`: long sequences have other factors (longrope, arXiv:2402.13753) or a larger base (dynamic)."""
    dim = rope.dim or head_dim
    exponent_F = -(np.arange(0, dim, 2, dtype=np.float32) / dim)
    if rope.kind == "longrope":
        long_F = rope.theta**exponent_F / np.asarray(rope.long_factor, np.float32)
    else:
        grown = rope.factor * length_BT1 / rope.original_length - (rope.factor - 1)
        long_F = (rope.theta * grown ** (dim / (dim - 2))) ** exponent_F
    return jnp.where(length_BT1 > rope.original_length, long_F, short_F)


def rotate(x_BTHD: jax.Array, cos_BT1F: jax.Array, sin_BT1F: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotate pairs of a head's dimensions by their angles; computed in float32, returned in the dtype of `x`.

    Of the first 2F dimensions, i and i + F are a pair, or 2i and 2i + 1 if `interleaved`; the others do not change.
    """
    turning, rest = jnp.split(x_BTHD, [2 * cos_BT1F.shape[-1]], axis=-1)
    turning = turning.astype(jnp.float32)
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else jnp.split(turning, 2, axis=-1)
    a, b = a * cos_BT1F - b * sin_BT1F, b * cos_BT1F + a * sin_BT1F
    turned = jnp.stack([a, b], -1).reshape(turning.shape) if interleaved else jnp.concatenate([a, b], axis=-1)
    return jnp.concatenate([turned.astype(x_BTHD.dtype), rest], axis=-1)
