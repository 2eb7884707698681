"""Best-fit-decreasing packing of examples into rows of a fixed length, by their lengths alone.

Two forms of the same rule (longest first, each into the fullest row that still takes it; a new row when none does):
`pack` solves one large problem, a window of the dataset, once for a run; `best_fit_many` solves thousands of small ones
side by side, one for each update.
"""

from dataclasses import dataclass

import numpy as np

from jtune.errors import DataError

# Examples that are packed together. Best fit leaves well below 1% of the rows empty with far fewer; a window keeps time
# and memory flat, and the rows near their place in the dataset.
WINDOW = 50_000

# Entries of the table of free space that best_fit_many works on at a time: they stay in a core's cache.
CACHED_ENTRIES = 2**17


@dataclass(frozen=True, eq=False)
class Packs:
    """Examples grouped in rows: row r holds `examples[starts[r] : starts[r + 1]]`, in the order of the dataset."""

    examples: np.ndarray  # int32 [n]
    starts: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.examples[self.starts[row] : self.starts[row + 1]]

    def sums(self, per_example: np.ndarray) -> np.ndarray:
        """Sum of a quantity of the examples (tokens, labels) over each row, int64 `[rows]`."""
        totals = np.concatenate([[0], np.cumsum(per_example[self.examples], dtype=np.int64)])
        return totals[self.starts[1:]] - totals[self.starts[:-1]]

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The examples of several rows, and for each the place of its row in `rows`: int32, int64 `[examples]`."""
        sizes = self.starts[rows + 1] - self.starts[rows]
        examples = [self[row] for row in rows]
        return np.concatenate(examples) if examples else self.examples[:0], np.repeat(np.arange(len(rows)), sizes)


def pack(lengths: np.ndarray, row_length: int, window: int = WINDOW) -> Packs:
    """Group examples into rows of at most `row_length` tokens.

    Each window of the dataset is packed on its own; rows are ordered by their first example, so that rows in order are
    nearly the dataset in order. An example as long as the row has it alone.

    >>> [row.tolist() for row in pack(np.array([2, 4, 6, 2, 8]), 14)]
    [[0, 1, 3], [2, 4]]

    Raises:
      DataError: an example is longer than a row.
    """
    lengths = np.asarray(lengths)
    if len(lengths) == 0:
        return Packs(np.zeros(0, np.int32), np.zeros(1, np.int64))
    if lengths.max() > row_length:
        worst = int(lengths.argmax())
        raise DataError(f"example {worst} has {lengths[worst]} tokens and cannot be packed into rows of {row_length}")
    rows = np.empty(len(lengths), np.int64)
    used = 0
    for part in np.array_split(np.arange(len(lengths)), -(-len(lengths) // window)):
        _, first, row = np.unique(_best_fit(lengths[part], row_length), return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        rows[part] = used + rank[row]
        used += len(first)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows))])
    return Packs(np.argsort(rows, kind="stable").astype(np.int32), starts)


def _best_fit(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """The row of each example, int64 `[n]`. A million examples take about a second."""
    # Rows are kept by their free space; bit f of `frees` tells whether there is a row with f tokens free, so that the
    # fullest row with enough space is the lowest bit from `length` on.
    rows_with = [[] for _ in range(row_length + 1)]
    frees = 0
    opened = 0
    order = np.argsort(-lengths, kind="stable")
    placed = []
    for length in lengths[order].tolist():
        fitting = frees >> length
        if fitting:
            free = (fitting & -fitting).bit_length() - 1 + length
            row = rows_with[free].pop()
            if not rows_with[free]:
                frees ^= 1 << free
        else:
            free, row = row_length, opened
            opened += 1
        placed.append(row)
        if not rows_with[free - length]:
            frees |= 1 << (free - length)
        rows_with[free - length].append(row)
    rows = np.empty(len(lengths), np.int64)
    rows[order] = placed
    return rows


def best_fit_many(lengths_UN: np.ndarray, row_length: int) -> np.ndarray:
    """Best fit for U problems of up to N examples each, side by side.

    Args:
      lengths_UN: each line sorted, longest first, filled up with 0; none above `row_length`.

    Returns:
      the row of each example, int32 `[U, N]`; a problem uses rows 0 .. max without gaps.
    """
    U, N = lengths_UN.shape
    # Any two rows of a best fit hold more than one row between them, so there are fewer than twice the least number.
    K = min(N, 2 * int(lengths_UN.sum(axis=1).max(initial=0)) // row_length + 1)
    rows_UN = np.empty((U, N), np.int32)
    lengths_UN = lengths_UN.astype(np.uint32)
    size = max(1, CACHED_ENTRIES // K)
    for start in range(0, U, size):
        part = lengths_UN[start : start + size]
        free = np.full((len(part), K), row_length, np.uint32)
        lines = np.arange(len(part))
        for n in range(N):
            # Unsigned: where an example does not fit, the difference wraps to a huge number. Unopened rows have the
            # most space, and the lowest of them comes first: the least space left is best fit, with no other case.
            left = free[:, : n + 1] - part[:, n, None]
            row = left.argmin(axis=1)
            free[lines, row] = left[lines, row]
            rows_UN[start : start + size, n] = row
    return rows_UN
