"""Rotary position embeddings in the rotate-half layout of Hugging Face checkpoints.

Shape suffixes: B batch, T tokens, H heads, D head_dim, F = D/2 frequencies.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jtune.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position, float32 `[head_dim / 2]`, highest first."""
    plain = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim)
    return plain


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Long waves are stretched, short ones kept, those between blended by their length (the Llama 3.1 model card)."""
    wavelengths = 2 * np.pi / plain
    # How far a wave is from the long end (0) to the short end (1).
    ratio = rope.original_length / wavelengths
    kept = np.clip((ratio - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return ((1 - kept) * plain / rope.factor + kept * plain).astype(np.float32)


def _yarn(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """NTK-by-parts (arXiv:2309.00071, section 3.2): a linear ramp over dimensions, from kept to stretched."""

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original length."""
        return head_dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return (ramp * plain / rope.factor + (1 - ramp) * plain).astype(np.float32)


def cos_sin(rope: Rope, head_dim: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Float32 `[batch, seq, 1, head_dim / 2]` each."""
    angles_BTF = positions_BT[..., None].astype(jnp.float32) * frequencies(rope, head_dim)
    angles_BT1F = angles_BTF[:, :, None, :]
    return jnp.cos(angles_BT1F) * rope.attention_factor, jnp.sin(angles_BT1F) * rope.attention_factor


def rotate(x_BTHD: jax.Array, cos_BT1F: jax.Array, sin_BT1F: jax.Array) -> jax.Array:
    """Turn each pair (i, i + D/2) of every head by its angle; computed in float32, returned in the dtype of `x`."""
    a, b = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos_BT1F - b * sin_BT1F, b * cos_BT1F + a * sin_BT1F], axis=-1)
    return turned.astype(x_BTHD.dtype)
