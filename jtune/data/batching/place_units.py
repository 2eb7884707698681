"""Where the segments of units lie: in any rows of one microbatch.

A loss of a unit needs the sums of its segments, which are added over the devices: they may lie in several rows, on
several shards, but not in several microbatches. So rows need be no longer than the longest segment.

Shape suffixes: U updates, N units of an update, S segments of a unit, M microbatches, R rows of a microbatch.
"""

from collections.abc import Sequence

import numpy as np

from jtune.data.batching.shapes import (
    ATTENTION_LENGTH,
    LONG_ROW,
    MICROBATCH_TOKENS,
    SHORT_ROW,
    Shape,
    rung,
    to_and_fro,
)
from jtune.data.batching.units import UnitSet

SAMPLED_UNITS = 20_000  # by which a shape is chosen
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)  # by which the tokens of a microbatch may be divided


def place_units(lengths_UNS: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Lay each update's units into the rows of `shape`: the longest first, each into the first microbatch with room.

    Of a microbatch its segments get the fullest rows that still take them.

    Args:
      lengths_UNS: tokens of each segment, in the order of the update; 0 where there is no unit.

    Returns:
      the row of each segment, `microbatch * batch + row`, int64 `[U, N, S]`; the microbatches that each update uses,
      int64 `[U]`, more than `shape.accum` where it does not fit: then its rows mean nothing.
    """
    U, N, S = lengths_UNS.shape
    M, R, T = shape
    lines = np.arange(U)
    order_UN = np.argsort(-lengths_UNS.sum(axis=2), axis=1, kind="stable")
    free_UMR = np.full((U, M, R), T, np.int64)
    slots_UNS, used_U = np.zeros(lengths_UNS.shape, np.int64), np.zeros(U, np.int64)
    for n in range(N):
        units = order_UN[:, n]
        lengths_US = lengths_UNS[lines, units]
        if not lengths_US.any():
            break
        longest_first_US = np.argsort(-lengths_US, axis=1, kind="stable")
        left_UMR, rows_UMS, fits_UM = free_UMR.copy(), np.empty((U, M, S), np.int64), np.ones((U, M), bool)
        for s in range(S):
            size = np.take_along_axis(lengths_US, longest_first_US[:, s, None], axis=1)[:, :, None]
            after_UMR = np.where(left_UMR >= size, left_UMR - size, T + 1)
            row_UM1 = after_UMR.argmin(axis=2)[..., None]
            space_UM1 = np.take_along_axis(after_UMR, row_UM1, axis=2)
            fits_UM &= space_UM1[..., 0] <= T
            np.put_along_axis(left_UMR, row_UM1, space_UM1, axis=2)
            np.put_along_axis(rows_UMS, np.broadcast_to(longest_first_US[:, None, s, None], (U, M, 1)), row_UM1, axis=2)
        microbatch = fits_UM.argmax(axis=1)
        there, fits = lengths_US.any(axis=1), fits_UM.any(axis=1)
        slots_UNS[lines, units] = microbatch[:, None] * R + rows_UMS[lines, microbatch]
        moved = lines[there & fits]
        free_UMR[moved, microbatch[moved]] = left_UMR[moved, microbatch[moved]]
        used_U = np.where(there, np.maximum(used_U, np.where(fits, microbatch + 1, M + 1)), used_U)
    return slots_UNS, used_U


def deal(slots_UNS: np.ndarray, counts_UNS: np.ndarray, shape: Shape, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Deal the rows of each microbatch out to shards, so that each gets about as many labelled tokens as the others.

    Args:
      counts_UNS: labelled targets of each segment; 0 where there is no unit.

    Returns:
      the rows as of `place_units`; the most labelled targets that a (microbatch, shard) holds, int64 `[U]`.
    """
    U = len(slots_UNS)
    M, R, _ = shape
    line = np.arange(U)[:, None, None]
    labels_UMR = np.bincount((line * M * R + slots_UNS).ravel(), counts_UNS.ravel(), U * M * R).reshape(U, M, R)
    rank_UMR = np.argsort(np.argsort(-labels_UMR, axis=2, kind="stable"), axis=2)
    turn, shard = to_and_fro(rank_UMR, shards)
    row_UMR = shard * (R // shards) + turn
    peak = np.zeros((U, M, shards))
    np.add.at(peak, (line, np.arange(M)[:, None], shard), labels_UMR)
    place_UX = (np.arange(M)[:, None] * R + row_UMR).reshape(U, -1)
    moved = np.take_along_axis(place_UX, slots_UNS.reshape(U, -1), axis=1).reshape(slots_UNS.shape)
    return moved, peak.max(axis=(1, 2)).astype(np.int64)


def choose_unit_shape(lengths_UNS: np.ndarray, *, longest: np.ndarray, per_device: int, shards: int) -> Shape:
    """The rows and the row length in which updates are cheapest, by the cost that `choose_shapes` counts.

    A microbatch has no more tokens on a shard than the padded layout would have: `per_device` units, all of whose
    segments are as long as the longest.

    Args:
      lengths_UNS: of some updates.
      longest: tokens of the longest segment of the run, and of its longest unit, `[2]`.

    Returns:
      with `accum`: the microbatches that these updates need, at most.
    """
    U, N, S = lengths_UNS.shape
    some = lengths_UNS[:: -(-U * N // SAMPLED_UNITS)]
    segment, unit = map(int, longest)
    tokens = max(per_device * S * rung(segment), rung(unit))
    top = min(tokens, max(SHORT_ROW, rung(int(segment * LONG_ROW))))
    seqs = {rung(x) for x in range(segment, top + 1, max(64, segment // 8))} | {rung(unit)}
    best, least = None, np.inf
    for seq in sorted(x for x in seqs if x <= tokens):
        full = tokens // seq
        for rows in sorted({-(-full // n) for n in ROWS}):
            if rows * shards < S and seq < unit:  # its longest unit would find no room
                continue
            shape = Shape(microbatches_at_most(some, rows * shards * seq), rows * shards, seq)
            used = place_units(some, shape)[1]
            each = rows * shards * seq * (1 + seq / ATTENTION_LENGTH) + shards * MICROBATCH_TOKENS
            cost = float((used * each).sum())
            if cost < least:
                best, least = shape._replace(accum=int(used.max())), cost
    assert best is not None
    return best


def microbatches_at_most(lengths_UNS: np.ndarray, tokens: int) -> int:
    """Microbatches of so many tokens that take every update: a bound, as each takes a unit, and few stay half empty."""
    return min(lengths_UNS.shape[1], 4 * -(-int(lengths_UNS.sum(axis=(1, 2)).max()) // tokens) + 1)


def plan_units(
    units: UnitSet, tables: Sequence[np.ndarray], per_device: int, shards: int
) -> tuple[list[Shape], np.ndarray, list[int], int]:
    """Lay out the units of every update of a run, all in one shape.

    Args:
      tables: the updates in pieces, int32 `[updates, units of an update]`, -1 for none.

    Returns:
      the shape; for each update its number, 0; the most labelled targets of a (microbatch, shard); and the token slots
      of all microbatches that are used.
    """
    lengths = units.segment_lengths
    of = lambda table: lengths[table] * (table >= 0)[..., None]
    longest = np.array([lengths.max(), lengths.sum(axis=1).max()])
    shape = choose_unit_shape(of(tables[0]), longest=longest, per_device=per_device, shards=shards)
    used, peak = [], 0
    for table in tables:  # the shape was chosen by some updates: others may need more microbatches
        mine = of(table)
        roomy = shape._replace(accum=microbatches_at_most(mine, shape.batch * shape.seq))
        slots_UNS, used_U = place_units(mine, roomy)
        used.append(used_U)
        counts_UNS = units.counts[table] * (table >= 0)[..., None]
        peak = max(peak, int(deal(slots_UNS, counts_UNS, roomy, shards)[1].max()))
    microbatches = np.concatenate(used)
    shape = shape._replace(accum=int(microbatches.max()))
    return [shape], np.zeros(len(microbatches), np.uint8), [peak], int(microbatches.sum()) * shape.batch * shape.seq


def placed_units(units: UnitSet, table_UN: np.ndarray, shape: Shape, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the units of updates lie, as of `deal`.

    Args:
      table_UN: which units, in the order of each update; -1 for none.

    Raises:
      ValueError: an update does not fit.
    """
    here = (table_UN >= 0)[..., None]
    slots_UNS, used_U = place_units(units.segment_lengths[table_UN] * here, shape)
    if used_U.max() > shape.accum:
        raise ValueError(f"an update needs {used_U.max()} microbatches, and its shape has {shape.accum}")
    return deal(slots_UNS, units.counts[table_UN] * here, shape, shards)
