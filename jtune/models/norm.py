"""The norms of a layer and of the decoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtune.models.config import DecoderConfig
from jtune.models.kernels import parameter, recomputed


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the last axis, with moments in float32.

    Attributes:
      heads: each head has its own scale; heads are the last but one axis.
    """

    kind: str
    eps: float
    use_scale: bool = True
    use_bias: bool = False
    offset: bool = False  # multiply by 1 + scale, in float32
    heads: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-2:] if self.heads else x.shape[-1:]
        scale = bias = None
        if self.use_scale:
            init = nn.initializers.zeros if self.offset else nn.initializers.ones
            scale = parameter(self, "scale", init, shape, (None,) * len(shape))
        if self.use_scale and self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, shape, (None,) * len(shape))
        return recomputed(self._normed)(x, scale, bias)

    def _normed(self, x: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if self.kind == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        if scale is None:
            return normed.astype(x.dtype)
        if self.kind == "rms" and not self.offset:
            return normed.astype(x.dtype) * scale.astype(x.dtype)
        y = normed * (self.offset + scale.astype(jnp.float32))
        if bias is not None:
            y = y + bias.astype(jnp.float32)
        return y.astype(x.dtype)


def norm(c: DecoderConfig, name: str | None = None) -> Norm:
    """The norm of a model around its layers."""
    return Norm(c.norm, c.norm_eps, c.norm_scale, c.norm_bias, c.norm_offset, name=name)
