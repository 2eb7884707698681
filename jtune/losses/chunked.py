"""A loss as a sum over the positions that count, without ever holding the logits of all tokens.

What the loss of a position is comes as a function (see `jtune.losses.token` and `jtune.train.step`). Hidden states
may be a tree of arrays: those of several models, position by position.

Shape suffixes: B batch, T tokens in a row, D embed, V vocab, S shards of the batch, N = B/S*T tokens of one shard,
K labelled positions of one shard (a static number), C chunks, J positions of one shard in a chunk, K/C rounded up.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jtune.sharding import RULES, gather, only, spec

# Logits of one chunk, in elements: 2**25 float32 are 128 MiB.
CHUNK_ELEMENTS = 2**25


def chunk_elements(mesh: Mesh | None) -> int:
    """Logits of one chunk. Each reads the whole head, which takes a GPU as long as the products of some 200 positions
    with it: there chunks are larger."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return 2 * CHUNK_ELEMENTS if platform == "gpu" else CHUNK_ELEMENTS


def gather_labelled(hidden: Any, targets_BT, weights_BT, capacity: int, shards: int):
    """The positions with a label, shard by shard, padded with weight 0 to a static `capacity` for each shard.

    The rows of a shard stay on its devices: the gather is batched over the leading axis, which is the sharded one.

    Args:
      hidden: `[B, T, D]`, or a tree of them.

    Returns:
      hidden `[S, K, D]`, targets int32 `[S, K, ...]`, weights float32 `[S, K]`.
    """
    by_shard = lambda x: x.reshape(shards, -1, *x.shape[2:])
    weights_SN = by_shard(weights_BT)
    # A stable sort puts the labelled positions first and keeps their order; what follows them has weight 0.
    index_SK = jnp.argsort(weights_SN == 0, axis=1, stable=True)[:, :capacity]

    def take(x):
        x = by_shard(x)
        return jnp.take_along_axis(x, index_SK.reshape(*index_SK.shape, *(1,) * (x.ndim - 2)), axis=1)

    return jax.tree.map(take, (hidden, targets_BT, weights_BT))


def share_labelled(hidden: Any, targets_BT, weights_BT, capacity: int, axis: str):
    """`gather_labelled` inside `jax.shard_map`, where the devices along `axis` have a piece of each row.

    They share the labelled positions evenly, wherever in the rows these are, so that the head is computed once: each
    gives the hidden states that it has, and gets those of its share.

    Returns:
      as `gather_labelled`, of a single shard: hidden `[1, K / devices, D]` and so on.
    """
    sharers, rank = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    capacity = -(-capacity // sharers) * sharers
    B, piece = weights_BT.shape
    column = jnp.broadcast_to(rank * piece + jnp.arange(piece), (B, piece))
    row = jnp.broadcast_to(jnp.arange(B)[:, None], (B, piece))
    whole = lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True)
    place_BT2 = jnp.stack([row, column], -1)
    place_1K2, targets_1K, weights_1K = gather_labelled(
        whole(place_BT2), whole(targets_BT), whole(weights_BT), capacity, 1
    )
    row_K, column_K = place_1K2[0, :, 0], place_1K2[0, :, 1] - rank * piece
    mine_K = (column_K >= 0) & (column_K < piece)

    def exchange(hidden_BTD):
        hidden_KD = jnp.where(mine_K[:, None], hidden_BTD[row_K, jnp.clip(column_K, 0, piece - 1)], 0)
        return jax.lax.psum_scatter(hidden_KD, axis, tiled=True)[None]

    share = lambda x: jax.lax.dynamic_slice_in_dim(x, rank * (capacity // sharers), capacity // sharers, axis=1)
    return jax.tree.map(exchange, hidden), share(targets_1K), share(weights_1K)


def sum_labelled(
    f: Callable,
    head_params,
    hidden: Any,
    targets_BT,
    weights_BT,
    *,
    capacity: int,
    shards: int,
    axes: Any = None,
    mesh: Mesh | None = None,
):
    """`f(head_params, *labelled)`, a tree of sums over labelled positions, added up over all shards of the tokens.

    On a mesh `f` runs on each device for its share of the positions, with the head's parameters whole but for
    `tensor`: they are gathered once, and their gradients are summed over chunks before they are summed over devices,
    where each keeps its part.

    Args:
      hidden: `[B, T, D]`, or a tree of them.
      capacity: labelled positions of one of the `shards` of the batch, at most.
      axes: logical axes of `head_params`, of the same structure; needed on a mesh.
    """
    split = () if mesh is None else tuple(axis for axis in RULES["shards"] if mesh.shape[axis] > 1)
    if mesh is None or not split:
        return f(head_params, *gather_labelled(hidden, targets_BT, weights_BT, capacity, shards))
    tokens = spec(("batch", "sequence"), weights_BT.shape, mesh)
    # Along `tensor`, XLA splits the head and its logits by the vocabulary: nothing is said of it here.
    held = jax.tree.map(lambda x, names: only(spec(names, x.shape, mesh), split), head_params, axes)
    share = partial(share_labelled, axis="context") if mesh.shape["context"] > 1 else partial(gather_labelled, shards=1)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(held, tokens, tokens, tokens),
        out_specs=P(),
        axis_names=set(split),
        check_vma=False,  # the sums that a scan carries start as the same zeros on all devices
    )
    def local(head_params, hidden, targets_BT, weights_BT):
        head_params = jax.tree.map(gather, head_params, held)
        labelled = share(hidden, targets_BT, weights_BT, capacity)
        return jax.lax.psum(f(head_params, *labelled), split)

    return local(head_params, hidden, targets_BT, weights_BT)


def chunk_positions(capacity: int, vocab: int, elements: int = CHUNK_ELEMENTS) -> int:
    """How many positions of one shard go into a chunk of so many logits, at most: chunks of about equal size.

    >>> chunk_positions(1000, vocab=2**15), chunk_positions(4093, vocab=2**17)
    (1000, 256)
    """
    wanted = max(1, elements // vocab)
    return -(-capacity // -(-capacity // wanted))


@partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def summed_loss(loss: Callable, head_params, hidden: Any, targets_SK, weights_SK, chunk: int) -> jax.Array:
    """Weighted sum of the losses of positions, `sum_k w_k * loss(head_params, hidden_k, target_k)`, float32 scalar.

    The logits exist for `chunk` positions of each shard at a time. The gradient is taken chunk by chunk in the forward
    pass, where the logits are at hand: nothing is recomputed, and only what is differentiated gets a gradient. (The
    loss is a sum, so the backward pass only scales by the incoming scalar.)

    Args:
      loss: `loss(head_params, hidden [..., D], targets int32 [...]) -> float32 [...]`; a static, hashable callable.
      hidden: `[S, K, D]`, or a tree of them.
    """
    body = lambda total, xs: (total + _chunk_loss(loss, head_params, *xs), None)
    return jax.lax.scan(body, jnp.float32(0), cut(chunk, hidden, targets_SK, weights_SK))[0]


def _chunk_loss(loss, head_params, hidden, targets_SJ, weights_SJ):
    return jnp.sum(loss(head_params, hidden, targets_SJ) * weights_SJ)


def cut(chunk: int, *trees_SK):
    """[S, K, ...] -> [C, S, J, ...]: the scanned axis in front, the sharded axis whole in every chunk.

    The last chunk is filled up with zeros, weights among them.
    """

    def one(x):
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    return jax.tree.map(one, trees_SK)


def _forward(loss, head_params, hidden, targets, weights, chunk):
    # With symbolic_zeros, each leaf comes with a flag: is it differentiated? A frozen head costs no gradient, and
    # neither does the reference model that a loss compares with.
    moving, fixed, join_head = _part(head_params)
    moving_SKD, fixed_SKD, join_hidden = _part(hidden)

    def body(carry, xs):
        total, grads = carry
        moving_SJD, fixed_SJD, y, w = xs
        chunk_loss = lambda m, h: _chunk_loss(loss, join_head(m, fixed), join_hidden(h, fixed_SJD), y, w)
        value, pull = jax.vjp(chunk_loss, moving, moving_SJD)
        d_moving, d_hidden = pull(jnp.ones_like(value))
        grads = [g + d.astype(g.dtype) for g, d in zip(grads, d_moving)]
        return (total + value, grads), d_hidden

    zeros = [jnp.zeros(m.shape, jnp.float32) for m in moving]
    chunks = cut(chunk, moving_SKD, fixed_SKD, targets.value, weights.value)
    (total, grads), d_hidden_C = jax.lax.scan(body, (jnp.float32(0), zeros), chunks)
    whole = lambda d_CSJD, x: jnp.moveaxis(d_CSJD, 0, 1).reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]]
    d_hidden = join_hidden([whole(d, x) for d, x in zip(d_hidden_C, moving_SKD)], [None] * len(fixed_SKD))
    d_head = join_head([g.astype(m.dtype) for g, m in zip(grads, moving)], [None] * len(fixed))
    return total, (d_head, d_hidden)


def _part(tree):
    """(leaves that are differentiated, the other ones, how to make a tree of two such lists again)."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: hasattr(x, "perturbed"))
    trained = [leaf.perturbed for leaf in leaves]

    def join(moving, fixed):
        moving, fixed = iter(moving), iter(fixed)
        return jax.tree.unflatten(treedef, [next(moving if t else fixed) for t in trained])

    values = lambda wanted: [leaf.value for leaf, t in zip(leaves, trained) if t == wanted]
    return values(True), values(False), join


def _backward(loss, chunk, residuals, g):
    scale = lambda d: (d * g).astype(d.dtype)
    d_head, d_hidden = residuals
    return jax.tree.map(scale, d_head), jax.tree.map(scale, d_hidden), None, None


summed_loss.defvjp(_forward, _backward, symbolic_zeros=True)


# ---------------------------------------------------------------------- values of positions


@partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def position_values(
    value: Callable, head_params, hidden_SKD, targets_SK, weights_SK, chunk: int
) -> tuple[jax.Array, Any]:
    """`value(head_params, hidden_k, target_k)` of positions, differentiable by any cotangent, and figures of them.

    Nothing of the size of logits is kept. Where the head is frozen, the gradient of each position by its hidden state
    is formed where its logits are, and the backward pass scales it: that costs what `summed_loss` costs. Where the head
    trains, what its gradient is weighted by is known in the backward pass only: the logits are formed once more there.

    Args:
      value: `value(head_params, hidden [..., D], targets int32 [...]) -> (float32 [...], figures)`, where figures are a
        tree of float32 `[...]` through which no gradient passes; a static, hashable callable.
      weights_SK: a chunk in which all are 0 is not computed: positions that count come first (`gather_labelled`), and
        most microbatches have fewer than their capacity.

    Returns:
      The values, float32 `[S, K]`, and the figures, each `[S, K]`; 0 where they are not computed.
    """

    def body(_, xs):
        x, y, w = xs
        return None, _if_any(w, lambda: value(head_params, x, y))

    _, out = jax.lax.scan(body, None, cut(chunk, hidden_SKD, targets_SK, weights_SK))
    return jax.tree.map(partial(_joined, size=targets_SK.shape[1]), out)


def _if_any(weights_SJ: jax.Array, compute: Callable[[], Any]) -> Any:
    """`compute()`, or zeros if no position counts."""
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
    return jax.lax.cond(jnp.any(weights_SJ != 0), compute, zeros)


def _joined(x_CSJ: jax.Array, size: int) -> jax.Array:
    """The inverse of `cut`: [C, S, J, ...] -> [S, K, ...]."""
    whole = jnp.moveaxis(x_CSJ, 0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])[:, :size]


def _values_forward(value, head_params, hidden, targets, weights, chunk):
    moving, fixed, join_head = _part(head_params)
    head = join_head(moving, fixed)

    def at(x, y):
        if moving or not hidden.perturbed:
            return value(head, x, y), None
        v, pull, figures = jax.vjp(lambda x: value(head, x, y), x, has_aux=True)
        return (v, figures), pull(jnp.ones_like(v))[0]

    def body(_, xs):
        x, y, w = xs
        return None, _if_any(w, lambda: at(x, y))

    _, out = jax.lax.scan(body, None, cut(chunk, hidden.value, targets.value, weights.value))
    found, d_hidden = jax.tree.map(partial(_joined, size=targets.value.shape[1]), out)
    again = (moving, fixed, hidden.value, targets.value, weights.value) if moving else None
    # A function among residuals must be a tree without leaves, as `Partial` is.
    join = jax.tree_util.Partial(lambda moving: join_head(moving, [None] * len(fixed)))
    return found, (d_hidden, again, join, jax.tree_util.Partial(join_head))


def _values_backward(value, chunk, residuals, cotangents):
    d_hidden, again, gradients, join_head = residuals
    d_values: Any = cotangents[0]
    if isinstance(d_values, jax.custom_derivatives.SymbolicZero):  # what is differentiated depends on figures alone
        d_values = jnp.zeros(d_values.shape, jnp.float32)
    if again is None:
        d_hidden = None if d_hidden is None else (d_values[..., None] * d_hidden).astype(d_hidden.dtype)
        return gradients([]), d_hidden, None, None
    moving, fixed, hidden, targets, weights = again

    def body(grads, xs):
        x, y, w, d = xs

        def add():
            _, pull = jax.vjp(lambda m, x: value(join_head(m, fixed), x, y)[0], moving, x)
            d_moving, d_x = pull(d)
            return [g + m.astype(g.dtype) for g, m in zip(grads, d_moving)], d_x

        return jax.lax.cond(jnp.any(w != 0), add, lambda: (grads, jnp.zeros_like(x)))

    zeros = [jnp.zeros(m.shape, jnp.float32) for m in moving]
    grads, d_hidden = jax.lax.scan(body, zeros, cut(chunk, hidden, targets, weights, d_values))
    d_head = gradients([g.astype(m.dtype) for g, m in zip(grads, moving)])
    return d_head, _joined(d_hidden, targets.shape[1]), None, None


position_values.defvjp(_values_forward, _values_backward, symbolic_zeros=True)
