"""Encoded rows on disk, as numpy arrays that nobody copied."""

from dataclasses import dataclass
from functools import cached_property

import datasets
import numpy as np

from jtune.data.cache.shards import arrow_column, preprocessing_batches
from jtune.errors import DataError

IGNORED = -100  # the label of a token that is not learned


@dataclass(frozen=True, eq=False)
class Encoded:
    """Encoded examples, memory-mapped: `len(encoded)`, `encoded[i]`.

    Attributes:
      table: what one of the functions below made; without labels, all tokens are learned.
      kept: rows of `table` that are examples, int64; None: all.
      prefix: begins the names of the columns of ids and labels: "chosen_", "rejected_", "kl_".
    """

    table: datasets.Dataset
    kept: np.ndarray | None = None
    prefix: str = ""

    def __len__(self) -> int:
        return len(self.table) if self.kept is None else len(self.kept)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`input_ids` and `labels`, int32 `[length]`, read-only views of the file."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        row = index % len(self) if self.kept is None else int(self.kept[index])
        ids = self._ids[row]
        return {"input_ids": ids, "labels": ids if self._labels is None else self._labels[row]}

    @property
    def rows(self) -> datasets.Dataset:
        """The examples as a table of ids and labels: `input_ids` and `labels`, of pairs `chosen_input_ids` ..."""
        shown = ("input_ids", "labels", "kto_tags", "margin")
        names = [name for name in self.table.column_names if name.endswith(shown)]
        table = self.table.select_columns(names)
        return table if self.kept is None else table.select(self.kept)

    def segment(self, index: int) -> dict[str, np.ndarray]:
        """Example `index`, which is one sequence."""
        return self[index]

    @property
    def rejected(self) -> "Encoded":
        """Of pairs, the other side."""
        return Encoded(self.table, self.kept, "rejected_")

    @property
    def mismatched(self) -> "Encoded":
        """Of feedback, each prompt with the answer to another one."""
        return Encoded(self.table, self.kept, "kl_")

    def column(self, name: str) -> np.ndarray | None:
        """A column of numbers of the examples, float32 `[n]`; None where the table has none of that name."""
        if name not in self.table.column_names:
            return None
        return self._of_kept(arrow_column(self.table, name).to_numpy(zero_copy_only=False)).astype(np.float32)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 `[n]`."""
        return self._of_kept(self._ids.lengths)

    @cached_property
    def labelled(self) -> np.ndarray:
        """Targets of each example, int32 `[n]`: places t with labels[t + 1] != -100. The first token is no target."""
        if self._labels is None:
            return np.maximum(self.lengths - 1, 0)
        return self._of_kept(self._labels.count_after_first(IGNORED))

    @cached_property
    def first_labelled(self) -> np.ndarray:
        """int32 `[n]`: 1 where the first token has a label; nothing predicts it, yet HF's Trainer counts it."""
        if self._labels is None:
            return (self.lengths > 0).astype(np.int32)
        return self._of_kept(self._labels.first_is_not(IGNORED))

    def preprocessing_batches(self, batch_size: int, processes: int | None) -> np.ndarray:
        """Which batch of rows each example was encoded in, int64 `[n]` (see jtune.data.batching.pack)."""
        return self._of_kept(preprocessing_batches(len(self.table), batch_size, processes))

    def _of_kept(self, per_row: np.ndarray) -> np.ndarray:
        return per_row if self.kept is None else per_row[self.kept]

    @cached_property
    def _ids(self) -> "Lists":
        return Lists(self.table, f"{self.prefix}input_ids")

    @cached_property
    def _labels(self) -> "Lists | None":
        name = f"{self.prefix}labels"
        return Lists(self.table, name) if name in self.table.column_names else None


class Lists:
    """A column of int32 lists as numpy views of the Arrow buffers: nothing is copied, no Python list is made."""

    def __init__(self, table: datasets.Dataset, name: str):
        chunks = [c for c in table.data.column(name).chunks if len(c)]
        self.offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self.values = [chunk.values.to_numpy() for chunk in chunks]
        self.starts = np.concatenate([[0], np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)])

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self.starts, row, side="right")) - 1
        start, end = self.offsets[chunk][row - self.starts[chunk] :][:2]
        return self.values[chunk][start:end]

    @property
    def lengths(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int32), *(np.diff(offsets) for offsets in self.offsets)]).astype(np.int32)

    def max(self) -> int:
        return max((int(v[o[0] : o[-1]].max()) for v, o in zip(self.values, self.offsets) if o[-1] > o[0]), default=-1)

    def count_after_first(self, ignored: int) -> np.ndarray:
        """How many values of each list, but for its first, are not `ignored`, int32."""
        counts = [np.zeros(0, np.int32)]
        for values, offsets in zip(self.values, self.offsets):
            first, last = offsets[0], offsets[-1]
            counted = values[first:last] != ignored
            before = np.concatenate([[0], np.cumsum(counted, dtype=np.int32)])
            starts, ends = offsets[:-1] - first, offsets[1:] - first
            counts.append(before[ends] - before[np.minimum(starts + 1, ends)])
        return np.concatenate(counts).astype(np.int32)

    def first_is_not(self, ignored: int) -> np.ndarray:
        """1 for each list whose first value is not `ignored`, int32; 0 for the others and for empty lists."""
        found = [np.zeros(0, np.int32)]
        for values, offsets in zip(self.values, self.offsets):
            starts, filled = offsets[:-1], np.diff(offsets) > 0
            first = np.zeros(len(starts), bool)
            first[filled] = values[starts[filled]] != ignored
            found.append(first.astype(np.int32))
        return np.concatenate(found)


def check_vocabulary(encoded: Encoded, vocab_size: int) -> None:
    """Raise a DataError if an id is outside a vocabulary of `vocab_size`: the model has no embedding for it."""
    check_id(encoded._ids.max(), vocab_size)


def check_id(highest: int, vocab_size: int) -> None:
    """`check_vocabulary`, of the highest id that there is."""
    if highest >= vocab_size:
        raise DataError(
            f"token id {highest} is outside the model's vocabulary of {vocab_size}: the tokenizer has more tokens than "
            "the model. Is it the model's tokenizer, and `template` the model's template (another one's special tokens "
            "are added to the vocabulary)? If so: resize_vocab: true gives the model rows for them"
        )
