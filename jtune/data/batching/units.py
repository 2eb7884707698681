"""Pairs and marked answers as what a plan lays out: each is one item, whose segments lie in rows of one microbatch.

Where a token counts, and for how much, is said by weights: of answers their tokens, of scores the last token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jtune.config.stages import StageRules
from jtune.data.batching.shapes import Shape
from jtune.data.encode.encoded import IGNORED

OTHER = "kl_"  # begins the names of the arrays of mismatched answers
TOKENS = {"input_ids": np.int32, "targets": np.int32, "positions": np.int32, "segment_ids": np.int32,
          "loss_weights": np.float32}  # the arrays [..., batch, seq] of every batch  # fmt: skip

Segment = Mapping[str, np.ndarray]  # input_ids, labels int32 [length]; perhaps weights float32 [length], of each target


@dataclass(frozen=True, eq=False)
class UnitSet:
    """Encoded units: `len(units)`, `units.segments(i)`, and what a plan needs to know of each.

    Attributes:
      sides: for each segment of a unit the set that has it: an `Encoded`, or several in one line.
      scores: what counts of a segment is its last token, and no label.
      beyond: weight of the tokens of an answer that the other one of its pair is too short for (alpha of LD-DPO,
        arXiv:2409.06411). None: that of all others.
      mismatched: of feedback, the same prompts with answers to other ones.
    """

    sides: tuple[Any, ...]
    scores: bool = False
    beyond: float | None = None
    mismatched: "UnitSet | None" = None

    def __len__(self) -> int:
        return len(self.sides[0])

    @cached_property
    def segment_lengths(self) -> np.ndarray:
        """Tokens of each segment, int64 `[n, segments]`."""
        return np.stack([side.lengths for side in self.sides], axis=1).astype(np.int64)

    @cached_property
    def shortest(self) -> int:
        """Tokens of the shortest segment."""
        return max(1, int(self.segment_lengths.min()))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each unit, int32 `[n]`."""
        return self.segment_lengths.sum(axis=1, dtype=np.int32)

    @cached_property
    def labelled(self) -> np.ndarray:
        """Targets of each unit that have a weight, at most, int32 `[n]`."""
        return self.counts.sum(axis=1).astype(np.int32)

    @cached_property
    def counts(self) -> np.ndarray:
        """Targets of each segment, float32 `[n, segments]`; of scores 1."""
        if self.scores:
            return np.ones((len(self), len(self.sides)), np.float32)
        return np.stack([side.labelled for side in self.sides], axis=1).astype(np.float32)

    @cached_property
    def fields(self) -> dict[str, np.ndarray]:
        """What a loss sees of each unit besides its tokens (`jtune.losses.units.Units`), float32 `[n, ...]`."""
        found = {"counts": self.counts}
        for name, column in (("wanted", "kto_tags"), ("margin", "margin")):
            values = self.sides[0].column(column)
            if values is not None:
                found[name] = values
        return found

    def segments(self, index: int) -> tuple[Segment, ...]:
        """The segments of unit `index`."""
        read = tuple(side[index] for side in self.sides)
        if self.scores:
            return tuple({**segment, "weights": _last(len(segment["input_ids"]))} for segment in read)
        if self.beyond is None:
            return read
        common = int(self.counts[index].min())
        return tuple({**segment, "weights": _within(segment["labels"], common, self.beyond)} for segment in read)


def _last(length: int) -> np.ndarray:
    weights = np.zeros(length, np.float32)
    weights[-1] = 1
    return weights


def _within(labels: np.ndarray, common: int, beyond: float) -> np.ndarray:
    counts = np.append(labels[1:] != IGNORED, False)
    return np.where(counts, np.where(np.cumsum(counts) <= common, 1, beyond), 0).astype(np.float32)


def units_of(encoded: Any, stage: StageRules, beyond: float | None = None) -> Any:
    """What a plan lays out of an encoded set: its examples, or its units where a stage learns from those.

    Args:
      beyond: see `UnitSet`; of pairs whose answers are learned.
    """
    if stage.rows == "pair":
        return UnitSet((encoded, encoded.rejected), stage.scores, None if stage.scores else beyond)
    if stage.rows == "feedback":
        return UnitSet((encoded,), mismatched=UnitSet((encoded.mismatched,)))
    return encoded


class Sizes(NamedTuple):
    """The static sizes of the batch of an update, besides its shape.

    Attributes:
      labelled: positions with a weight of a microbatch on a shard, at most.
      width: units whose first segment is in a row, at most; 0: there are no units.
      segments: of a row, at most.
      fields: of units, the names of what a loss sees of each, besides group and share, and the axes of one.
      other: of feedback, the shape and sizes of the mismatched answers.
    """

    labelled: int
    width: int = 0
    segments: int = 0
    fields: tuple[tuple[str, tuple[int, ...]], ...] = ()
    other: "tuple[Shape, Sizes] | None" = None


def sizes_of_fields(fields: Mapping[str, np.ndarray]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, values.shape[1:]) for name, values in fields.items())


def array_shapes(shape: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array of the batch of an update, but for its divisor, as `BatchPlan.update` gives them.

    Args:
      shape: `[accum, batch, seq]`.
    """
    accum, batch, _ = shape
    integer, real = np.dtype(np.int32), np.dtype(np.float32)
    found: dict[str, Any] = {name: (tuple(shape), np.dtype(of_token)) for name, of_token in TOKENS.items()}
    if sizes.width:
        of_units = accum, batch, sizes.width
        found |= {"group": (of_units, integer), "share": (of_units, real)}
        found["owner"] = (accum, batch, sizes.segments), integer
        found |= {name: ((*of_units, *axes), real) for name, axes in sizes.fields}
    if sizes.other is not None:
        found |= {OTHER + name: x for name, x in array_shapes(*sizes.other).items()}
    return found


def assumed_sizes(stage: StageRules, shape: tuple[int, int, int], shards: int) -> Sizes:
    """The sizes of batches of full rows, a unit in each, in which every token counts, for what is not read yet."""
    labelled = shape[1] // shards * shape[2]
    if not stage.has_preferences:
        return Sizes(labelled)
    segments = 2 if stage.rows == "pair" else 1
    fields = (("counts", (segments,)), ("reference", (segments, 2)), *([("wanted", ())] if segments == 1 else []))
    of_scores = shape[1] // shards * segments
    sizes = Sizes(of_scores if stage.scores else labelled, 1, segments, fields)
    return sizes if segments == 2 else sizes._replace(other=(Shape(*shape), sizes))


def segments_of(encoded: Any, stage: StageRules) -> Any:
    """What attends to itself of an encoded set: its examples, or the segments of its units. Lengths, and labels."""
    units = units_of(encoded, stage)
    return Segments(units) if isinstance(units, UnitSet) else units


class Segments:
    """The segments of units in one line, as examples of an evaluation: those of unit i begin at `i * width`."""

    def __init__(self, units: UnitSet):
        self.units, self.width = units, len(units.sides)

    def __len__(self) -> int:
        return len(self.units) * self.width

    @cached_property
    def lengths(self) -> np.ndarray:
        return self.units.segment_lengths.ravel().astype(np.int32)

    @cached_property
    def labelled(self) -> np.ndarray:
        return self.units.counts.ravel().astype(np.int32)

    @cached_property
    def first_labelled(self) -> np.ndarray:
        """0: the first token of a segment has no label that counts."""
        return np.zeros(len(self), np.int32)

    def segment(self, index: int) -> Segment:
        return self.units.segments(index // self.width)[index % self.width]


def grouped(units: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`group` int32 and `share` float32 `[units]`, of units in groups of `size`; the last one may be smaller.

    >>> grouped(3, 2)
    (array([0, 0, 1], dtype=int32), array([0.5, 0.5, 1. ], dtype=float32))
    """
    group = (np.arange(units) // size).astype(np.int32)
    return group, (1 / np.bincount(group)[group]).astype(np.float32) if units else np.zeros(0, np.float32)


def unit_arrays(
    fields: Mapping[str, np.ndarray], slots: np.ndarray, shape: Shape, widths: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Fields of units, `[n, ...]`, laid out beside the rows of their first segments: `[accum * batch, width, ...]`, 0
    where no unit is; and `owner` int32 `[accum * batch, segments of a row]`: of each segment of a row, in their order,
    which one of its microbatch it is, `(row * width + unit) * S + side`.

    Args:
      slots: the row of each segment, `microbatch * batch + row`, int64 `[n, S]`; in this order they lie in it.
      widths: units whose first segment is in a row, and segments of a row, at most.
    """
    S, (accum, batch, _), (width, segments) = slots.shape[1], shape, widths
    rows, first = accum * batch, slots[:, 0]
    place = places(first)
    found = {}
    for name, values in fields.items():
        found[name] = np.zeros((rows, width, *values.shape[1:]), values.dtype)
        found[name][first, place] = values
    owner = np.zeros((rows, segments), np.int32)
    mine = (first % batch * width + place)[:, None] * S + np.arange(S)
    owner[slots.ravel(), places(slots.ravel())] = mine.ravel()
    return found | {"owner": owner}


def places(slots: np.ndarray) -> np.ndarray:
    """The place of each item in its row, of items that lie in rows in their order.

    >>> places(np.array([1, 0, 1, 1]))
    array([0, 0, 1, 2])
    """
    order, number = np.argsort(slots, kind="stable"), np.arange(len(slots))
    first = np.maximum.accumulate(np.where(np.diff(slots[order], prepend=-1) != 0, number, 0)) if len(slots) else number
    place = np.empty(len(slots), np.int64)
    place[order] = number - first
    return place
