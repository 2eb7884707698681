"""How the examples of unpacked updates lie in memory: a few static shapes for a whole run, with little padding.

Which examples an update holds is given (see order.py). The loss is a sum over tokens and segments do not see each
other, so the examples may lie in any rows of any microbatch: each update is best-fitted into rows of one of at most
four shapes, and these are chosen to make the run cheap. The used microbatches come first and are as few as hold the
rows; the train step leaves out the empty ones, so the number of microbatches follows the update at no cost.

Shape suffixes: U updates, N examples of an update, R rows of an update, C candidate shapes.
"""

from typing import NamedTuple

import numpy as np

from jtune.data.batching.pack import best_fit_many

MAX_SHAPES = 4

# A row of T tokens costs T * (1 + T / ATTENTION_LENGTH): linear layers, and attention, which is quadratic. For flash
# attention the two are equal near six times the width of the model, sooner where the kernel is slower.
ATTENTION_LENGTH = 4096

# A microbatch costs as much as this many tokens more on each shard, for reading the weights and adding the gradients:
# about 20 bytes a parameter against 6 operations a parameter and token, at 100 to 200 operations a byte.
MICROBATCH_TOKENS = 512

# A further shape must save the run as much as this many of its updates take: it has to be compiled.
COMPILE_UPDATES = 20

# Rows may be longer than the longest example, up to this many tokens or this many times as long: examples share long
# rows better. Not more, because attention without a fused kernel takes memory by the square of the row.
SHORT_ROW = 1024
LONG_ROW = 1.25

SAMPLED_UPDATES = 2000
NEVER = np.iinfo(np.int32).max


class Shape(NamedTuple):
    """The static shape of one update's arrays."""

    accum: int  # microbatches, at most
    batch: int  # rows of a microbatch, a multiple of the number of batch shards
    seq: int  # tokens of a row


def rung(length: int) -> int:
    """`length` rounded up to a row length that kernels like: a multiple of 64, above 1024 of 128."""
    step = 64 if length <= 1024 else 128
    return max(64, -(-length // step) * step)


def rows_needed(sorted_UN: np.ndarray, seq: int) -> np.ndarray:
    """Rows of `seq` tokens that best fit needs for each update, int32 `[U]`; NEVER where an example is longer.

    Args:
      sorted_UN: lengths of each update's examples, longest first, filled up with 0.
    """
    rows_U = np.full(len(sorted_UN), NEVER, np.int32)
    fits = sorted_UN[:, 0] <= seq
    if fits.any():
        rows_U[fits] = best_fit_many(sorted_UN[fits], seq).max(axis=1) + 1
    return rows_U


def costs(rows_U: np.ndarray, batch: int, seq: int, shards: int) -> np.ndarray:
    """What updates of `rows_U` rows cost in microbatches of `[batch, seq]`, in tokens: float64 `[U]`, inf for NEVER."""
    microbatch = batch * seq * (1 + seq / ATTENTION_LENGTH) + shards * MICROBATCH_TOKENS
    return np.where(rows_U == NEVER, np.inf, -(-rows_U // batch) * microbatch)


def choose_shapes(
    sorted_UN: np.ndarray, *, updates: int, longest: int, per_device: int, shards: int
) -> list[tuple[int, int]]:
    """At most four (batch, seq) that make the updates cheap. The first has room for the longest example.

    A microbatch has no more tokens on a shard than the padded layout would have: `per_device` rows as long as the
    longest example. Facility location by greedy addition, replacing one shape at a time for as long as that helps.

    Args:
      sorted_UN: lengths of some updates' examples, longest first, filled up with 0.
      updates: of the whole run; a shape that would save less than its compilation costs is not worth having.
      longest: tokens of the longest example of the run.
    """
    sorted_UN = sorted_UN[:: -(-len(sorted_UN) // SAMPLED_UPDATES)]
    tokens = per_device * rung(longest)
    seqs = {rung(int(x)) for x in np.quantile(sorted_UN[:, 0], np.linspace(0, 1, 9))}
    top = min(tokens, max(SHORT_ROW, rung(int(longest * LONG_ROW))))
    seqs |= {rung(x) for x in range(longest, top + 1, max(64, longest // 16)) if rung(x) <= top}
    shapes, cost_CU = [], []
    for seq in sorted(seqs):
        rows_U = rows_needed(sorted_UN, seq)
        full = tokens // seq
        for rows in sorted({-(-full // n) for n in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)}):
            shapes.append((rows * shards, seq))
            cost_CU.append(costs(rows_U, rows * shards, seq, shards))
    cost_CU = np.stack(cost_CU)
    universal = [c for c, (_, seq) in enumerate(shapes) if seq >= longest]

    def cost(chosen: list[int]) -> float:
        return cost_CU[chosen].min(axis=0).sum()

    chosen = [min(universal, key=lambda c: cost([c]))]
    while len(chosen) < MAX_SHAPES:
        better = _improve([*chosen, chosen[0]], universal, cost_CU)
        if (cost(chosen) - cost(better)) * updates <= COMPILE_UPDATES * cost(better):
            break
        chosen = better
    return [shapes[c] for c in chosen]


def _improve(chosen: list[int], universal: list[int], cost_CU: np.ndarray) -> list[int]:
    """Replace one shape at a time by the best for the others, the last first, until nothing is gained."""
    best = cost_CU[chosen].min(axis=0).sum()
    while True:
        before = best
        for i in reversed(range(len(chosen))):
            others = cost_CU[chosen[:i] + chosen[i + 1 :]].min(axis=0)
            allowed = universal if i == 0 else list(range(len(cost_CU)))
            totals = np.minimum(cost_CU[allowed], others).sum(axis=1)
            if totals.min() < best:
                best = totals.min()
                chosen[i] = allowed[int(totals.argmin())]
        if best >= before:
            return chosen


def to_and_fro(rank: np.ndarray, groups: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Deal ranked things out to groups, every second round backwards: the round and the group of each.

    >>> to_and_fro(np.arange(5), 2)
    (array([0, 0, 1, 1, 2]), array([0, 1, 1, 0, 0]))
    """
    turn, at = np.divmod(rank, groups)
    return turn, np.where(turn % 2 == 0, at, groups - 1 - at)


def place(lengths_UN: np.ndarray, labelled_UN: np.ndarray, shape: Shape, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay each update's examples into the rows of `shape`.

    Best fit forms the rows. They are then dealt out, most labelled first, to and fro over the (microbatch, shard) that
    the update needs, so that each gets about as many labelled tokens as the others: the static number of them that the
    loss gathers stays small.

    Args:
      lengths_UN: tokens of each update's examples, in the order of the update, 0 where there is none.
      labelled_UN: their targets that count.

    Returns:
      the row of each example, `microbatch * batch + row`, int64 `[U, N]`;
      the most labelled targets that a (microbatch, shard) of the update holds, int64 `[U]`.

    Raises:
      ValueError: an update does not fit.
    """
    U = len(lengths_UN)
    order_UN = np.argsort(-lengths_UN, axis=1, kind="stable")
    sorted_UN = np.take_along_axis(lengths_UN, order_UN, axis=1)
    if sorted_UN[:, 0].max(initial=0) > shape.seq:
        raise ValueError(f"an example of {sorted_UN[:, 0].max()} tokens does not fit into rows of {shape.seq}")
    rows_UN = np.empty(lengths_UN.shape, np.int64)
    np.put_along_axis(rows_UN, order_UN, best_fit_many(sorted_UN, shape.seq).astype(np.int64), axis=1)
    used_U = rows_UN.max(axis=1) + 1
    R = int(used_U.max())
    room = shape.accum * shape.batch
    if room < R:
        raise ValueError(f"an update needs {R} rows of {shape.seq} tokens, and its shape has {room}")

    # Unused rows have no labels and higher numbers than the used ones, so the used ones rank before them.
    line = np.arange(U)[:, None]
    labels_UR = np.bincount((line * R + rows_UN).ravel(), labelled_UN.ravel(), U * R).reshape(U, R)
    rank_UR = np.argsort(np.argsort(-labels_UR, axis=1, kind="stable"), axis=1)
    groups_U1 = (-(-used_U // shape.batch) * shards)[:, None]
    turn_UR, group_UR = to_and_fro(rank_UR, groups_U1)
    G = shape.accum * shards
    peak_U = np.bincount((line * G + group_UR).ravel(), labels_UR.ravel(), U * G).reshape(U, G).max(axis=1)
    # Groups are numbered microbatch by microbatch; each owns batch // shards rows in a line.
    slot_UR = group_UR * (shape.batch // shards) + turn_UR
    return np.take_along_axis(slot_UR, rows_UN, axis=1), peak_U.astype(np.int64)
