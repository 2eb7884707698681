"""The MLP of a layer.

Shape suffixes: B batch, T tokens, D embed.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jtune.models.config import DecoderConfig
from jtune.models.kernels import Linear, recomputed
from jtune.sharding import constrain

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def gated(gate_up: jax.Array, c: DecoderConfig) -> jax.Array:
    """`act(gate) * up`, of the output of one kernel for both, `[..., 2 * width]`: side by side, or interleaved.

    gpt-oss clamps both, has a sigmoid with its own slope, and adds one to `up`.
    """
    if c.mlp == "interleaved":
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    else:
        gate, up = jnp.split(gate_up, 2, axis=-1)
    if c.hidden_act != "clamped":
        return ACTIVATIONS[c.hidden_act](gate) * up
    limit, slope = c.clamp
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(slope * gate) * (up + 1)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (arXiv:2002.05202), or down(act(up(x)))."""

    config: DecoderConfig
    mesh: Mesh | None = None
    width: int | None = None  # default: intermediate_size

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, width = self.config, self.width or self.config.intermediate_size
        act = ACTIVATIONS[c.hidden_act]
        up = lambda name, n=width: Linear(n, ("embed", "mlp"), use_bias=c.mlp_bias, name=name)(x_BTD)
        if c.mlp == "plain":
            hidden = recomputed(act)(up("up_proj"))
        elif c.mlp == "gated":
            hidden = recomputed(lambda gate, up: act(gate) * up)(up("gate_proj"), up("up_proj"))
        else:
            hidden = recomputed(partial(gated, c=c))(up("gate_up_proj", 2 * width))
        hidden = constrain(hidden, self.mesh, "batch", "sequence", "mlp")
        return Linear(c.hidden_size, ("mlp", "embed"), use_bias=c.mlp_bias, name="down_proj")(hidden)
