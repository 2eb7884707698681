"""Packing of examples into rows of a fixed length, by their lengths alone.

`pack` makes the rows of a packed run once, as LLaMA-Factory does. `best_fit_many` lays out the examples of thousands of
updates side by side: longest first, each into the fullest row that still takes it.
"""

from array import array
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jtune.errors import DataError

# Examples that are packed together: more would hardly waste less.
WINDOW = 2**16

# Entries of the table of free space that best_fit_many works on at a time: they stay in a core's cache.
CACHED_ENTRIES = 2**17


@dataclass(frozen=True, eq=False)
class Packs:
    """Examples grouped in rows: row r holds `examples[starts[r] : starts[r + 1]]`."""

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


def pack(lengths: np.ndarray, row_length: int, windows: np.ndarray | None = None) -> Packs:
    """Group examples into rows of at most `row_length` tokens: each row takes the longest example that still fits.

    By LLaMA-Factory's rule: in windows of its batches, the same examples share a row, in the same order of rows.

    >>> [row.tolist() for row in pack(np.array([2, 4, 6, 2, 8]), 14)]
    [[4, 2], [1, 3, 0]]

    Args:
      windows: int `[n]`, not falling; examples of different windows do not share a row (see `preprocessing_batches`).
        Default: windows of 65,536 examples.

    Raises:
      DataError: an example is longer than a row.
    """
    lengths = np.asarray(lengths)
    if len(lengths) == 0:
        return Packs(np.zeros(0, np.int32), np.zeros(1, np.int64))
    if lengths.max() > row_length:
        worst = int(lengths.argmax())
        raise DataError(f"example {worst} has {lengths[worst]} tokens and cannot be packed into rows of {row_length}")
    if windows is None:
        windows = np.arange(len(lengths)) // WINDOW
    examples = array("i")
    starts = array("q", [0])
    begins = np.flatnonzero(np.diff(windows, prepend=-1)).tolist()
    for begin, end in pairwise([*begins, len(lengths)]):
        sizes = np.maximum(lengths[begin:end], 1)
        order = np.argsort(sizes, kind="stable")  # of equal lengths, the last one is taken first
        waiting = (order + begin).tolist()
        # waiting[: ends[length]] are those of at most `length` tokens, and of that length those from firsts[length] on.
        ends = np.searchsorted(sizes[order], np.arange(row_length + 1), side="right").tolist()
        firsts = [0, *ends[:-1]]
        # The longest that fits: from a length that has no examples left, a link leads to a shorter one.
        link = [length if ends[length] > firsts[length] else max(0, length - 1) for length in range(row_length + 1)]
        left = end - begin
        while left:
            free = row_length
            while True:
                length = free
                while link[length] != length:
                    link[length] = length = link[link[length]]
                if length == 0:
                    break
                ends[length] -= 1
                examples.append(waiting[ends[length]])
                if ends[length] == firsts[length]:
                    link[length] = length - 1
                free -= length
                left -= 1
            starts.append(len(examples))
    return Packs(np.frombuffer(examples, np.int32), np.frombuffer(starts, np.int64))


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
