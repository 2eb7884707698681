"""Cross-entropy as a sum over the positions that count, without ever holding the logits of all tokens.

Shape suffixes: B batch, T tokens in a row, D embed, V vocab, S shards of the tokens, K labelled positions of one shard
(a static number), C chunks, J = K/C positions of one shard in a chunk; R shards of the batch, N = B/R*T tokens of one.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jtune.sharding import constrain

# Logits of one chunk, in elements: 2**25 float32 are 128 MiB.
CHUNK_ELEMENTS = 2**25


def token_nll(logits_V: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], float32: `[..., vocab]`, int32 `[...]` -> `[...]`."""
    logits_V = logits_V.astype(jnp.float32)
    picked = jnp.take_along_axis(logits_V, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_V, axis=-1) - picked


def gather_labelled(hidden_BTD, targets_BT, weights_BT, capacity: int, shards: int, mesh: Mesh | None = None):
    """The positions with a label, shard by shard, padded with weight 0 to a static number for each shard.

    The rows of a shard stay on its devices: the gather is batched over the leading axis, which is the sharded one.
    Devices that share a shard's rows, each with a piece of every row (`mesh_context`), share its labelled positions
    evenly, wherever in the rows these are: the head is computed once.

    Args:
      capacity: labelled positions of a shard of the batch, at most.
      shards: of the batch, R. On a mesh there are `mesh_context` times as many shards S of the tokens.

    Returns:
      hidden `[S, K, D]`, targets int32 `[S, K, ...]`, weights float32 `[S, K]`.
    """
    sharers = 1 if mesh is None else mesh.shape["context"]
    capacity = -(-capacity // sharers) * sharers
    by_shard = lambda x: x.reshape(shards, -1, *x.shape[2:])
    hidden_RND, targets_RN, weights_RN = by_shard(hidden_BTD), by_shard(targets_BT), by_shard(weights_BT)
    # A stable sort puts the labelled positions first and keeps their order; what follows them has weight 0.
    index_RK = jnp.argsort(weights_RN == 0, axis=1, stable=True)[:, :capacity]

    def take(x):
        taken = jnp.take_along_axis(x, index_RK.reshape(*index_RK.shape, *(1,) * (x.ndim - 2)), axis=1)
        by_sharer = taken.reshape(shards * sharers, -1, *x.shape[2:])
        return constrain(by_sharer, mesh, "shards", *(None,) * (x.ndim - 1))

    return take(hidden_RND), take(targets_RN), take(weights_RN)


def chunk_positions(capacity: int, shards: int, vocab: int) -> int:
    """How many positions of one shard go into a chunk: a divisor of `capacity` that keeps the logits small."""
    wanted = max(1, CHUNK_ELEMENTS // vocab)
    return next(capacity // n for n in range(1, capacity + 1) if capacity % n == 0 and capacity // n <= wanted)


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
    """[S, K, ...] -> [C, S, J, ...]: the scanned axis in front, the sharded axis whole in every chunk."""
    return tuple(jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0) for x in arrays_SK)


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
    d_hidden = jnp.moveaxis(d_hidden_C, 0, 1).reshape(hidden.value.shape)
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
