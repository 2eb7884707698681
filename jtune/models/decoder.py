"""The decoder: one causal language model for all families, told by a `DecoderConfig` what it is.

Shape suffixes: B batch, T tokens, D embed, H query heads, K key/value heads, V vocab.
"""

from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jtune.models.attention import RESIDUALS as ATTENTION_RESIDUALS
from jtune.models.attention import attend
from jtune.models.config import DecoderConfig
from jtune.models.kernels import Linear, matmul, parameter
from jtune.models.moe import MoE
from jtune.models.rope import cos_sin, rotate
from jtune.sharding import constrain, spec

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
# Names of what a remat policy may keep.
ATTENDED, LAYER_INPUT = "attended", "layer_input"
REMAT = ("none", "dots", "attention", "full", "offload")


class RMSNorm(nn.Module):
    """x / rms(x) * scale, the mean of squares in float32 (arXiv:1910.07467)."""

    eps: float
    offset: bool = False  # multiply by 1 + scale, in float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = parameter(self, "scale", init, x.shape[-1:], (None,))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class Attention(nn.Module):
    config: DecoderConfig
    window: int | None
    backend: str
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, cos_sin_BT1F, segment_ids_BT: jax.Array) -> jax.Array:
        c = self.config
        heads = lambda x, n: x.reshape(*x.shape[:-1], n, c.head_dim)
        linear = lambda n, axis, name: Linear(n * c.head_dim, ("embed", axis), use_bias=c.qkv_bias, name=name)
        q_BTHD = heads(linear(c.num_attention_heads, "heads", "q_proj")(x_BTD), c.num_attention_heads)
        k_BTKD = heads(linear(c.num_key_value_heads, "kv_heads", "k_proj")(x_BTD), c.num_key_value_heads)
        v_BTKD = heads(linear(c.num_key_value_heads, "kv_heads", "v_proj")(x_BTD), c.num_key_value_heads)
        if c.qk_norm:
            q_BTHD = RMSNorm(c.rms_norm_eps, name="q_norm")(q_BTHD)
            k_BTKD = RMSNorm(c.rms_norm_eps, name="k_norm")(k_BTKD)
        place = lambda x, axis: constrain(x, self.mesh, "batch", "sequence", axis, None)
        out_BTHD = attend(
            place(rotate(q_BTHD, *cos_sin_BT1F), "heads"),
            place(rotate(k_BTKD, *cos_sin_BT1F), "kv_heads"),
            place(v_BTKD, "kv_heads"),
            segment_ids_BT,
            scale=c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
            window=self.window,
            softcap=c.attention_softcap,
            backend=self.backend,
            mesh=self.mesh,
        )
        joined = checkpoint_name(place(out_BTHD, "heads").reshape(*x_BTD.shape[:-1], -1), ATTENDED)
        return Linear(c.hidden_size, ("heads", "embed"), use_bias=c.o_bias, name="o_proj")(joined)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (arXiv:2002.05202)."""

    config: DecoderConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, act) -> jax.Array:
        c = self.config
        up = lambda name: Linear(c.intermediate_size, ("embed", "mlp"), use_bias=c.mlp_bias, name=name)(x_BTD)
        hidden = constrain(act(up("gate_proj")) * up("up_proj"), self.mesh, "batch", "sequence", "mlp")
        return Linear(c.hidden_size, ("mlp", "embed"), use_bias=c.mlp_bias, name="down_proj")(hidden)


class DecoderLayer(nn.Module):
    config: DecoderConfig
    window: int | None = None
    backend: str = "xla"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, cos_sin_BT1F, segment_ids_BT: jax.Array) -> jax.Array:
        c = self.config
        norm = lambda name: RMSNorm(c.rms_norm_eps, c.norm_offset, name=name)
        act = ACTIVATIONS[c.hidden_act]

        x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
        y = Attention(c, self.window, self.backend, self.mesh, name="self_attn")(
            norm("input_layernorm")(x_BTD), cos_sin_BT1F, segment_ids_BT
        )
        x_BTD = x_BTD + (norm("post_attention_layernorm")(y) if c.sandwich_norms else y)
        x_BTD = constrain(x_BTD, self.mesh, "batch", "sequence", None)

        before_mlp = "pre_feedforward_layernorm" if c.sandwich_norms else "post_attention_layernorm"
        mlp = (MoE if c.num_experts else MLP)(c, self.mesh, name="mlp")
        y = mlp(norm(before_mlp)(x_BTD), act)
        x_BTD = x_BTD + (norm("post_feedforward_layernorm")(y) if c.sandwich_norms else y)
        return constrain(x_BTD, self.mesh, "batch", "sequence", None)


class CausalLM(nn.Module):
    """A causal language model.

    >>> config = DecoderConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    ...                        num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    >>> params = init_params(config, jax.random.key(0))
    >>> CausalLM(config).apply({"params": params}, jnp.zeros((1, 8), jnp.int32)).shape
    (1, 8, 256)

    Attributes:
      dtype: of activations and matrix products. Norms, softmax and logits are float32.
      remat: what the backward pass computes again: "none"; "dots", all but the products with parameters; "attention",
        all but what attention gives; "full", all but the input of each layer; "offload", the same, and those inputs
        wait in the memory of the host.
      attention: the backend of `jtune.models.attention.attend`.
      mesh: where activations are said to lie (`jtune.sharding.RULES`); None: nothing is said, as suits one device.
      unrolled: compile the layers one after the other instead of a loop over them. The code then grows with depth, but
        nothing is copied into and out of stacks of what the backward pass needs, which takes a fifth of a step on CPUs.

    `params["layers"]` is a stack of layers (leaves `[layers, ...]`), or a tuple of such stacks, in order. Dropout, of
    kernels that have it, happens when `apply` gets `rngs={"dropout": key}`.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    mesh: Mesh | None = None
    unrolled: bool = False

    @property
    def head_keys(self) -> tuple[str, str]:
        """The subtrees of the parameters that `head` needs."""
        return ("norm", "embed_tokens" if self.config.tie_word_embeddings else "lm_head")

    def setup(self):
        c = self.config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, self.mesh)
        self.norm = RMSNorm(c.rms_norm_eps, c.norm_offset)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.vocab_size, ("embed", "vocab"))

    def __call__(
        self, input_ids: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Logits float32 `[batch, seq, vocab]` of int32 `[batch, seq]`.

        Args:
          positions: int32 `[batch, seq]`; default 0, 1, 2 ... in each row.
          segment_ids: int32 `[batch, seq]`; tokens see only their own segment. Default: a row is one segment.
        """
        return self.head(self.hidden(input_ids, positions, segment_ids))

    @nn.compact
    def hidden(
        self, input_ids: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """What the last layer gives, before the final norm: `[batch, seq, embed]` in `dtype`."""
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(input_ids)
        if self.has_variable("params", "layers"):
            layers = self.get_variable("params", "layers")
        else:
            layers = self.param("layers", partial(_init_layers, c))

        x = constrain(self.embed_tokens(input_ids, self.dtype), self.mesh, "batch", "sequence", None)
        if c.scale_embeddings:
            x = x * jnp.asarray(c.hidden_size**0.5, x.dtype)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        stacks = layers if isinstance(layers, tuple) else (layers,)
        shared = (cos_sin(c.rope, c.head_dim, positions), segment_ids)
        first = 0
        for stack in stacks:
            count = jax.tree.leaves(stack)[0].shape[0]
            for start, period, repeats in periods(c.windows[first : first + count]):
                part = jax.tree.map(itemgetter(slice(start, start + period * repeats)), stack)
                x = self._scan(x, part, first + start, period, key, shared)
            first += count
        if first != c.num_hidden_layers:
            raise ValueError(f"params hold {first} layers, the config says {c.num_hidden_layers}")
        return x

    def _scan(self, x: jax.Array, stack, first: int, period: int, key, shared) -> jax.Array:
        """Run `stack` over `x`, `period` layers in each turn of the loop: compiled code does not grow with depth."""
        c = self.config

        def turn(x: Any, turn_and_params: Any) -> Any:
            index, params = turn_and_params
            for i in range(period):
                layer = DecoderLayer(c, c.windows[first + i], self.attention, self.mesh, parent=None)
                rngs = None if key is None else {"dropout": jax.random.fold_in(key, first + index * period + i)}
                mine = jax.tree.map(itemgetter(i), params)
                x = layer.apply({"params": mine}, x, *shared, rngs=rngs)
            return x, None

        grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), stack)
        turns = jnp.arange(jax.tree.leaves(grouped)[0].shape[0])
        turn = _rematerialised(turn, self.remat, prevent_cse=self.unrolled)
        return jax.lax.scan(turn, x, (turns, grouped), unroll=self.unrolled or 1)[0]

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 `[..., vocab]` of `[..., embed]`: the final norm, the head, the soft-cap."""
        x = self.norm(hidden)
        logits = self.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        logits = logits.astype(jnp.float32)
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * jnp.tanh(logits / self.config.logit_softcap)
        return logits


class Embedding(nn.Module):
    """A table `[vocab, embed]`, looked up at the bottom and, when tied, multiplied with at the top."""

    vocab: int
    features: int
    mesh: Mesh | None = None

    def setup(self):
        shape, axes = (self.vocab, self.features), ("vocab", "embed")
        self.embedding = parameter(self, "embedding", nn.initializers.normal(0.02), shape, axes)

    def __call__(self, input_ids: jax.Array, dtype: Any) -> jax.Array:
        return look_up(self.embedding, input_ids, dtype, self.mesh)

    def attend(self, x: jax.Array) -> jax.Array:
        return matmul(x, self.embedding.astype(x.dtype).T)


def look_up(table_VD: jax.Array, ids_BT: jax.Array, dtype: Any, mesh: Mesh | None) -> jax.Array:
    """The rows of the table that `ids` name, `[batch, seq, embed]` in `dtype`.

    On a mesh the table stays where it is: a device looks up its columns for all devices that have other ones, and they
    exchange them, which costs as much as moving the result once. So does the gradient, on its way back.
    """
    if mesh is None or mesh.size == 1:
        return jnp.take(table_VD, ids_BT, axis=0).astype(dtype)
    lies = spec(("vocab", "embed"), table_VD.shape, mesh)
    rows, columns = lies
    tokens = spec(("batch", "sequence"), ids_BT.shape, mesh)

    @partial(jax.shard_map, mesh=mesh, in_specs=(lies, tokens), out_specs=P(*tokens, None))
    def local(table_VD, ids_BT):
        ids_ZBT = ids_BT[None] if columns is None else jax.lax.all_gather(ids_BT, columns)
        if rows is None:
            x_ZBTD = jnp.take(table_VD, ids_ZBT, axis=0).astype(dtype)
        else:
            ids_ZBT -= jax.lax.axis_index(rows) * table_VD.shape[0]
            mine_ZBT = (ids_ZBT >= 0) & (ids_ZBT < table_VD.shape[0])
            x_ZBTD = jnp.take(table_VD, jnp.where(mine_ZBT, ids_ZBT, 0), axis=0).astype(dtype)
            x_ZBTD = jnp.where(mine_ZBT[..., None], x_ZBTD, 0)
        if columns is not None:
            x_ZBTD = jax.lax.all_to_all(x_ZBTD, columns, split_axis=0, concat_axis=3, tiled=True)
        return x_ZBTD[0] if rows is None else jax.lax.psum(x_ZBTD[0], rows)

    return local(table_VD, ids_BT)


def periods(kinds: Sequence[Any], longest: int = 8) -> list[tuple[int, int, int]]:
    """Cut a sequence of kinds of layers into repeated patterns: (start, period, repeats), in order.

    >>> periods("aaaa"), periods("ababa"), periods("aabbb")
    ([(0, 1, 4)], [(0, 2, 2), (4, 1, 1)], [(0, 1, 2), (2, 1, 3)])
    """
    found, start = [], 0
    while start < len(kinds):
        best = (1, 1)
        for period in range(1, longest + 1):
            pattern, repeats = kinds[start : start + period], 1
            while len(pattern) == period and kinds[start + repeats * period :][:period] == pattern:
                repeats += 1
            # A pattern that is not repeated is no pattern; of equal coverage the shortest wins.
            if repeats > 1 and period * repeats > best[0] * best[1]:
                best = (period, repeats)
        found.append((start, *best))
        start += best[0] * best[1]
    return found


def _rematerialised(turn, remat: str, *, prevent_cse: bool):
    # Inside a loop there is nothing for common-subexpression elimination to undo, and preventing it costs fusions.
    if remat == "none":
        return turn
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r}: expected one of {', '.join(REMAT)}")
    policies = jax.checkpoint_policies
    policy = {
        "dots": policies.dots_with_no_batch_dims_saveable,
        "attention": policies.save_only_these_names(ATTENDED, ATTENTION_RESIDUALS),
        "full": None,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return jax.checkpoint(turn, policy=policy, prevent_cse=prevent_cse)


def _init_layers(config: DecoderConfig, key: jax.Array):
    """All layers, initialised and stacked; every leaf gets the logical axis `layers` in front."""
    x = jnp.zeros((1, 1, config.hidden_size))
    shared = (cos_sin(config.rope, config.head_dim, jnp.zeros((1, 1), jnp.int32)), jnp.ones((1, 1), jnp.int32))
    init = lambda key: DecoderLayer(config, parent=None).init(key, x, *shared)["params"]
    stacked = jax.vmap(init)(jax.random.split(key, config.num_hidden_layers))
    return jax.tree.map(
        lambda box: box.replace(names=("layers", *box.names)), stacked, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )


def _boxed(config: DecoderConfig, key: jax.Array):
    return CausalLM(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_params(config: DecoderConfig, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters: kernels and embeddings normal(0.02), norms one."""
    return jax.tree.map(lambda x: x.astype(dtype), nn.unbox(_boxed(config, key)))


def abstract_params(config: DecoderConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree as `ShapeDtypeStruct`s; nothing is computed."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))


def logical_axes(config: DecoderConfig) -> dict[str, Any]:
    """The parameter tree with the names of each leaf's axes (see `jtune.sharding.RULES`) in its place."""
    boxed = jax.eval_shape(lambda: _boxed(config, jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
