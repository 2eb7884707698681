"""Mixture of experts: each token goes through the few experts that its router gives the most weight.

On a mesh, each device sorts the tokens it has. Where experts are split over the axis `expert`, the devices along it
show each other their tokens, each adds up what its own experts give for all of them, and each gets back the sums of its
own tokens. Nothing is dropped, and all sizes are static.

Shape suffixes: B batch, T tokens in a row, N tokens, D embed, E experts (of this device), P experts of a token,
M = N*P pairs of a token and one of its experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jtune.models.config import DecoderConfig
from jtune.models.kernels import Kernel, Linear
from jtune.sharding import gather, spec


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
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, act) -> jax.Array:
        c = self.config
        router_BTE = Linear(c.num_experts, ("embed", None), name="gate")(x_BTD)
        if self.mesh is None or self.mesh.size == 1:
            experts = Experts(c, name="experts")
            apply = lambda x_MD, sizes_E: experts(x_MD, sizes_E, act)
            weight_NP, expert_NP = choose(_flat(router_BTE), c.num_experts_per_tok)
            return mix(apply, _flat(x_BTD), weight_NP, expert_NP, 0, c.num_experts).reshape(x_BTD.shape)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        params = self.get_variable("params", "experts")
        return mix_on_mesh(params, x_BTD, router_BTE, key, config=c, act=act, mesh=self.mesh)


def choose(router_NE: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` experts of each token and their weights, which add up to 1: float32, int32 `[N, P]`."""
    weight_NP, expert_NP = jax.lax.top_k(jax.nn.softmax(router_NE.astype(jnp.float32), -1), count)
    return weight_NP / weight_NP.sum(-1, keepdims=True), expert_NP


def mix(apply: Callable, x_ND: jax.Array, weight_NP: jax.Array, expert_NP: jax.Array, first: Any, count: int):
    """The weighted sum, for each token, of what its experts among `first ... first + count - 1` give: `[N, D]`.

    Args:
      apply: `apply(x [M, D], group_sizes [count]) -> [M, D]`; what it gives for rows after the last group is not used.
    """
    local_M = expert_NP.ravel() - first
    mine_M = (local_M >= 0) & (local_M < count)
    local_M = jnp.where(mine_M, local_M, count)  # the pairs of other devices' experts come last
    order_M = jnp.argsort(local_M, stable=True)
    group_sizes_E = jnp.bincount(local_M, length=count).astype(jnp.int32)
    # Rows of no group are undefined in a ragged product and in its gradient: nothing may come in or out of them.
    only_mine = lambda x_MD: jnp.where(mine_M[order_M, None], x_MD, 0)
    y_MD = only_mine(apply(only_mine(x_ND[order_M // expert_NP.shape[1]]), group_sizes_E))
    y_NPD = y_MD[jnp.argsort(order_M)].reshape(*expert_NP.shape, -1)
    return jnp.einsum("NPD,NP->ND", y_NPD, weight_NP.astype(y_NPD.dtype))


def mix_on_mesh(
    params: Any,
    x_BTD: jax.Array,
    router_BTE: jax.Array,
    key: jax.Array | None,
    *,
    config: DecoderConfig,
    act: Callable,
    mesh: Mesh,
) -> jax.Array:
    """`mix` of all experts, on every device for the tokens it has: `[B, T, D]`.

    Args:
      params: of `Experts`, as they lie on the mesh; gathered here over the axes along which tokens differ, so that
        gradients are scattered over them.
      key: of dropout.
    """
    count = config.num_experts // mesh.shape["expert"]
    specs = jax.tree_util.tree_map_with_path(lambda path, x: spec(_axes(path, x, config), x.shape, mesh), params)
    tokens = spec(("batch", "sequence", None), x_BTD.shape, mesh)
    split = mesh.shape["tensor"] > 1 and config.intermediate_size % mesh.shape["tensor"] == 0

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, tokens, tokens, P()), out_specs=tokens)
    def local(params, x_BTD, router_BTE, key):
        params = jax.tree.map(partial(_cast, dtype=x_BTD.dtype), params, is_leaf=lambda x: isinstance(x, Kernel))
        # Along `expert`, the experts are a device's own; what else is split along it is not.
        params = jax.tree.map(lambda x, where: gather(x, P(None, *where[1:])), params, specs)
        if key is not None:
            for axis in ("data", "fsdp", "expert", "context"):
                key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        rngs = None if key is None else {"dropout": key}
        apply = lambda x_MD, sizes_E: Experts(config, parent=None).apply(
            {"params": params}, x_MD, sizes_E, act, rngs=rngs
        )
        x_ND = _flat(x_BTD)
        # Chosen here: outside, XLA would gather the whole batch to find the best.
        weight_NP, expert_NP = choose(_flat(router_BTE), config.num_experts_per_tok)
        if count == config.num_experts:
            y_ND = mix(apply, x_ND, weight_NP, expert_NP, 0, count)
        else:
            x_ND, weight_NP, expert_NP = (
                jax.lax.all_gather(x, "expert", tiled=True) for x in (x_ND, weight_NP, expert_NP)
            )
            y_ND = mix(apply, x_ND, weight_NP, expert_NP, jax.lax.axis_index("expert") * count, count)
            y_ND = jax.lax.psum_scatter(y_ND, "expert", tiled=True)
        return (jax.lax.psum(y_ND, "tensor") if split else y_ND).reshape(x_BTD.shape)

    return local(params, x_BTD, router_BTE, key)


def _flat(x_BTX: jax.Array) -> jax.Array:
    return x_BTX.reshape(-1, x_BTX.shape[-1])


def _axes(path: Any, leaf: jax.Array, config: DecoderConfig) -> tuple[str | None, ...]:
    """Logical axes of a kernel of `Experts`, or of a leaf of a node that stands in its place.

    All have the experts in front. Of a node's leaf, the dimension that is as wide as the MLP is split with it.
    """
    width = config.intermediate_size
    inputs, outputs = ("mlp", "embed") if path[0].key == "down_proj" else ("embed", "mlp")
    if leaf.shape == (config.num_experts, *((width if a == "mlp" else config.hidden_size) for a in (inputs, outputs))):
        return ("experts", inputs, outputs)
    at = 1 if inputs == "mlp" else leaf.ndim - 1
    return ("experts", *("mlp" if d == at and leaf.shape[d] == width else None for d in range(1, leaf.ndim)))


def _cast(kernel: Any, dtype: Any) -> Any:
    """A plain kernel in the dtype it is used in, before it travels; nodes know themselves."""
    return kernel if isinstance(kernel, Kernel) else kernel.astype(dtype)
