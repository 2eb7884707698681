"""The updates of a run over a stream: as a `BatchPlan` to whoever trains, but its rows are read on the way.

The units of a stream (examples, or packed rows) are those of its windows, one window after the other, each shuffled. An
update takes the next ones, as many as every other, over the ends of windows and passes: which ones follows from its
number. Only the windows that updates are being made of are in memory, and the next one, which a thread prepares.

Shapes are chosen by the first window, as for a run over it. What does not fit into any of them, as lengths may be other
ones later, goes into the last shape, which takes whatever can come.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jtune.data.batching.order import epoch_order
from jtune.data.batching.pack import Packs, pack
from jtune.data.batching.place_units import deal, place_units
from jtune.data.batching.shapes import Shape, costs, place, rows_needed, rung
from jtune.data.batching.train import (
    BatchPlan,
    Examples,
    Layout,
    UnitLayout,
    capacity_of,
    filled,
    lay_out,
    packing_windows,
    same_rows,
)
from jtune.data.batching.units import OTHER, Sizes, UnitSet, sizes_of_fields
from jtune.data.encode.encoded import Encoded
from jtune.data.sources.load import places
from jtune.data.stream import Position, Stream, windows

HEADROOM = 1.1  # labelled targets of a shard may be so many times those of the first window, before the last shape
KEPT = 8  # updates whose windows are kept behind the one that is being made: the loop asks for tokens of earlier ones


class Part(NamedTuple):
    """A window, with its units in the order in which updates take them."""

    encoded: Encoded
    examples: Examples  # of `encoded`: they, or the units that are made of them
    packs: Packs | None  # None: units of the stream are examples
    order: np.ndarray  # int32 [units]
    first: int  # the number of its first unit in the stream
    begin: Position
    end: Position

    @property
    def stop(self) -> int:
        return self.first + len(self.order)

    def take(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of the units `first` up to `stop` of the stream that lie in here, and the unit of each."""
        first, stop = max(first, self.first), min(stop, self.stop)
        rows = self.order[first - self.first : stop - self.first]
        if self.packs is None:
            return rows, first + np.arange(len(rows))
        examples, slots = self.packs.take(rows)
        return examples, first + slots


class StreamPlan:
    """The interface of a `BatchPlan`, for updates that are asked for in order. It reads and forgets, hence a class.

    `position(step)` is what a checkpoint must keep, and `seek` goes on from there. One thread at a time may call
    `update` and `shape`; others may ask about the updates that it has made.
    """

    num_epochs = 1

    def __init__(
        self, stream: Stream, model: BatchPlan, *, max_steps: int, cutoff_len: int, units_of: Callable[[Encoded], Any]
    ):
        """
        Args:
          model: the plan of a run over the first window alone.
          units_of: what is laid out of a window (`jtune.data.batching.units.units_of`).
        """
        self.units_of = units_of
        self.stream, self.model, self.max_steps, self.cutoff_len = stream, model, max_steps, cutoff_len
        self.updates_per_epoch = max_steps
        self.shards, self.packed = model.shards, model.packs is not None
        batch, accumulation = model.epochs.batch, model.epochs.accumulation
        self.size = batch * accumulation  # units of an update
        # As many rows as an update has units, each as long as one can be, all labelled: more cannot come. The further
        # microbatch, always empty, makes it another shape than full rows are usually in.
        segments = len(model.encoded.sides) if isinstance(model.encoded, UnitSet) else 1
        last = Shape(accumulation + 1, batch, cutoff_len if self.packed else rung(segments * cutoff_len))
        self.capacities = capacities_of(model, last)
        self.shapes = tuple(self.capacities)
        if model.mismatched is not None:
            last = last._replace(seq=rung(cutoff_len))
            self.mismatched_capacities = capacities_of(model.mismatched, last)
        self.seek({})

    def seek(self, position: Position) -> None:
        """Go to what `position(step)` was, {}: to the beginning. The next update must be that `step`."""
        self._begin = position
        self._parts: tuple[Part, ...] = ()  # replaced as a whole: other threads see the one or the other
        self._coming = self._read(position)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._next: Future[Part] | None = None
        self._made: tuple[int, Layout] | None = None

    # ------------------------------------------------------------------ what the run is

    @property
    def padding_share(self) -> float:
        return self.model.padding_share

    @property
    def examples_per_update(self) -> int:
        return self.model.examples_per_update

    def describe(self) -> str:
        updates = f", {self.max_steps:,} updates" if self.max_steps > 0 else ""
        return f"a stream in windows of {self.stream.data_args.buffer_size:,} rows{updates}"

    def mean_tokens(self, most: int) -> float:
        return self.model.mean_tokens(most)

    def label_capacity(self, shape: tuple[int, int, int]) -> int:
        return self.capacities[Shape(*shape)]

    def sizes(self, shape: tuple[int, int, int], other: tuple[int, int, int] | None = None) -> Sizes:
        """As of a `BatchPlan`. How short units may get is not known: an update has `size` of them."""
        if self.model.fields is None:
            return Sizes(self.label_capacity(shape))
        fields, more = sizes_of_fields(self.model.fields), None
        if self.model.mismatched is not None:
            of_other = next(iter(self.mismatched_capacities)) if other is None else Shape(*other)
            of_fields = sizes_of_fields(self.model.mismatched.fields or {})
            more = of_other, Sizes(self.mismatched_capacities[of_other], self.size, self.size, of_fields)
        segments = self.size * len(self.model.encoded.sides)  # type: ignore[attr-defined]
        return Sizes(self.label_capacity(shape), self.size, segments, fields, more)

    def epoch_at(self, step: int) -> float:
        """The share of the run that is done: how long a pass is, nobody knows. So has the Trainer, in a first pass."""
        return step / self.max_steps

    # ------------------------------------------------------------------ updates

    def shape(self, step: int) -> Shape:
        return self._layout(step).shape

    def update(self, step: int, only: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
        """As of a `BatchPlan`."""
        layout = self._layout(step)
        arrays = lay_out(layout, self.shards, only, f"update {step}")
        units = layout.encoded
        if not isinstance(units, UnitSet) or units.mismatched is None:
            return arrays
        other = self._placed(units.mismatched, layout.examples, layout.examples, self.mismatched_capacities)
        rows = None if only is None else same_rows(only, layout.shape, other.shape)
        laid = lay_out(other, self.shards, rows, f"update {step}")
        return arrays | {OTHER + name: x for name, x in laid.items() if name != "divisor"}

    def tokens(self, step: int) -> int:
        encoded, examples, _ = self._taken(step)
        return int(encoded.lengths[examples].sum())

    def explain(self, step: int) -> str:
        found: list[str] = []
        for part in self._spanned(step):
            examples, _ = part.take(step * self.size, (step + 1) * self.size)
            table = part.encoded.table
            if "row" not in table.column_names:  # a block of text holds pieces of many rows
                return f"rows of window {part.begin['window'] + 1} of the stream"
            kept = examples if part.encoded.kept is None else part.encoded.kept[examples]
            found += places(self.stream.named, table.select(kept[:8]))
        return f"{', '.join(found[:8])} ..."

    def position(self, step: int) -> dict[str, Any]:
        """Where the stream is when `step` updates have been done, JSON-able: the window with the first unit of the next
        one, which is read again from there.
        """
        unit = step * self.size
        for part in self._parts:
            if part.first <= unit < part.stop:
                return {**part.begin, "unit": part.first}
        return {**self._parts[-1].end, "unit": self._parts[-1].stop} if self._parts else dict(self._begin)

    # ------------------------------------------------------------------ reading and forgetting

    def _read(self, position: Position) -> Iterator[Part]:
        """The windows from `position` on, cut into units."""
        first, order, args = position.get("unit", 0), self.model.epochs, self.stream.data_args
        for window in windows(self.stream, position or None):
            encoded = window.encoded
            packs = None
            if self.packed:
                may_share = packing_windows(encoded, args, self.stream.stage)
                packs = pack(encoded.lengths, filled(encoded, self.cutoff_len), may_share)
            units = len(encoded if packs is None else packs)
            taken = epoch_order(units, order.seed, window.number, order.shuffle)
            yield Part(encoded, self.units_of(encoded), packs, taken, first, window.begin, window.end)
            first += units

    def _layout(self, step: int) -> Layout:
        if self._made is None or self._made[0] != step:
            self._read_for(step)
            encoded, examples, slots = self._taken(step)
            self._made = step, self._placed(encoded, examples, slots, self.capacities)
        return self._made[1]

    def _read_for(self, step: int) -> None:
        stop = (step + 1) * self.size
        while not self._parts or self._parts[-1].stop < stop:
            part = (self._next or self._ahead()).result()
            kept = (p for p in self._parts if p.stop > stop - (KEPT + 1) * self.size)
            self._parts, self._next = (*kept, part), None
        if self._next is None and self._parts[-1].stop < self.max_steps * self.size:
            self._next = self._ahead()

    def _ahead(self) -> "Future[Part]":
        return self._pool.submit(next, self._coming)

    def _spanned(self, step: int) -> list[Part]:
        first, stop = step * self.size, (step + 1) * self.size
        found = [part for part in self._parts if part.first < stop and part.stop > first]
        if not found or found[0].first > first or found[-1].stop < stop:
            raise IndexError(f"update {step} of a stream: it goes forward only, and is elsewhere")
        return found

    def _taken(self, step: int) -> tuple[Examples, np.ndarray, np.ndarray]:
        """The examples of an update, where they are, and which unit of the update each belongs to."""
        parts, first = self._spanned(step), step * self.size
        taken = [part.take(first, first + self.size) for part in parts]
        encoded = joined([part.examples for part in parts])
        offsets = np.cumsum([0, *(len(part.encoded) for part in parts[:-1])])
        examples = np.concatenate([examples + offset for (examples, _), offset in zip(taken, offsets)])
        return encoded, examples, np.concatenate([units for _, units in taken]) - first

    def _placed(
        self, encoded: Examples | UnitSet, examples: np.ndarray, units: np.ndarray, capacities: Mapping[Shape, int]
    ) -> Layout:
        """The examples in the cheapest shape that takes them."""
        lengths, labelled = encoded.lengths[examples][None], encoded.labelled[examples][None]
        if self.packed:
            per_shard = self.model.epochs.batch // self.shards
            peak = np.bincount(units // per_shard, labelled[0]).max()
            shape = next(s for s in self.shapes if peak <= capacities[s])
            return Layout(encoded, examples, units, shape, capacities[shape])
        if isinstance(encoded, UnitSet):
            return self._placed_units(encoded, examples, capacities)
        by_length = -np.sort(-lengths, axis=1)
        *usual, last = capacities
        rows = [rows_needed(by_length, s.seq) for s in usual]
        prices = [costs(r, s.batch, s.seq, self.shards)[0] for r, s in zip(rows, usual)]
        cheapest = [
            usual[i] for i in np.argsort(prices, kind="stable") if rows[i][0] <= usual[i].accum * usual[i].batch
        ]
        for shape in (*cheapest, last):
            slots, peak = place(lengths, labelled, shape, self.shards)
            if peak[0] <= capacities[shape]:
                return Layout(encoded, examples, slots[0], shape, capacities[shape])
        raise AssertionError("the last shape takes whatever can come")

    def _placed_units(self, units: UnitSet, examples: np.ndarray, capacities: Mapping[Shape, int]) -> Layout:
        """Units in the first shape that takes them."""
        lengths, counts = units.segment_lengths[examples][None], units.counts[examples][None]
        of_units = UnitLayout(units.fields, self.model.epochs.batch, (self.size, self.size * len(units.sides)))
        for shape in capacities:
            slots, used = place_units(lengths, shape) if lengths.max() <= shape.seq else (None, [shape.accum + 1])
            if slots is None or used[0] > shape.accum:
                continue
            slots, peak = deal(slots, counts, shape, self.shards)
            if peak[0] <= capacities[shape]:
                return Layout(units, examples, slots[0], shape, capacities[shape], of_units)
        each_in_a_row = np.repeat(np.arange(len(examples))[:, None], len(units.sides), axis=1)
        return Layout(units, examples, each_in_a_row, shape, capacities[shape], of_units)


def capacities_of(model: BatchPlan, last: Shape) -> dict[Shape, int]:
    """Labelled targets of a shard, at most, for the shapes of a plan, and for the one that takes whatever can come."""
    tokens = {s: s.batch * s.seq // model.shards for s in (*model.shapes, last)}
    found = {s: capacity_of(round(HEADROOM * model.label_capacity(s)), tokens[s]) for s in model.shapes}
    return found | {last: tokens[last]}


class Joined:
    """Examples of several sets in one line."""

    def __init__(self, sets: Sequence[Any]):
        self.sets = sets
        self.starts = np.cumsum([0, *map(len, sets)])
        self.lengths = np.concatenate([encoded.lengths for encoded in sets])
        self.labelled = np.concatenate([encoded.labelled for encoded in sets])
        self.first_labelled = np.concatenate([encoded.first_labelled for encoded in sets])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Any:
        at = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sets[at][index - int(self.starts[at])]

    def segment(self, index: int) -> Any:
        return self[index]

    def column(self, name: str) -> np.ndarray | None:
        found = [encoded.column(name) for encoded in self.sets]
        return None if any(values is None for values in found) else np.concatenate(found)


def joined(sets: Sequence[Any]) -> Any:
    """Examples, or units, of several sets in one line."""
    first = sets[0]
    if len(sets) == 1:
        return first
    if not isinstance(first, UnitSet):
        return Joined(sets)
    sides = tuple(Joined(side) for side in zip(*(units.sides for units in sets)))
    mismatched = None if first.mismatched is None else joined([units.mismatched for units in sets])
    return replace(first, sides=sides, mismatched=mismatched)
