"""One layer of the decoder: attention, the delta rule or a convolution; an MLP or experts; the norms between them.

Shape suffixes: B batch, T tokens, D embed, H query heads, K key/value heads, R rank of a latent vector.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jtune.models import cache as caches
from jtune.models.attention import chunks
from jtune.models.attention.cached import attend_cached
from jtune.models.attention.dispatch import attend
from jtune.models.attention.reference import alibi_bias
from jtune.models.cache import LayerCache
from jtune.models.config import DecoderConfig, Indexer, Layer, QueryScale
from jtune.models.convolution import ShortConv
from jtune.models.delta import GatedDelta, delta_config
from jtune.models.kernels import Linear, parameter
from jtune.models.kimi_delta import KimiDelta
from jtune.models.mlp import ACTIVATIONS, MLP
from jtune.models.moe import Load, MoE
from jtune.models.norm import Norm, norm
from jtune.models.rope import rotate
from jtune.sharding import constrain

# The name by which a remat policy can keep the input of a layer.
LAYER_INPUT = "layer_input"

LATENT_EPS = 1e-6  # of the norms inside latent attention; the config sets that of the other norms only


class Shared(NamedTuple):
    """The inputs that all layers share."""

    turns: tuple[Any, ...]  # for each of DecoderConfig.ropes: (cos, sin), float32 [B, T, 1, frequencies]
    positions: jax.Array  # int32 [B, T]
    segment_ids: jax.Array  # int32 [B, T]
    # Keys and values of earlier layers, for those that reuse them: by whether they have a window.
    kept: Mapping[bool, tuple[jax.Array, jax.Array]] = MappingProxyType({})


class Output(NamedTuple):
    """What a layer gives."""

    x: jax.Array  # [B, T, D]
    entry: caches.Entry | None  # the cache with the new tokens
    load: Load | None  # of the experts
    kept: tuple[jax.Array, jax.Array] | None  # keys and values, if later layers reuse them


class Attention(nn.Module):
    config: DecoderConfig
    layer: Layer
    backend: str
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, shared: Shared, layer_cache: LayerCache | None = None):
        """The output of attention, `[batch, seq, embed]`; the cache with the new tokens; keys and values to keep."""
        c = self.config
        reused = shared.kept[self.layer.window is not None] if self.layer.keys_values == "reused" else None
        q_BTHD, new, gate = (self._latent if c.latent else self._plain)(x_BTD, shared)
        if self.layer.query_scale is not None:
            q_BTHD = grown(q_BTHD, shared.positions, self.layer.query_scale)
        fixed: dict[str, Any] = {
            "scale": (self.layer.head_dim or c.qk_dim) ** -0.5 if c.attention_scale is None else c.attention_scale,
            "window": self.layer.window,
            "softcap": c.attention_softcap,
        }
        if c.sinks:
            sinks = parameter(self, "sinks", nn.initializers.zeros, (c.num_attention_heads,), ("heads",))
            fixed["sinks_H"] = sinks
        bias = lambda positions: (
            None if c.alibi is None else alibi_bias(positions, c.num_attention_heads, c.alibi, c.alibi_dtype)
        )

        entry, chunk = None, self.layer.window if self.layer.chunked else None
        if layer_cache is not None and reused is not None:
            entry = layer_cache.entry
        elif layer_cache is not None:
            entry = caches.write(layer_cache.entry, layer_cache.index, new, shared.positions, shared.segment_ids)
        if layer_cache is not None and entry is not None and x_BTD.shape[1] == 1:
            cached = {name: x[layer_cache.index].astype(x_BTD.dtype) for name, x in entry.items()}
            k_BSKD, v_BSKD = keys_values = reused or self._keys_values(cached)
            at_BS = caches.key_positions(k_BSKD.shape[1], shared.positions)
            if chunk is not None:
                at_BS = chunks.empty_slots_before(shared.positions, at_BS, chunk)
            out = attend_cached(q_BTHD, k_BSKD, v_BSKD, shared.positions, at_BS, bias_BHS=bias(at_BS), **fixed)
        else:  # no earlier tokens
            k_BTKD, v_BTKD = keys_values = reused or self._keys_values(new)
            place = lambda x, axis: constrain(x, self.mesh, "batch", "sequence", axis, None)
            segment_ids = shared.segment_ids
            if chunk is not None:
                segment_ids = chunks.cut_segments(segment_ids, shared.positions, chunk)
            out = attend(
                place(q_BTHD, "heads"),
                place(k_BTKD, "kv_heads"),
                place(v_BTKD, "kv_heads"),
                segment_ids,
                bias_BHS=bias(shared.positions),
                backend=self.backend,
                mesh=self.mesh,
                **fixed,
            )
            out = place(out, "heads")
        joined = out.reshape(*x_BTD.shape[:-1], -1)
        if gate is not None:
            joined = joined * jax.nn.sigmoid(gate)
        out = Linear(c.hidden_size, ("heads", "embed"), use_bias=c.o_bias, name="o_proj")(joined)
        return out, entry, keys_values if self.layer.keys_values == "stored" else None

    def _turn(self, x_BTHD: jax.Array, shared: Shared) -> jax.Array:
        if self.layer.rope is None:
            return x_BTHD
        cos_BT1F, sin_BT1F = shared.turns[self.layer.rope]
        return rotate(x_BTHD, cos_BT1F, sin_BT1F, self.config.ropes[self.layer.rope].interleaved)

    def _plain(self, x_BTD: jax.Array, shared: Shared) -> tuple[jax.Array, caches.Entry, jax.Array | None]:
        """Queries `[batch, seq, heads, head_dim]`; keys and values for the cache; the gate of the output, `[batch, seq,
        heads * head_dim]`, if there is one."""
        c = self.config
        H, (K, D) = c.num_attention_heads, c.heads_of(self.layer)
        linear = lambda n, axis, name: Linear(n * D, ("embed", axis), use_bias=c.qkv_bias, name=name)(x_BTD)
        split = lambda x, n: x.reshape(*x.shape[:-1], n, D)
        gate = Linear(H * D, ("embed", "heads"), name="gate_proj")(x_BTD) if c.attention_gate_proj else None
        if self.layer.keys_values == "reused":
            q = Norm(c.norm, c.norm_eps, offset=c.norm_offset, name="q_norm")(split(linear(H, "heads", "q_proj"), H))
            return self._turn(q, shared), {}, gate
        if c.attention_gate:  # for each head the query, then the gate
            both = linear(2 * H, "heads", "q_proj").reshape(*x_BTD.shape[:-1], H, 2 * D)
            q, gate = (x.reshape(*x_BTD.shape[:-1], -1) for x in jnp.split(both, 2, axis=-1))
            k, v = linear(K, "kv_heads", "k_proj"), linear(K, "kv_heads", "v_proj")
        elif self.layer.value_is_key:
            q, k = linear(H, "heads", "q_proj"), linear(K, "kv_heads", "k_proj")
            v = k
        elif c.qkv == "separate":
            q, k, v = linear(H, "heads", "q_proj"), linear(K, "kv_heads", "k_proj"), linear(K, "kv_heads", "v_proj")
        else:
            joined = linear(H + 2 * K, "heads", "qkv_proj")
            if c.qkv == "joined":
                q, k, v = jnp.split(joined, [H * D, (H + K) * D], axis=-1)
            else:  # the queries of a key head, then the key, then the value
                groups = joined.reshape(*joined.shape[:-1], K, H // K + 2, D)
                q, k, v = groups[..., :-2, :], groups[..., -2, :], groups[..., -1, :]
                q, k, v = (x.reshape(*x_BTD.shape[:-1], -1) for x in (q, k, v))
        of_heads = c.qk_norm == "heads"
        kind = partial(Norm, c.norm, c.norm_eps, c.norm_scale, offset=c.norm_offset, heads=of_heads)
        if c.qk_norm == "all":
            q, k = kind(name="q_norm")(q), kind(name="k_norm")(k)
        if c.clip_qkv is not None:
            q, k, v = (jnp.clip(x, -c.clip_qkv, c.clip_qkv) for x in (q, k, v))
        q, k, v = split(q, H), split(k, K), split(v, K)
        normed = c.qk_norm in ("head", "heads")
        if normed and not c.qk_norm_after_rope:
            q, k = kind(name="q_norm")(q), kind(name="k_norm")(k)
        q, k = self._turn(q, shared), self._turn(k, shared)
        if normed and c.qk_norm_after_rope:
            q, k = kind(name="q_norm")(q), kind(name="k_norm")(k)
        if c.qk_norm == "rotated" and self.layer.rope is not None:
            q, k = (Norm(c.norm, c.norm_eps, use_scale=False)(x) for x in (q, k))
        if c.value_norm:
            v = Norm(c.norm, c.norm_eps, use_scale=False)(v)
        return q, {"k": k, "v": v}, gate

    def _latent(self, x_BTD: jax.Array, shared: Shared) -> tuple[jax.Array, caches.Entry, None]:
        c, latent = self.config, self.config.latent
        assert latent is not None
        if latent.indexer is not None:
            caches.check_length(x_BTD.shape[1], c)
            IndexerParameters(latent.indexer, c.hidden_size, latent.q_rank or 0, name="indexer")()
        down = lambda n, name: Linear(n, ("embed", None), use_bias=c.qkv_bias, name=name)(x_BTD)
        width, inner = c.num_attention_heads * c.qk_dim, lambda name: Norm("rms", LATENT_EPS, name=name)
        if latent.q_rank is None:
            q = Linear(width, ("embed", "heads"), name="q_proj")(x_BTD)
        else:
            q_BTR = inner("q_a_layernorm")(down(latent.q_rank, "q_a_proj"))
            q = Linear(width, ("embed", "heads"), name="q_b_proj")(q_BTR)
        q_nope, q_rope = jnp.split(q.reshape(*q.shape[:-1], -1, c.qk_dim), [latent.nope_dim], axis=-1)
        kv, rope_key = jnp.split(
            down(latent.kv_rank + latent.rope_dim, "kv_a_proj_with_mqa"), [latent.kv_rank], axis=-1
        )
        rope_key = self._turn(rope_key[:, :, None, :], shared)[:, :, 0, :]
        q_BTHD = jnp.concatenate([q_nope, self._turn(q_rope, shared)], axis=-1)
        return q_BTHD, {"latent": inner("kv_a_layernorm")(kv), "rope_key": rope_key}, None

    def _keys_values(self, entry: caches.Entry) -> tuple[jax.Array, jax.Array]:
        """Keys and values of all heads, from the entry of a cache."""
        c = self.config
        if c.latent is None:
            return entry["k"], entry["v"]
        width = c.num_attention_heads * (c.latent.nope_dim + c.latent.value_dim)
        both = Linear(width, ("embed", "heads"), name="kv_b_proj")(entry["latent"])
        both = both.reshape(*both.shape[:-1], c.num_attention_heads, -1)
        k_nope, v = jnp.split(both, [c.latent.nope_dim], axis=-1)
        rope_key = jnp.broadcast_to(entry["rope_key"][:, :, None, :], (*k_nope.shape[:-1], c.latent.rope_dim))
        return jnp.concatenate([k_nope, rope_key], axis=-1), v


def grown(q_BTHD: jax.Array, positions_BT: jax.Array, s: QueryScale) -> jax.Array:
    """Queries times their factor (`QueryScale`), which is float32, in the dtype of `q`."""
    factor_BT = 1 + s.beta * jnp.log1p(((positions_BT + s.offset) // s.length).astype(jnp.float32))
    return (q_BTHD * factor_BT[:, :, None, None]).astype(q_BTHD.dtype)


class IndexerParameters(nn.Module):
    """The parameters of an indexer, which are read and written, and nothing else (`jtune.models.config.Indexer`)."""

    indexer: Indexer
    hidden_size: int
    q_rank: int

    @nn.compact
    def __call__(self) -> None:
        heads, width = self.indexer.heads, self.indexer.head_dim
        only = lambda size: jnp.zeros((0, size))  # no rows
        Linear(heads * width, (None, None), name="wq_b")(only(self.q_rank))
        Linear(width, ("embed", None), name="wk")(only(self.hidden_size))
        Norm("layer", LATENT_EPS, use_bias=True, name="k_norm")(only(width))
        Linear(heads, ("embed", None), name="weights_proj")(only(self.hidden_size))


class DecoderLayer(nn.Module):
    config: DecoderConfig
    layer: Layer = Layer()
    backend: str = "xla"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        shared: Shared,
        layer_cache: LayerCache | None = None,
        own_BTP: jax.Array | None = None,
    ) -> Output:
        """The next hidden state, and what comes with it.

        Args:
          own_BTP: the inputs of this layer alone (`DecoderConfig.per_layer_inputs`).
        """
        c = self.config
        named = partial(norm, c)
        constrained = lambda x: constrain(x, self.mesh, "batch", "sequence", None)
        add = lambda x, y: constrained(x + (y if c.residual_multiplier == 1.0 else y * c.residual_multiplier))

        def attention(x, shared, layer_cache):
            if self.layer.linear:
                kind = KimiDelta if delta_config(c).channels else GatedDelta
                return *kind(c, self.mesh, name="linear_attn")(x, shared.segment_ids, layer_cache), None
            if self.layer.conv:
                return *ShortConv(c, self.mesh, name="conv")(x, shared.segment_ids, layer_cache), None
            return Attention(c, self.layer, self.backend, self.mesh, name="self_attn")(x, shared, layer_cache)

        def feed_forward(x):
            if self.layer.sparse:
                return MoE(c, self.mesh, name="mlp")(x, shared.segment_ids)
            return MLP(c, self.mesh, self.layer.intermediate_size, name="mlp")(x), None

        x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
        if c.block in ("parallel", "parallel_two"):
            normed = named("input_layernorm")(x_BTD)
            y, entry, kept = attention(normed, shared, layer_cache)
            if c.block == "parallel_two":
                normed = named("post_attention_layernorm")(x_BTD)
            z, load = feed_forward(normed)
            return Output(add(x_BTD, y + z), entry, load, kept)

        before, after = c.block in ("before", "around"), c.block in ("around", "after")
        y, entry, kept = attention(named("input_layernorm")(x_BTD) if before else x_BTD, shared, layer_cache)
        x_BTD = add(x_BTD, named("post_attention_layernorm")(y) if after else y)
        name = "pre_feedforward_layernorm" if after else "post_attention_layernorm"
        if c.experts is not None and c.experts.beside and self.layer.sparse:
            y = MLP(c, self.mesh, name="mlp")(named("pre_feedforward_layernorm")(x_BTD))
            y = named("post_feedforward_layernorm_1")(y)
            moe = MoE(c, self.mesh, name="moe")
            z, load = moe(named("pre_feedforward_layernorm_2")(x_BTD), shared.segment_ids, routed_BTD=x_BTD)
            y += named("post_feedforward_layernorm_2")(z)
        else:
            y, load = feed_forward(named(name)(x_BTD) if before else x_BTD)
        x_BTD = add(x_BTD, named("post_feedforward_layernorm")(y) if after else y)
        if own_BTP is not None:
            gate_BTP = Linear(c.per_layer_inputs, ("embed", None), name="per_layer_input_gate")(x_BTD)
            y = Linear(c.hidden_size, (None, "embed"), name="per_layer_projection")(
                ACTIVATIONS[c.hidden_act](gate_BTP) * own_BTP
            )
            x_BTD = add(x_BTD, named("post_per_layer_input_norm")(y))
        if c.layer_scalar:
            x_BTD *= parameter(self, "layer_scalar", nn.initializers.ones, (1,), (None,)).astype(x_BTD.dtype)
        return Output(x_BTD, entry, load, kept)
