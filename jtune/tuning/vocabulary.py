"""A changed vocabulary: more rows of the embeddings and of the head, as a transform of the parameter tree.

    change = Change(stored=128256, rows=128320)
    params = resize(params, change, key)                 [128256, D] -> [128320, D], the head's kernel alike

Rows are drawn as LLaMA-Factory draws them: the mean of the rows that are there, plus normal noise of deviation
1 / sqrt(D); or, of a token with a description, the mean of the input embeddings of the description's tokens, for the
head as well, and then those without one are the mean of all. What a row gets depends on its id, the key and the rows
that were there, not on the mesh.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jtune.sharding import arrays

PyTree = Any

MULTIPLE = 64  # of rows, when there are more
PIECE_BYTES = 2**26  # of a table, on the host at a time

# (module, leaf) -> the axis of rows.
TABLES = {("embed_tokens", "embedding"): 0, ("lm_head", "kernel"): 1, ("lm_head", "bias"): 0}


class Change(NamedTuple):
    """What becomes of the rows of a vocabulary, and of the tables that hold them."""

    stored: int  # rows that there are
    rows: int  # rows that there will be
    new: tuple[int, ...] = ()  # ids below `stored` that had no token: their rows are drawn like those of the others
    described: Mapping[int, tuple[int, ...]] = {}  # id -> the tokens of the text that says what it means
    noise: Literal["all", "described", "none"] = "all"  # on which of the drawn rows
    unties: bool = False  # the head, which was the embedding, becomes a table of its own with the same rows

    @property
    def drawn(self) -> tuple[int, ...]:
        """The rows that are drawn, in order: of new tokens, and those that only fill up."""
        return (*sorted(self.new), *range(self.stored, self.rows))


def padded(size: int) -> int:
    """How many rows `size` tokens get.

    >>> padded(128258), padded(64)
    (128320, 64)
    """
    return -(-size // MULTIPLE) * MULTIPLE


def embedding_modules(tied: bool) -> tuple[str, ...]:
    """The modules that have a row for each token."""
    return ("embed_tokens",) if tied else ("embed_tokens", "lm_head")


def resize(params: PyTree, change: Change, key: jax.Array, shardings: PyTree = None) -> PyTree:
    """The parameters with `change.rows` rows for tokens; rows that had a token are as they were.

    Args:
      params: of arrays, as they are read.
      key: of the noise; each table has its own.
      shardings: tree like `params`, of the new shapes; default: the first device.

    Returns:
      The same tree, its tables in their dtype.
    """
    if change.unties:
        like = None if shardings is None else shardings["lm_head"]["kernel"]
        params = {**params, "lm_head": {"kernel": untied(params["embed_tokens"]["embedding"], like)}}
    if not change.drawn:
        return params
    place = {row: n for n, row in enumerate(change.drawn)}
    described = sorted(place.keys() & change.described.keys())
    tokens = sorted({t for row in described for t in change.described[row]})
    table = params["embed_tokens"]["embedding"]
    of = dict(zip(tokens, np.asarray(arrays.whole(_rows(table, np.array(tokens, np.int32))), np.float64)))
    loud = {"all": [*place.values()], "described": [place[row] for row in described], "none": []}[change.noise]
    found = dict(params)
    for (module, leaf), axis in TABLES.items():
        if leaf not in params.get(module, {}):
            continue
        x = params[module][leaf]
        mean = mean_row(x, axis, change.new).astype(np.float32)
        said = {
            place[row]: np.stack([of[t] for t in change.described[row]]).mean(axis=0)
            for row in described
            if change.described[row] and x.ndim == 2
        }
        sharding = x.sharding if shardings is None else shardings[module][leaf]
        grow = jax.jit(partial(_grown, change=change, said=said, loud=loud, axis=axis), out_shardings=sharding)
        mine = jax.random.fold_in(key, zlib.crc32(f"{module}.{leaf}".encode()))
        found[module] = {**found[module], leaf: grow(x, mean, mine)}
    return found


def untied(embedding: jax.Array, sharding: Any = None) -> jax.Array:
    """The kernel `[D, rows]` of a head that is an embedding `[rows, D]`.

    Args:
      sharding: that of the kernel; default: the first device.
    """
    own = SingleDeviceSharding(jax.devices()[0]) if sharding is None else sharding
    return jax.jit(jnp.transpose, out_shardings=own)(embedding)


def _grown(
    x: jax.Array,
    mean: jax.Array,
    key: jax.Array,
    *,
    change: Change,
    said: Mapping[int, np.ndarray],
    loud: Sequence[int],
    axis: int,
) -> jax.Array:
    """`x` with the rows that `change` draws, float32 before they are rounded.

    Args:
      mean: of the rows that there were; [D], or a number where a row is one.
      said: of some of the drawn rows (by their place among them), what they are in place of the mean.
      loud: those that get noise.
    """
    ids = np.array(change.drawn)
    rows = jnp.broadcast_to(mean, (len(ids), *mean.shape))
    if said:
        rows = rows.at[np.array([*said])].set(np.stack([*said.values()]).astype(np.float32))
    if x.ndim == 2:  # a bias gets none
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), mean.shape))(ids)
        rows = rows + np.isin(np.arange(len(ids)), loud)[:, None] * noise / math.sqrt(mean.size)
    old, tail = jnp.split(jnp.moveaxis(rows.astype(x.dtype), 0, axis), [len(change.new)], axis=axis)
    if change.new:
        x = x.at[(slice(None),) * axis + (ids[: len(change.new)],)].set(old)
    return jnp.concatenate([x, tail], axis=axis)


def mean_row(x: jax.Array, axis: int, leave_out: tuple[int, ...] = ()) -> np.ndarray:
    """The mean of the rows of a table, float64, summed on the host in one order whatever the mesh."""
    total, count = np.zeros([n for a, n in enumerate(x.shape) if a != axis]), x.shape[axis] - len(leave_out)
    skipped = np.array(sorted(leave_out))
    for first, piece in _pieces(x, axis):
        inside = skipped[(skipped >= first) & (skipped < first + piece.shape[axis])] - first if len(skipped) else ()
        kept = np.delete(piece, inside, axis=axis) if len(inside) else piece
        total += kept.sum(axis=axis, dtype=np.float64)
    return total / count


def _pieces(x: jax.Array, axis: int) -> Iterator[tuple[int, np.ndarray]]:
    """A table in pieces along its axis of rows, float32: (the first row, the piece)."""
    size = x.shape[axis]
    step = max(1, PIECE_BYTES * size // max(1, 4 * x.size))
    for first in range(0, size, step):
        piece = _cut(x, np.int32(first), size=min(step, size - first), axis=axis)
        yield first, np.asarray(arrays.whole(piece)).astype(np.float32)


@jax.jit
def _rows(x: jax.Array, ids: jax.Array) -> jax.Array:
    return x[ids]


@partial(jax.jit, static_argnames=("size", "axis"))
def _cut(x: jax.Array, first: jax.Array, *, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis)
