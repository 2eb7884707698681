"""Mixture of experts: each token goes through the few experts that its router gives the most weight.

Shape suffixes: N tokens, D embed, E experts, P experts of a token.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtune.models.config import DecoderConfig
from jtune.models.kernels import Linear


class Experts(nn.Module):
    """Gated MLPs `[experts, in, out]`, each applied to its own run of rows: no token is dropped, none is padded."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_MD: jax.Array, group_sizes_E: jax.Array, act) -> jax.Array:
        c = self.config
        linear = lambda features, axes, name: Linear(features, axes, experts=c.num_experts, name=name)
        gate = linear(c.intermediate_size, ("embed", "mlp"), "gate_proj")(x_MD, group_sizes_E)
        up = linear(c.intermediate_size, ("embed", "mlp"), "up_proj")(x_MD, group_sizes_E)
        return linear(c.hidden_size, ("mlp", "embed"), "down_proj")(act(gate) * up, group_sizes_E)


class MoE(nn.Module):
    """Router, experts, and the weighted sum of what they give."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, act) -> jax.Array:
        c = self.config
        x_ND = x_BTD.reshape(-1, c.hidden_size)
        router_NE = Linear(c.num_experts, ("embed", None), name="gate")(x_ND)
        weight_NP, expert_NP = jax.lax.top_k(jax.nn.softmax(router_NE.astype(jnp.float32), -1), c.num_experts_per_tok)
        weight_NP = weight_NP / weight_NP.sum(-1, keepdims=True)

        order = jnp.argsort(expert_NP.ravel(), stable=True)  # (token, choice) pairs by expert
        group_sizes_E = jnp.bincount(expert_NP.ravel(), length=c.num_experts).astype(jnp.int32)
        y_MD = Experts(c, name="experts")(x_ND[order // c.num_experts_per_tok], group_sizes_E, act)
        y_NPD = y_MD[jnp.argsort(order)].reshape(*weight_NP.shape, -1)
        return jnp.einsum("NPD,NP->ND", y_NPD, weight_NP.astype(y_NPD.dtype)).reshape(x_BTD.shape)
