"""The MLP of a layer.

Shape suffixes: B batch, T tokens, D embed.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jtune.models.config import DecoderConfig
from jtune.models.kernels import Linear, parameter, recomputed
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


class XIELU(nn.Module):
    """xIELU (arXiv:2411.13010, section 3), whose slopes are learned: quadratic above zero, exponential below."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        constant = lambda value: nn.initializers.constant(value)
        start = lambda slope: constant(math.log(math.expm1(slope)))
        alpha_p = parameter(self, "alpha_p", start(0.8), (1,), (None,))
        alpha_n = parameter(self, "alpha_n", start(0.3), (1,), (None,))
        # Files hold both, and nothing learns them.
        beta, eps = (parameter(self, name, constant(value), (), ()) for name, value in (("beta", 0.5), ("eps", -1e-6)))
        beta, eps = (jax.lax.stop_gradient(value.astype(jnp.float32)) for value in (beta, eps))
        return recomputed(_xielu)(x, alpha_p.astype(jnp.float32), alpha_n.astype(jnp.float32), beta, eps)


def _xielu(x: jax.Array, alpha_p: jax.Array, alpha_n: jax.Array, beta: jax.Array, eps: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    above = jax.nn.softplus(alpha_p) * x32 * x32
    below = (beta + jax.nn.softplus(alpha_n)) * (jnp.expm1(jnp.minimum(x32, eps)) - x32)
    return (jnp.where(x32 > 0, above, below) + beta * x32).astype(x.dtype)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (arXiv:2002.05202), or down(act(up(x)))."""

    config: DecoderConfig
    mesh: Mesh | None = None
    width: int | None = None  # default: intermediate_size

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, width = self.config, self.width or self.config.intermediate_size
        up = lambda name, n=width: Linear(n, ("embed", "mlp"), use_bias=c.mlp_bias, name=name)(x_BTD)
        if c.mlp == "plain":
            act = XIELU(name="act_fn") if c.hidden_act == "xielu" else recomputed(ACTIVATIONS[c.hidden_act])
            hidden = act(up("up_proj"))
        elif c.mlp == "gated":
            act = ACTIVATIONS[c.hidden_act]
            hidden = recomputed(lambda gate, up: act(gate) * up)(up("gate_proj"), up("up_proj"))
        else:
            hidden = recomputed(partial(gated, c=c))(up("gate_up_proj", 2 * width))
        hidden = constrain(hidden, self.mesh, "batch", "sequence", "mlp")
        return Linear(c.hidden_size, ("mlp", "embed"), use_bias=c.mlp_bias, name="down_proj")(hidden)
