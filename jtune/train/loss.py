"""Cross-entropy as a sum over the positions that count, without ever holding the logits of all tokens.

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


def token_nll(logits_V: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], float32: `[..., vocab]`, int32 `[...]` -> `[...]`."""
    logits_V = logits_V.astype(jnp.float32)
    picked = jnp.take_along_axis(logits_V, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_V, axis=-1) - picked


def gather_labelled(hidden_BTD, targets_BT, weights_BT, capacity: int, shards: int):
    """The positions with a label, shard by shard, padded with weight 0 to a static `capacity` for each shard.

    The rows of a shard stay on its devices: the gather is batched over the leading axis, which is the sharded one.

    Returns:
      hidden `[S, K, D]`, targets int32 `[S, K, ...]`, weights float32 `[S, K]`.
    """
    by_shard = lambda x: x.reshape(shards, -1, *x.shape[2:])
    hidden_SND, targets_SN, weights_SN = by_shard(hidden_BTD), by_shard(targets_BT), by_shard(weights_BT)
    # A stable sort puts the labelled positions first and keeps their order; what follows them has weight 0.
    index_SK = jnp.argsort(weights_SN == 0, axis=1, stable=True)[:, :capacity]
    take = lambda x: jnp.take_along_axis(x, index_SK.reshape(*index_SK.shape, *(1,) * (x.ndim - 2)), axis=1)
    return take(hidden_SND), take(targets_SN), take(weights_SN)


def share_labelled(hidden_BTD, targets_BT, weights_BT, capacity: int, axis: str):
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
    hidden_KD = jnp.where(mine_K[:, None], hidden_BTD[row_K, jnp.clip(column_K, 0, piece - 1)], 0)
    share = lambda x: jax.lax.dynamic_slice_in_dim(x, rank * (capacity // sharers), capacity // sharers, axis=1)
    return jax.lax.psum_scatter(hidden_KD, axis, tiled=True)[None], share(targets_1K), share(weights_1K)


def sum_labelled(
    f: Callable,
    head_params,
    hidden_BTD,
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
      capacity: labelled positions of one of the `shards` of the batch, at most.
      axes: logical axes of `head_params`, of the same structure; needed on a mesh.
    """
    split = () if mesh is None else tuple(axis for axis in RULES["shards"] if mesh.shape[axis] > 1)
    if mesh is None or not split:
        return f(head_params, *gather_labelled(hidden_BTD, targets_BT, weights_BT, capacity, shards))
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
    def local(head_params, hidden_BTD, targets_BT, weights_BT):
        head_params = jax.tree.map(gather, head_params, held)
        labelled = share(hidden_BTD, targets_BT, weights_BT, capacity)
        return jax.lax.psum(f(head_params, *labelled), split)

    return local(head_params, hidden_BTD, targets_BT, weights_BT)


def chunk_positions(capacity: int, vocab: int) -> int:
    """How many positions of one shard go into a chunk, so that its logits stay small: chunks of about equal size.

    >>> chunk_positions(1000, vocab=2**15), chunk_positions(4093, vocab=2**17)
    (1000, 256)
    """
    wanted = max(1, CHUNK_ELEMENTS // vocab)
    return -(-capacity // -(-capacity // wanted))


@partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def summed_nll(head: Callable, head_params, hidden_SKD, targets_SK, weights_SK, chunk: int) -> jax.Array:
    """Weighted sum of token losses, `sum_k w_k * nll(head(head_params, hidden_k), target_k)`, float32 scalar.

    The logits exist for `chunk` positions of each shard at a time. The gradient is taken chunk by chunk in the forward
    pass, where the logits are at hand: nothing is recomputed, and only what is differentiated gets a gradient. (The
    loss is a sum, so the backward pass only scales by the incoming scalar.)

    Args:
      head: `head(head_params, hidden [..., D]) -> logits [..., V]`; a static, hashable callable.
    """
    body = lambda total, xs: (total + _chunk_nll(head, head_params, *xs), None)
    return jax.lax.scan(body, jnp.float32(0), cut(chunk, hidden_SKD, targets_SK, weights_SK))[0]


def _chunk_nll(head, head_params, hidden_SJD, targets_SJ, weights_SJ):
    return jnp.sum(token_nll(head(head_params, hidden_SJD), targets_SJ) * weights_SJ)


def cut(chunk: int, *arrays_SK):
    """[S, K, ...] -> [C, S, J, ...]: the scanned axis in front, the sharded axis whole in every chunk.

    The last chunk is filled up with zeros, weights among them.
    """

    def one(x):
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    return tuple(map(one, arrays_SK))


def _forward(head, head_params, hidden, targets, weights, chunk):
    # With symbolic_zeros, each leaf comes with a flag: is it differentiated? A frozen head costs no gradient.
    leaves, treedef = jax.tree.flatten(head_params, is_leaf=lambda x: hasattr(x, "perturbed"))
    trained = [leaf.perturbed for leaf in leaves]
    values = [leaf.value for leaf in leaves]
    to_tree = lambda moving: jax.tree.unflatten(
        treedef, [m if t else v for m, v, t in zip(_spread(moving, trained), values, trained)]
    )
    moving = [v for v, t in zip(values, trained) if t]

    def body(carry, xs):
        total, grads = carry
        x, y, w = xs
        loss, pull = jax.vjp(lambda m, h: _chunk_nll(head, to_tree(m), h, y, w), moving, x)
        d_moving, d_hidden = pull(jnp.ones_like(loss))
        grads = [g + d.astype(g.dtype) for g, d in zip(grads, d_moving)]
        return (total + loss, grads), d_hidden

    zeros = [jnp.zeros(m.shape, jnp.float32) for m in moving]
    chunks = cut(chunk, hidden.value, targets.value, weights.value)
    (total, grads), d_hidden_C = jax.lax.scan(body, (jnp.float32(0), zeros), chunks)
    S, K, D = hidden.value.shape
    d_hidden = jnp.moveaxis(d_hidden_C, 0, 1).reshape(S, -1, D)[:, :K]
    dtypes = [m.dtype for m in moving]
    d_head = jax.tree.unflatten(treedef, _spread([g.astype(d) for g, d in zip(grads, dtypes)], trained))
    return total, (d_head, d_hidden)


def _spread(moving, trained):
    """Put the differentiated leaves back at their places, None elsewhere."""
    moving = iter(moving)
    return [next(moving) if t else None for t in trained]


def _backward(head, chunk, residuals, g):
    scale = lambda d: (d * g).astype(d.dtype)
    d_head, d_hidden = residuals
    return jax.tree.map(scale, d_head), scale(d_hidden), None, None


summed_nll.defvjp(_forward, _backward, symbolic_zeros=True)
