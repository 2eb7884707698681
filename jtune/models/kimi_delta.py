"""Kimi Delta Attention (arXiv:2510.26692): the gated delta rule with a decay for each channel of the keys.

Queries, keys and values have a kernel and a convolution each. Decays, and the gate of the output, come from a short
vector of the token.

Shape suffixes: B batch, T tokens, D embed, M channels, H heads, K dimensions of a key, V of a value.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jtune.models.cache import Entry, LayerCache, read_state, write_state
from jtune.models.config import DecoderConfig
from jtune.models.convolution import Convolution
from jtune.models.delta import delta_config, log_uniform, over_rows
from jtune.models.kernels import Linear, parameter
from jtune.models.mlp import ACTIVATIONS
from jtune.models.norm import Norm


class KimiDelta(nn.Module):
    """Queries, keys and values through short convolutions, the rule, and a norm with a sigmoid gate."""

    config: DecoderConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, segment_ids_BT: jax.Array, layer_cache: LayerCache | None = None
    ) -> tuple[jax.Array, Entry | None]:
        """The output of the rule, `[batch, seq, embed]`, and the cache with the new tokens."""
        c, d = self.config, delta_config(self.config)
        B, T, _ = x_BTD.shape
        H, K, V = d.value_heads, d.key_dim, d.value_dim
        cached, channels = read_state(layer_cache, T), {"q": H * K, "k": H * K, "v": H * V}
        earlier = jnp.split(cached["inputs"], [H * K, 2 * H * K], axis=-1) if cached else (None,) * 3
        mixed, inputs = [], []
        for (name, width), before_BSM in zip(channels.items(), earlier):
            x_BTM = Linear(width, ("embed", "heads"), name=f"{name}_proj")(x_BTD)
            y_BTM, last_BSM = Convolution(d.taps, name=f"{name}_conv1d")(x_BTM, segment_ids_BT, before_BSM)
            mixed.append(ACTIVATIONS[c.hidden_act](y_BTM).astype(x_BTD.dtype).reshape(B, T, H, -1))
            inputs.append(last_BSM)

        def through_a_short_vector(name: str, width: int) -> jax.Array:
            short = Linear(V, ("embed", None), name=f"{name}_a_proj")(x_BTD)
            return Linear(width, (None, "heads"), name=f"{name}_b_proj")(short).astype(jnp.float32)

        rate_H = jnp.exp(parameter(self, "A_log", log_uniform, (1, 1, H, 1), (None,) * 4).astype(jnp.float32))
        bias_M = parameter(self, "dt_bias", _small_steps, (H * K,), (None,)).astype(jnp.float32)
        step_BTHK = jax.nn.softplus(through_a_short_vector("f", H * K) + bias_M).reshape(B, T, H, K)
        beta_BTH = jax.nn.sigmoid(Linear(H, ("embed", None), name="b_proj")(x_BTD).astype(jnp.float32))
        q, k, v = mixed
        decay_BTHK, before = -rate_H * step_BTHK, cached.get("state")
        out_BTHV, state = over_rows(q, k, v, decay_BTHK, beta_BTH, segment_ids_BT, before, self.mesh)
        gate_BTHV = jax.nn.sigmoid(through_a_short_vector("g", H * V)).reshape(B, T, H, V)
        normed = (Norm("rms", c.norm_eps, name="o_norm")(out_BTHV) * gate_BTHV).astype(x_BTD.dtype)
        y_BTD = Linear(c.hidden_size, ("heads", "embed"), name="o_proj")(normed.reshape(B, T, -1))
        return y_BTD, write_state(layer_cache, {"inputs": jnp.concatenate(inputs, axis=-1), "state": state})


def _small_steps(key, shape, dtype):
    """Biases for which steps are from 0.001 to 0.1 before the input changes them."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus
