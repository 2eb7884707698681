"""Mixture of experts: each token passes through the few experts to which the router gives the most weight.

On a mesh, each device sorts its own tokens. If experts are split over the axis `expert`, the devices along it
all-gather their tokens. Each device sums the outputs of its own experts for all of them, and a reduce-scatter returns
the sums to the devices of the tokens. No token is dropped, and all sizes are static.

Shape suffixes: B batch, T tokens in a row, N tokens, D embed, E experts (of this device), P experts of a token,
M = N*P pairs of a token and one of its experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jtune.models.config import DecoderConfig
from jtune.models.config import Experts as ExpertConfig
from jtune.models.kernels import Kernel, Linear, parameter, recomputed
from jtune.models.mlp import ACTIVATIONS, MLP, gated
from jtune.models.norm import Norm
from jtune.sharding import divides, gather, named, spec

SMALL = 2**16  # elements of one layer


class Load(NamedTuple):
    """The distribution of tokens over experts; sums over tokens, and over layers."""

    chosen: jax.Array  # float32 [E]: how often an expert was among the best
    probability: jax.Array  # float32 [E]: its router probability
    tokens: jax.Array  # float32 scalar


class Experts(nn.Module):
    """MLPs `[experts, in, out]`, each applied to its own run of rows, without dropping or padding tokens."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_MD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        c, e = self.config, expert_config(self.config)
        linear = lambda features, axes, name: Linear(features, axes, e.bias, e.count, name=name)
        if _width_axis(c):
            up = lambda name: linear(e.intermediate_size, ("embed", "mlp"), name)(x_MD, group_sizes_E)
            act = ACTIVATIONS[c.hidden_act]
            hidden = recomputed(lambda gate, up: act(gate) * up)(up("gate_proj"), up("up_proj"))
        else:
            up = linear(2 * e.intermediate_size, ("embed", None), "gate_up_proj")
            hidden = recomputed(partial(gated, c=c))(up(x_MD, group_sizes_E))
        return linear(c.hidden_size, (_width_axis(c), "embed"), "down_proj")(hidden, group_sizes_E)


class MoE(nn.Module):
    """Router, experts, and the weighted sum of their outputs; and the MLP that all tokens share, if there is one."""

    config: DecoderConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, segment_ids_BT: jax.Array, routed_BTD: jax.Array | None = None
    ) -> tuple[jax.Array, Load | None]:
        """The output of the experts, and their load if the config asks for it.

        Args:
          routed_BTD: the input of the router; default: that of the experts.
        """
        c, e = self.config, expert_config(self.config)
        routed = x_BTD if routed_BTD is None else routed_BTD
        of_expert_E = None
        if e.beside:
            scale_D = parameter(self, "router_scale", nn.initializers.ones, (c.hidden_size,), (None,))
            normed = Norm("rms", c.norm_eps, use_scale=False)(routed)
            routed = normed * (scale_D * c.hidden_size**-0.5).astype(normed.dtype)
            of_expert_E = parameter(self, "per_expert_scale", nn.initializers.ones, (e.count,), (None,))
        router = Linear(e.count, ("embed", None), use_bias=e.router_bias, name="gate")
        # Small differences of scores decide, so sigmoid routers compute them in float32.
        precise = e.scoring == "sigmoid" or e.router_float32
        router_BTE = router(routed.astype(jnp.float32) if precise else routed)
        if e.correction_bias:
            shape = (1, e.count) if e.correction_row else (e.count,)
            axes = (None,) * len(shape)
            of_expert_E = parameter(self, "e_score_correction_bias", nn.initializers.zeros, shape, axes)
            of_expert_E = of_expert_E.reshape(e.count)
        if self.mesh is None or self.mesh.size == 1:
            experts = Experts(c, name="experts")
            weight_NP, expert_NP = choose(_flat(router_BTE), of_expert_E, e)
            y_ND = mix(experts, _flat(x_BTD), weight_NP, expert_NP, 0, e.count, scale_input=e.scale_input)
            y_BTD = y_ND.reshape(x_BTD.shape)
            load = measure(_flat(router_BTE), segment_ids_BT.ravel() > 0, e) if e.aux_coef else None
        else:
            key = self.make_rng("dropout") if self.has_rng("dropout") else None
            params = self.get_variable("params", "experts")
            y_BTD, load = mix_on_mesh(
                params, x_BTD, router_BTE, of_expert_E, segment_ids_BT, key, config=c, mesh=self.mesh
            )
        if e.shared_size:
            common_BTD = MLP(c, self.mesh, e.shared_size, name="shared_experts")(x_BTD)
            if e.shared_gate:
                common_BTD *= jax.nn.sigmoid(Linear(1, ("embed", None), name="shared_expert_gate")(x_BTD))
            y_BTD += common_BTD
        return y_BTD, load


def expert_config(config: DecoderConfig) -> ExpertConfig:
    """`config.experts`, which must not be None."""
    assert config.experts is not None
    return config.experts


def choose(router_NE: jax.Array, of_expert_E: jax.Array | None, e: ExpertConfig) -> tuple[jax.Array, jax.Array]:
    """The experts of each token and their weights: float32, int32 `[N, P]`.

    Args:
      of_expert_E: added to the scores for the choice alone; if the experts are `beside` an MLP, a factor of weights.
    """
    router_NE = router_NE.astype(jnp.float32)
    if e.scoring == "sparsemixer":
        return _mix_sparsely(router_NE, e)
    scores_NE = jax.nn.sigmoid(router_NE) if e.scoring == "sigmoid" else jax.nn.softmax(router_NE, -1)
    ranked_NE = (
        scores_NE + of_expert_E.astype(jnp.float32) if e.correction_bias and of_expert_E is not None else scores_NE
    )
    if e.groups > 1:
        # The best experts of a group give its score (arXiv:2412.19437, section 2.1.2).
        grouped = ranked_NE.reshape(-1, e.groups, e.count // e.groups)
        worth = jax.lax.top_k(grouped, min(e.best_of_group, grouped.shape[-1]))[0].sum(-1)
        best = jax.lax.top_k(worth, e.top_groups)[1]
        allowed = jax.nn.one_hot(best, e.groups, dtype=bool).any(1)
        ranked_NE = jnp.where(jnp.repeat(allowed, e.count // e.groups, axis=1), ranked_NE, -jnp.inf)
    expert_NP = jax.lax.top_k(ranked_NE, e.per_token)[1]
    weight_NP = jnp.take_along_axis(scores_NE, expert_NP, axis=1)
    if e.renormalise:
        weight_NP = weight_NP / (weight_NP.sum(-1, keepdims=True) + e.sum_eps)
    if e.beside and of_expert_E is not None:
        weight_NP = weight_NP * of_expert_E[expert_NP]
    return weight_NP * e.scale, expert_NP


def _mix_sparsely(router_NE: jax.Array, e: ExpertConfig) -> tuple[jax.Array, jax.Array]:
    """SparseMixer's choice without noise (arXiv:2409.12136, section 3): expert by expert the best of those that are
    left. Its weight is that of a softmax over those whose scores are near to it."""
    left_NE, found = router_NE, []
    for _ in range(e.per_token):
        best_N1 = left_NE.max(-1, keepdims=True)
        near_NE = (best_N1 - router_NE) / jnp.maximum(jnp.abs(router_NE), best_N1) <= e.margin
        gates_NE = jax.nn.softmax(jnp.where(near_NE, left_NE, -jnp.inf), -1)
        expert_N1 = left_NE.argmax(-1, keepdims=True)
        found.append((jnp.take_along_axis(gates_NE, expert_N1, axis=1), expert_N1))
        left_NE = jnp.where(jax.nn.one_hot(expert_N1[:, 0], e.count, dtype=bool), -jnp.inf, left_NE)
    weights, experts = zip(*found)
    return jnp.concatenate(weights, -1), jnp.concatenate(experts, -1).astype(jnp.int32)


def measure(router_NE: jax.Array, real_N: jax.Array, e: ExpertConfig) -> Load:
    """The load of one layer, without padding."""
    probability_NE = jax.nn.softmax(router_NE.astype(jnp.float32), -1) * real_N[:, None]
    best_NP = jax.lax.top_k(probability_NE, e.per_token)[1]
    weights = jnp.broadcast_to(real_N[:, None], best_NP.shape).astype(jnp.float32)
    chosen_E = jnp.bincount(best_NP.ravel(), weights.ravel(), length=e.count)
    return Load(chosen_E, probability_NE.sum(0), real_N.sum().astype(jnp.float32))


def balance_loss(load: Load) -> jax.Array:
    """The load-balancing loss, a float32 scalar; P when all experts have the same load.

    Equations 4 to 6 of arXiv:2101.03961, for the best P experts of a token and over all layers together, as in
    transformers.
    """
    tokens = jnp.maximum(load.tokens, 1.0)
    return load.chosen.size * jnp.sum(load.chosen / tokens * load.probability / tokens)


def mix(
    apply: Callable,
    x_ND: jax.Array,
    weight_NP: jax.Array,
    expert_NP: jax.Array,
    first: Any,
    count: int,
    *,
    scale_input: bool = False,
) -> jax.Array:
    """For each token, the weighted sum of the outputs of its experts among `first ... first + count - 1`: `[N, D]`.

    Args:
      apply: `apply(x [M, D], group_sizes [count]) -> [M, D]`; its rows after the last group are not used.
      scale_input: instead, the sum of their outputs for the weighted input.
    """
    local_M = expert_NP.ravel() - first
    mine_M = (local_M >= 0) & (local_M < count)
    local_M = jnp.where(mine_M, local_M, count)  # the pairs of other devices' experts come last
    order_M = jnp.argsort(local_M, stable=True)
    group_sizes_E = jnp.bincount(local_M, length=count).astype(jnp.int32)
    # Rows of no group are undefined in a ragged product and in its gradient, so they are masked on both sides.
    only_mine = lambda x_MD: jnp.where(mine_M[order_M, None], x_MD, 0)
    x_MD = x_ND[order_M // expert_NP.shape[1]]
    if scale_input:
        x_MD = x_MD * weight_NP.ravel()[order_M, None].astype(x_MD.dtype)
    y_MD = only_mine(apply(only_mine(x_MD), group_sizes_E))
    y_NPD = y_MD[jnp.argsort(order_M)].reshape(*expert_NP.shape, -1)
    if scale_input:
        return y_NPD.sum(1)
    return jnp.einsum("NPD,NP->ND", y_NPD, weight_NP.astype(y_NPD.dtype))


def mix_on_mesh(
    params: Any,
    x_BTD: jax.Array,
    router_BTE: jax.Array,
    of_expert_E: jax.Array | None,
    segment_ids_BT: jax.Array,
    key: jax.Array | None,
    *,
    config: DecoderConfig,
    mesh: Mesh,
) -> tuple[jax.Array, Load | None]:
    """`mix` of all experts, on every device for its own tokens, `[B, T, D]`; and the load of the experts.

    Args:
      params: of `Experts`, sharded. They are all-gathered over the axes along which tokens differ, so their gradients
        are reduce-scattered over these axes.
      key: of dropout.
    """
    e = expert_config(config)
    count = e.count // mesh.shape["expert"]
    specs = jax.tree_util.tree_map_with_path(partial(_specs, config=config, mesh=mesh), params, is_leaf=is_kernel)
    tokens = spec(("batch", "sequence", None), x_BTD.shape, mesh)
    split = mesh.shape["tensor"] > 1 and _width_axis(config) and e.intermediate_size % mesh.shape["tensor"] == 0

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs, tokens, tokens, P(), P(*tokens[:2]), P()),
        out_specs=(tokens, P()),
        check_vma=divides(tokens, mesh),  # otherwise devices repeat the same work, which shard_map cannot infer
    )
    def local(params, x_BTD, router_BTE, of_expert_E, segment_ids_BT, key):
        params = jax.tree.map(partial(_cast, dtype=x_BTD.dtype), params, is_leaf=is_kernel)
        # A device keeps its own experts along `expert`, and gathers every other dimension that is split along it.
        params = jax.tree.map(lambda x, where: gather(x, P(None, *where[1:])), params, specs)
        if key is not None:
            for axis in ("data", "fsdp", "expert", "context"):
                key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        rngs = None if key is None else {"dropout": key}
        apply = lambda x_MD, sizes_E: Experts(config, parent=None).apply({"params": params}, x_MD, sizes_E, rngs=rngs)
        x_ND = _flat(x_BTD)
        # The choice is inside the shard_map: outside, XLA would gather the whole batch for it.
        weight_NP, expert_NP = choose(_flat(router_BTE), of_expert_E, e)
        load = None
        if e.aux_coef:
            load = measure(_flat(router_BTE), segment_ids_BT.ravel() > 0, e)
            split_by = tuple(axis for entry in tokens for axis in named(entry))
            load = jax.tree.map(lambda x: jax.lax.psum(x, split_by), load) if split_by else load
        mixed = partial(mix, apply, scale_input=e.scale_input)
        if count == e.count:
            y_ND = mixed(x_ND, weight_NP, expert_NP, 0, count)
        else:
            x_ND, weight_NP, expert_NP = (
                jax.lax.all_gather(x, "expert", tiled=True) for x in (x_ND, weight_NP, expert_NP)
            )
            y_ND = mixed(x_ND, weight_NP, expert_NP, jax.lax.axis_index("expert") * count, count)
            y_ND = jax.lax.psum_scatter(y_ND, "expert", tiled=True)
        return (jax.lax.psum(y_ND, "tensor") if split else y_ND).reshape(x_BTD.shape), load

    return local(params, x_BTD, router_BTE, of_expert_E, segment_ids_BT, key)


def _flat(x_BTX: jax.Array) -> jax.Array:
    return x_BTX.reshape(-1, x_BTX.shape[-1])


def _width_axis(config: DecoderConfig) -> str | None:
    """The logical axis of the experts' width. Not split if one kernel has gate and up: a shard would have only one."""
    return "mlp" if config.mlp == "gated" and not expert_config(config).joined else None


def is_kernel(x: Any) -> bool:
    return isinstance(x, Kernel)


def _specs(path: Any, leaf: Any, *, config: DecoderConfig, mesh: Mesh) -> Any:
    """The partition of a kernel or bias of `Experts`, or of every array of a node. Axis 0 is the experts."""
    wide = _width_axis(config)
    axes = (wide, "embed") if path[0].key == "down_proj" else ("embed", wide)
    if path[1].key == "bias":
        return spec(("experts", axes[1]), leaf.shape, mesh)
    if not is_kernel(leaf):
        return spec(("experts", *axes), leaf.shape, mesh)

    def of(x: Any, names: tuple[str | None, ...]) -> P:
        # Small arrays are replicated: they are not worth a collective of their own.
        names = tuple(name if name in ("experts", wide) else None for name in names) if x.size < SMALL else names
        return spec(names, x.shape, mesh)

    return jax.tree.map(of, leaf, leaf.lies(("experts", *axes)))


def _cast(kernel: Any, dtype: Any) -> Any:
    """Cast a plain kernel to the dtype of its use before it is gathered; nodes cast themselves."""
    return kernel if is_kernel(kernel) else kernel.astype(dtype)
