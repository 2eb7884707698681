"""The decoder: one causal language model for all families, described by a `DecoderConfig`.

Shape suffixes: B batch, T tokens, D embed, V vocab.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jtune.models import cache as caches
from jtune.models.attention.reference import RESIDUALS as ATTENTION_RESIDUALS
from jtune.models.cache import LayerCache
from jtune.models.config import DecoderConfig, Layer
from jtune.models.embedding import Embedding
from jtune.models.kernels import Linear
from jtune.models.layer import LAYER_INPUT, DecoderLayer, Shared
from jtune.models.moe import Load
from jtune.models.norm import Norm, norm
from jtune.models.rope import cos_sin
from jtune.sharding import constrain

REMAT = ("none", "dots", "attention", "full", "offload")

# Multiply-adds that take at most as long as reading one number of a product's output, on every chip today.
THIN = 256


class Loop(NamedTuple):
    """Layers that run in one loop."""

    stack: int  # the index of the stack of parameters
    start: int  # the index of the first layer in the stack
    first: int  # the number of that layer in the model
    period: int  # layers per iteration, which may differ among themselves
    repeats: int


Cache = tuple[tuple[caches.Entry, ...], ...]  # for each loop, for each layer of its period


class Hidden(NamedTuple):
    """The output of the layers."""

    x: jax.Array  # [batch, seq, embed] in the dtype of the computation
    cache: Cache | None  # with the new tokens in it
    load: Load | None  # of the experts, if the config asks for a loss on it


class CausalLM(nn.Module):
    """A causal language model.

    >>> config = DecoderConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    ...                        num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    >>> params = init_params(config, jax.random.key(0))
    >>> CausalLM(config).apply({"params": params}, jnp.zeros((1, 8), jnp.int32)).shape
    (1, 8, 256)

    Attributes:
      dtype: of activations and matrix products. Norms, softmax and logits are float32.
      remat: what the backward pass recomputes: "none"; "dots": all but the products with parameters (it recomputes the
        thin products of adapters); "attention": all but the output of attention; "full": all but the input of each
        layer; "offload": the same, with these inputs in host memory.
      attention: the backend of `jtune.models.attention.dispatch.attend`.
      mesh: activations are constrained to it (`jtune.sharding.RULES`); None: one device, no constraints.
      unrolled: compile the layers one after the other, without a loop. The program then grows with depth, but no
        residual is copied into or out of a stack; these copies take a fifth of a step.

    `params["layers"]` is a stack of layers (leaves `[layers, ...]`), or a tuple of such stacks, in order. A leaf may
    also be a list with an array for each layer; then the layers are unrolled. Kernels with dropout apply it when
    `apply` gets `rngs={"dropout": key}`.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    mesh: Mesh | None = None
    unrolled: bool = False

    @property
    def head_keys(self) -> tuple[str, ...]:
        """The subtrees of the parameters that `head` needs."""
        table = "embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return ("norm", table) if self.config.norm_scale else (table,)

    def setup(self):
        c = self.config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, self.mesh)
        if c.learned_positions:
            self.embed_positions = Embedding(c.learned_positions, c.hidden_size, self.mesh)
        if c.embedding_norm:
            self.embed_norm = norm(c)
        if c.per_layer_inputs:
            width = c.num_hidden_layers * c.per_layer_inputs
            self.embed_tokens_per_layer = Embedding(c.per_layer_vocab_size, width, self.mesh)
            self.per_layer_model_projection = Linear(width, ("embed", None))
            self.per_layer_projection_norm = Norm(c.norm, c.norm_eps, offset=c.norm_offset)
        self.norm = norm(c)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.vocab_size, ("embed", "vocab"), use_bias=c.head_bias)

    def __call__(
        self, input_ids: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Logits float32 `[batch, seq, vocab]` of int32 `[batch, seq]`.

        Args:
          positions: int32 `[batch, seq]`; default 0, 1, 2 ... in each row.
          segment_ids: int32 `[batch, seq]`; tokens see only their own segment. Default: a row is one segment.
        """
        return self.head(self.hidden(input_ids, positions, segment_ids).x)

    @nn.compact
    def hidden(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        embedding_noise: jax.Array | None = None,
    ) -> Hidden:
        """The output of the last layer, before the final norm.

        Args:
          cache: see `init_cache`. With an empty cache, the input is a whole prompt, in which tokens of segment 0 are
            padding; otherwise the input is the next token of each row.
          embedding_noise: `[batch, seq, embed]`, added to the rows of the table before anything else.
        """
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(input_ids)
        if self.has_variable("params", "layers"):
            layers = self.get_variable("params", "layers")
        else:
            layers = self.param("layers", partial(_init_layers, c))

        x = self.embed_tokens(input_ids, self.dtype)
        if embedding_noise is not None:
            x = x + embedding_noise
        if c.embedding_multiplier != 1.0:
            x = x * jnp.asarray(c.embedding_multiplier, x.dtype)
        if c.learned_positions:
            x = x + self.embed_positions(positions, self.dtype)
        if c.embedding_norm:
            x = self.embed_norm(x)
        x = constrain(x, self.mesh, "batch", "sequence", None)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        turns = tuple(cos_sin(rope, c.rope_dim, positions, segment_ids) for rope in c.ropes)
        shared = Shared(turns, positions, segment_ids)
        own = self._per_layer_inputs(input_ids, x) if c.per_layer_inputs else None
        load, written = _no_load(c), []
        for i, loop in enumerate(loops(c, layers)):
            cut = slice(loop.start, loop.start + loop.period * loop.repeats)
            params = jax.tree.map(itemgetter(cut), stacks(layers)[loop.stack], is_leaf=is_unstacked)
            last = loop.first + loop.period * loop.repeats
            inputs = params, None if own is None else own[loop.first : last]
            carry = x, None if cache is None else cache[i], load
            (x, entries, load), kept = self._scan(carry, loop, inputs, key, shared)
            shared = shared._replace(kept={**shared.kept, **kept})
            written.append(entries)
        return Hidden(x, None if cache is None else tuple(written), load)

    def _per_layer_inputs(self, input_ids: jax.Array, x: jax.Array) -> jax.Array:
        """What each layer gets besides its input, `[layers, batch, seq, per_layer_inputs]`: of the token, and of its
        embedding `x`."""
        c = self.config
        split = lambda y: y.reshape(*y.shape[:-1], c.num_hidden_layers, c.per_layer_inputs)
        of_token = split(self.embed_tokens_per_layer(input_ids, self.dtype)) * jnp.asarray(
            c.per_layer_inputs**0.5, self.dtype
        )
        of_embedding = split(self.per_layer_model_projection(x) * jnp.asarray(c.hidden_size**-0.5, self.dtype))
        both = (self.per_layer_projection_norm(of_embedding) + of_token) * jnp.asarray(0.5**0.5, self.dtype)
        return jnp.moveaxis(both, -2, 0)

    def _scan(self, carry: Any, loop: Loop, inputs, key, shared: Shared):
        """Run layers: unrolled, or in a loop with one period of layers per iteration.

        Args:
          carry: the input, the cache of these layers or None, the load of the experts or None.
          inputs: the parameters of the layers, and their own inputs `[layers, batch, seq, ...]` or None.

        Returns:
          What the layers carry on, and the keys and values that later layers reuse.
        """
        c, period = self.config, loop.period
        stack, own = inputs

        def turn(carry: Any, turn_and_params: Any) -> Any:
            (x, entries, load), (index, params, own) = carry, turn_and_params
            kept = {}
            entries = list(entries) if entries is not None else None
            for i in range(period):
                number = loop.first + index * period + i
                layer = DecoderLayer(c, c.layers[loop.first + i], self.attention, self.mesh, parent=None)
                rngs = None if key is None else {"dropout": jax.random.fold_in(key, number)}
                layer_cache = None if entries is None else LayerCache(entries[i], index)
                inputs = shared, layer_cache, None if own is None else own[i]
                output: Any = layer.apply({"params": params[i]}, x, *inputs, rngs=rngs)
                x, entry, its_load, its_kept = output
                if entries is not None:
                    entries[i] = entry
                if its_kept is not None:
                    kept[c.layers[loop.first + i].window is not None] = its_kept
                if load is not None and its_load is not None:
                    load = jax.tree.map(jnp.add, load, its_load)
            return (x, None if entries is None else tuple(entries), load), kept

        leaves = jax.tree.leaves(stack, is_leaf=is_unstacked)
        if self.unrolled or any(map(is_unstacked, leaves)):
            turn = jax.jit(_rematerialised(turn, self.remat, prevent_cse=True))  # traced once
            layers = layers_of(stack)
            for index in range(loop.repeats):
                cut = slice(index * period, (index + 1) * period)
                carry, kept = turn(carry, (index, layers[cut], None if own is None else own[cut]))
            return carry, kept
        grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), stack)
        of = lambda params: [jax.tree.map(itemgetter(i), params) for i in range(period)]
        own = None if own is None else own.reshape(-1, period, *own.shape[1:])
        grouped_turn = lambda carry, xs: turn(carry, (xs[0], of(xs[1]), xs[2]))
        grouped_turn = _rematerialised(grouped_turn, self.remat, prevent_cse=False)
        carry, kept = jax.lax.scan(grouped_turn, carry, (jnp.arange(loop.repeats), grouped, own))
        return carry, jax.tree.map(itemgetter(-1), kept)  # a layer that keeps something is alone in its loop

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 `[..., vocab]` of `[..., embed]`: the final norm, the head, the soft-cap."""
        c, x = self.config, self.norm(hidden)
        logits = self.embed_tokens.attend(x) if c.tie_word_embeddings else self.lm_head(x)
        logits = logits.astype(jnp.float32)
        if c.logit_multiplier != 1.0:
            logits = logits * c.logit_multiplier
        if c.logit_softcap is not None:
            logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        return logits


def hidden_states(
    model: CausalLM,
    params: Any,
    input_ids: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
    *,
    dropout_key: jax.Array | None = None,
    embedding_noise: jax.Array | None = None,
) -> Hidden:
    """`CausalLM.hidden` of these parameters."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    inputs = input_ids, positions, segment_ids, cache, embedding_noise
    hidden: Any = model.apply({"params": params}, *inputs, rngs=rngs, method="hidden")
    return hidden


def periods(kinds: Sequence[Any], longest: int = 8) -> list[tuple[int, int, int]]:
    """Cut a sequence of kinds of layers into repeated patterns: (start, period, repeats), in order.

    >>> periods("aaaa"), periods("ababa"), periods("aabbb")
    ([(0, 1, 4)], [(0, 2, 2), (4, 1, 1)], [(0, 1, 2), (2, 1, 3)])
    """
    patterns, start = [], 0
    while start < len(kinds):
        best = (1, 1)
        for period in range(1, longest + 1):
            pattern, repeats = kinds[start : start + period], 1
            while len(pattern) == period and kinds[start + repeats * period :][:period] == pattern:
                repeats += 1
            # A pattern must repeat. Of patterns with equal coverage, the shortest wins.
            if repeats > 1 and period * repeats > best[0] * best[1]:
                best = (period, repeats)
        patterns.append((start, *best))
        start += best[0] * best[1]
    return patterns


def _rematerialised(turn, remat: str, *, prevent_cse: bool):
    # Inside a loop, common-subexpression elimination finds nothing to undo, and preventing it costs fusions.
    if remat == "none":
        return turn
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r}: expected one of {', '.join(REMAT)}")
    policies = jax.checkpoint_policies
    policy = {
        "dots": _is_worth_keeping,
        "attention": policies.save_only_these_names(ATTENTION_RESIDUALS),
        "full": None,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return jax.checkpoint(turn, policy=policy, prevent_cse=prevent_cse)


def _is_worth_keeping(primitive: Any, *inputs: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: keep products with parameters, except thin ones, like the second of an adapter.

    The output of a thin product is as large as the kernel's, and recomputing it takes no longer than reading it back.
    """
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **params):
        return False
    summed = params["dimension_numbers"][0][0]
    return math.prod(inputs[0].shape[axis] for axis in summed) > THIN


def stacks(layers: Any) -> tuple[Any, ...]:
    """The stacks of layers of a parameter tree, in order."""
    return layers if isinstance(layers, tuple) else (layers,)


def is_unstacked(leaf: Any) -> bool:
    """Whether a leaf of a stack of layers is a list with an array for each layer, instead of one array `[layers, ...]`.

    Lists suit unrolled layers: from a stack, XLA copies the kernel of each product, twice per step.
    """
    return isinstance(leaf, list)


def layers_of(stack: Any) -> list[Any]:
    """The parameters of each layer of a stack."""
    leaves, structure = jax.tree.flatten(stack, is_leaf=is_unstacked)
    # The gradient of `split` is one concatenation; the gradient of indexing would be a sum of whole stacks.
    cut = lambda x: x if is_unstacked(x) else [part[0] for part in jax.lax.split(x, [1] * len(x))]
    return [structure.unflatten(layer) for layer in zip(*map(cut, leaves), strict=True)]


def numbered(layers: Any) -> Iterator[tuple[range, Any]]:
    """The stacks of layers of a parameter tree, in order, each with the numbers of its layers."""
    first = 0
    for stack in stacks(layers):
        count = len(jax.tree.leaves(stack, is_leaf=is_unstacked)[0])
        yield range(first, first + count), stack
        first += count


def loops(config: DecoderConfig, layers: Any) -> list[Loop]:
    """The loops that run `params["layers"]`: over stacks, or over parts of stacks in which a pattern repeats.

    Raises:
      ValueError: the number of layers is not that of the config.
    """
    all_loops, count = [], 0
    for i, (numbers, _) in enumerate(numbered(layers)):
        kinds = config.layers[numbers.start : numbers.stop]
        all_loops += [Loop(i, start, numbers[start], period, repeats) for start, period, repeats in periods(kinds)]
        count = numbers.stop
    if count != config.num_hidden_layers:
        raise ValueError(f"params has {count} layers, the config has {config.num_hidden_layers}")
    return all_loops


def init_cache(config: DecoderConfig, params: Any, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `batch` sequences of up to `length` tokens (layers with a window have as many slots as it)."""

    def of_loop(loop: Loop) -> tuple[caches.Entry, ...]:
        kinds = config.layers[loop.first : loop.first + loop.period]
        return tuple(caches.layer_cache(config, kind, loop.repeats, batch, length, dtype) for kind in kinds)

    return tuple(map(of_loop, loops(config, params["layers"])))


def _no_load(config: DecoderConfig) -> Load | None:
    if config.experts is None or not config.experts.aux_coef:
        return None
    zeros = jnp.zeros(config.experts.count, jnp.float32)
    return Load(zeros, zeros, jnp.float32(0))


def runs(config: DecoderConfig) -> list[range]:
    """The layers of each stack: runs of layers with the same kinds of parameters."""
    ranges, start = [], 0
    for _, group in groupby(config.layers, key=partial(_parameters, config)):
        stop = start + len(list(group))
        ranges.append(range(start, stop))
        start = stop
    return ranges


def _parameters(config: DecoderConfig, layer: Layer) -> tuple[Any, ...]:
    """What the names and shapes of a layer's parameters depend on."""
    reused = layer.keys_values == "reused"
    kind = layer.sparse, layer.linear, layer.conv
    return *kind, config.heads_of(layer), layer.intermediate_size, layer.value_is_key, reused


def _init_layers(config: DecoderConfig, key: jax.Array):
    """All layers, initialised and stacked; every leaf gets `layers` as its first logical axis."""
    x, one = jnp.zeros((1, 1, config.hidden_size)), jnp.ones((1, 1), jnp.int32)
    turns = tuple(cos_sin(rope, config.rope_dim, one * 0, one) for rope in config.ropes)
    storing = [layer for layer in config.layers if layer.keys_values == "stored"]
    zeros = lambda layer: jnp.zeros((1, 1, *config.heads_of(layer)))
    kept = {layer.window is not None: (zeros(layer), zeros(layer)) for layer in storing}
    shared = Shared(turns, one * 0, one, kept)
    keys = jax.random.split(key, config.num_hidden_layers)

    def stacked(run: range):
        layer = DecoderLayer(config, config.layers[run.start], parent=None)
        own = jnp.zeros((1, 1, config.per_layer_inputs)) if config.per_layer_inputs else None
        init = lambda key: layer.init(key, x, shared, None, own)["params"]
        tree = jax.vmap(init)(keys[run.start : run.stop])
        label = lambda box: box.replace(names=("layers", *box.names))
        return jax.tree.map(label, tree, is_leaf=lambda x: isinstance(x, nn.Partitioned))

    initialised = [stacked(run) for run in runs(config)]
    return tuple(initialised) if len(initialised) > 1 else initialised[0]


def _boxed(config: DecoderConfig, key: jax.Array):
    return CausalLM(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_params(config: DecoderConfig, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters: kernels and embeddings normal(0.02), norms one."""
    return jax.tree.map(lambda x: x.astype(dtype), nn.unbox(_boxed(config, key)))


@cache
def _declared(config: DecoderConfig) -> Any:
    """The tree of `_boxed` as `ShapeDtypeStruct`s. Cached: a run asks for it many times."""
    return jax.eval_shape(lambda: _boxed(config, jax.random.key(0)))


def abstract_params(config: DecoderConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree as `ShapeDtypeStruct`s, without computing it."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nn.unbox(_declared(config)))


def logical_axes(config: DecoderConfig) -> dict[str, Any]:
    """The parameter tree with the logical axes of each leaf (see `jtune.sharding.RULES`) in its place."""
    return jax.tree.map(lambda box: box.names, _declared(config), is_leaf=lambda x: isinstance(x, nn.Partitioned))
