"""Encoded rows as text: marked for people, as JSON for programs, and the statistics of all."""

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
from rich.text import Text

from jtune.config import Config
from jtune.data.batching.updates import plan_updates
from jtune.data.encode.encoded import IGNORED, Encoded
from jtune.data.stream import Stream

TRAINED, GIVEN = "bold green", "dim"
BRACKETS = "\u27e6", "\u27e7"  # mark trained-on text where there are no colours: rare in text, unlike plain brackets
BINS = 12  # of the histogram of lengths
BAR = 40  # characters of its longest bar


TAGS = "kto_tags"  # the column of feedback


def sides(encoded: Encoded) -> dict[str, Encoded]:
    """What a row consists of, by name: both answers of a pair; an answer that is good or not and, for KTO's estimate of
    the divergence, its prompt with another one's answer. Other rows are one, without a name.
    """
    if encoded.prefix:
        return {"chosen": encoded, "rejected": encoded.rejected}
    if TAGS in encoded.table.column_names:
        return {"answer": encoded, "KL": encoded.mismatched}
    return {"": encoded}


def describe_row(encoded: Encoded, row: int, side: str) -> str:
    """What is said of a side of a row besides its name: whether an answer is good, or by how much it is better."""
    names = encoded.table.column_names
    if side == "answer":
        return "good" if encoded.rows[row][TAGS] else "bad"
    if side == "chosen" and "margin" in names:
        return f"margin {encoded.rows[row]['margin']:g}"
    return "with the answer of another row (measured, not trained on)" if side == "KL" else ""


def json_rows(encoded: Encoded, rows: int) -> Iterator[str]:
    """The first `rows` rows, as encoded before packing: input_ids and labels; in stage pt, input_ids; in stages of
    preferences, LLaMA-Factory's columns (chosen_input_ids ..., kto_tags).
    """
    for row in encoded.rows.select(range(min(rows, len(encoded)))):
        yield json.dumps(row)


def marked(row: dict[str, np.ndarray], tokenizer: Any, *, styled: bool = True) -> Text:
    """The text of a row; trained-on tokens stand out. Runs of tokens are decoded, as several may share a character."""
    learned = row["labels"] != IGNORED
    learned[:1] = False  # nothing comes before the first token that could predict it
    text = Text()
    for is_learned, run in groupby(zip(learned.tolist(), row["input_ids"].tolist()), key=lambda pair: pair[0]):
        words = tokenizer.decode([token for _, token in run])
        if is_learned and not styled:
            words = words.join(BRACKETS)
        text.append(words, style=TRAINED if is_learned else GIVEN)
    return text


def statistics(config: Config, encoded: Encoded, stream: Stream | None = None) -> str:
    """Tokens, lengths, and the batches of an epoch on one device; of a stream, those of the run: `encoded` is then its
    first window.
    """
    read = sides(encoded)
    other = read.pop("KL", None)
    lengths = np.concatenate([side.lengths for side in read.values()])
    tokens = int(lengths.sum(dtype=np.int64))
    learned = sum(int(side.labelled.sum(dtype=np.int64)) for side in read.values())
    rows, what = ("pairs", "an answer and its prompt") if encoded.prefix else ("rows", "a row")
    lines = [
        f"{len(encoded)} {rows}, {tokens} tokens, {learned} of them trained on ({learned / tokens:.1%})",
        f"tokens in {what}: mean {lengths.mean():.0f}, median {np.median(lengths):.0f}, longest {lengths.max()}",
        *histogram(lengths),
    ]
    if other is not None:
        good = int(np.count_nonzero(encoded.rows[TAGS][:]))
        lines.append(f"{good} good answers, {len(encoded) - good} bad")
        lines.append(f"KL: {len(other)} rows, {int(other.lengths.sum(dtype=np.int64))} tokens, none of them trained on")
    plan = plan_updates(config, encoded, 1, stream)
    shapes = ", ".join("x".join(map(str, shape)) for shape in plan.shapes)
    steps = f"{plan.updates_per_epoch} steps an epoch, {plan.max_steps} in all" if stream is None else plan.describe()
    lines.append(f"on one device: {steps}; batches [accum x batch x seq] {shapes}, {plan.padding_share:.1%} padding")
    return "\n".join(lines)


def histogram(lengths: np.ndarray) -> list[str]:
    """Rows by their length, a line for each bin.

    >>> print(*histogram(np.array([1, 2, 2, 9])), sep="\\n")
      1-5               3 ████████████████████████████████████████
      6-9               1 █████████████
    """
    first, last = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(last - first + 1) // min(BINS, len(set(lengths.tolist())) - 1 or 1)))
    counts = np.bincount((lengths - first) // width)
    lines = []
    for i, count in enumerate(counts.tolist()):
        label = f"{first + i * width}-{min(first + (i + 1) * width - 1, last)}"
        lines.append(f"  {label:11} {count:>7} {'█' * round(BAR * count / counts.max())}".rstrip())
    return lines
