"""Pairs and marked answers from which little can be learned: equal ones, empty ones, and those that are cut."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def poor_answers(batch: pa.Table, made: pa.Table) -> dict[str, list[int]]:
    """Rows of a batch that were encoded, by what is the matter with their answers.

    Args:
      batch: aligned rows, with a column `rejected` (pairs) or `desirable` (feedback); of others nothing is said.
      made: what they were encoded as, row by row.

    Returns:
      "equal": chosen and rejected answer are the same; "late": they differ only in what is cut off; "empty": an answer
      has no text; "long": more tokens than cutoff_len.
    """
    pairs = "rejected" in batch.column_names
    if not pairs and "desirable" not in batch.column_names:
        return {}
    kept, cut = _column(made, "fault") == "", _column(made, "cut")
    chosen = _last_contents(batch)
    rejected = _field(batch["rejected"], "content") if pairs else chosen
    found = {"empty": _is_empty(chosen) | _is_empty(rejected), "long": cut}
    if pairs:
        same = _same_lists(made["chosen_input_ids"], made["rejected_input_ids"])
        late = same & cut & (chosen != rejected)
        found |= {"equal": same & ~late, "late": late}
    return {kind: np.flatnonzero(rows & kept).tolist() for kind, rows in found.items()}


def _column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy(zero_copy_only=False)


def _field(structs: pa.ChunkedArray, name: str) -> np.ndarray:
    return structs.combine_chunks().field(name).to_numpy(zero_copy_only=False)


def _last_contents(batch: pa.Table) -> np.ndarray:
    """The content of the last message of each row; of rows without messages, which are left out, any."""
    messages = batch["messages"].combine_chunks()
    contents: Any = messages.values.field("content")
    last = np.maximum(messages.offsets.to_numpy()[1:] - 1, 0)
    if not len(contents):
        return np.full(len(messages), None)
    return contents.take(pa.array(last)).to_numpy(zero_copy_only=False)


def _is_empty(texts: np.ndarray) -> np.ndarray:
    return np.array([not (text or "").strip() for text in texts], bool)


def _same_lists(first: pa.ChunkedArray, second: pa.ChunkedArray) -> np.ndarray:
    """Whether the lists of two columns are equal, bool `[rows]`."""
    a, b = first.combine_chunks(), second.combine_chunks()
    same = pc.call_function("equal", [pc.call_function("list_value_length", [x]) for x in (a, b)]).to_numpy(False)
    for row in np.flatnonzero(same):
        same[row] = a[int(row)].values.equals(b[int(row)].values)
    return same
