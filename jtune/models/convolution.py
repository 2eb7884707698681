"""Short convolutions over the tokens of a row: part of the delta rule's layers, or a layer's only mixing of tokens.

Shape suffixes: B batch, T tokens, D embed, M channels, S tokens that a convolution sees before the current one.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jtune.models.cache import Entry, LayerCache, read_state, write_state
from jtune.models.config import DecoderConfig
from jtune.models.kernels import Linear, parameter
from jtune.sharding import constrain


class ShortConv(nn.Module):
    """What a layer of LFM2 has instead of attention: three vectors for each token, of which the first and the third,
    multiplied, go through a convolution; the second gates its output."""

    config: DecoderConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, segment_ids_BT: jax.Array, layer_cache: LayerCache | None = None
    ) -> tuple[jax.Array, Entry | None]:
        """The output, `[batch, seq, embed]`, and the cache with the new tokens."""
        c, s = self.config, self.config.short_conv
        assert s is not None
        joined = Linear(3 * c.hidden_size, ("embed", "heads"), use_bias=s.bias, name="in_proj")(x_BTD)
        place = lambda x_BTM: constrain(x_BTM, self.mesh, "batch", "sequence", "heads")
        before, after, x_BTM = map(place, jnp.split(joined, 3, axis=-1))
        earlier = read_state(layer_cache, x_BTD.shape[1]).get("inputs")
        y_BTM, inputs_BSM = Convolution(s.taps, s.bias, name="conv")(before * x_BTM, segment_ids_BT, earlier)
        gated = place(after * y_BTM.astype(x_BTD.dtype))
        y_BTD = Linear(c.hidden_size, ("heads", "embed"), use_bias=s.bias, name="out_proj")(gated)
        return y_BTD, write_state(layer_cache, {"inputs": inputs_BSM})


class Convolution(nn.Module):
    """For each channel, a weighted sum of its last `taps` inputs within a run of tokens; float32."""

    taps: int
    use_bias: bool = False

    @nn.compact
    def __call__(
        self, x_BTM: jax.Array, segment_ids_BT: jax.Array, earlier_BSM: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The sums, `[batch, seq, channels]`, and the inputs that the next token needs, `[batch, taps - 1, channels]`.

        Args:
          earlier: the inputs before `x`, which is then one token of each row.
        """
        M = x_BTM.shape[-1]
        # It is not named kernel: it multiplies no vectors and gets no adapter. Its shape is that of the files.
        weight_M1S = parameter(self, "weight", nn.initializers.normal(0.02), (M, 1, self.taps), (None, None, None))
        weight_MS, T = weight_M1S[:, 0].astype(jnp.float32), x_BTM.shape[1]
        if earlier_BSM is None:
            run_BT = number_runs(segment_ids_BT)
            inputs_BSM = last_inputs(x_BTM, run_BT, segment_ids_BT > 0, self.taps - 1)
        else:
            x_BTM = jnp.concatenate([earlier_BSM.astype(x_BTM.dtype), x_BTM], axis=1)
            run_BT, inputs_BSM = jnp.zeros(x_BTM.shape[:2], jnp.int32), x_BTM[:, 1:]
        y_BTM = x_BTM * weight_MS[:, -1]
        for back in range(1, self.taps):
            before = lambda x, back=back: jnp.pad(x, ((0, 0), (back, 0), *((0, 0),) * (x.ndim - 2)))[:, :-back]
            same_BT1 = (before(run_BT + 1) == run_BT + 1)[..., None]  # no run before the row
            y_BTM += jnp.where(same_BT1, before(x_BTM), 0) * weight_MS[:, -1 - back]
        if self.use_bias:
            y_BTM += parameter(self, "bias", nn.initializers.zeros, (M,), (None,)).astype(jnp.float32)
        return y_BTM[:, -T:], inputs_BSM


def number_runs(segment_ids_BT: jax.Array) -> jax.Array:
    """Number the runs of tokens that share a state, int32: 1, 2, ... Padding belongs to the run before it, or to run 0.

    >>> number_runs(jnp.array([[0, 0, 7, 7, 8, 0]])).tolist()
    [[0, 0, 1, 1, 2, 2]]
    """
    earlier_BT = jnp.pad(segment_ids_BT, ((0, 0), (1, 0)))[:, :-1]
    return jnp.cumsum((segment_ids_BT > 0) & (segment_ids_BT != earlier_BT), axis=1, dtype=jnp.int32)


def last_inputs(x_BTM: jax.Array, run_BT: jax.Array, real_BT: jax.Array, count: int) -> jax.Array:
    """The last `count` inputs up to each row's last real token, `[B, count, M]`; zeros where its run has fewer."""
    last_B1 = (run_BT.shape[1] - 1 - jnp.argmax(real_BT[:, ::-1], axis=1))[:, None]
    place_BS = last_B1 + jnp.arange(1 - count, 1)
    take = lambda x: jnp.take_along_axis(x, jnp.maximum(place_BS, 0).reshape(*place_BS.shape, *(1,) * (x.ndim - 2)), 1)
    there_BS = (place_BS >= 0) & (take(run_BT) == jnp.take_along_axis(run_BT, last_B1, 1))
    return jnp.where(there_BS[..., None], take(x_BTM), 0)
