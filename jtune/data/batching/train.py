"""The batches of a run: every update is a pure function of its number, as arrays of one of a few static shapes.

`plan_batches` looks at lengths only. `BatchPlan.update(step)` then reads that update's examples and lays them out.
Arrays are `[accum, batch, seq]`; shard s of the batch axis owns rows s * batch/shards up to (s+1) * batch/shards.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from jtune.config import DataArguments
from jtune.config.packing import PADDING
from jtune.config.stages import StageRules
from jtune.data.batching.order import Epochs, plan_epochs
from jtune.data.batching.pack import Packs, pack
from jtune.data.batching.place_units import placed_units, plan_units
from jtune.data.batching.shapes import Shape, choose_shapes, costs, place, rows_needed
from jtune.data.batching.units import (
    OTHER,
    TOKENS,
    Segment,
    Segments,
    Sizes,
    UnitSet,
    grouped,
    sizes_of_fields,
    unit_arrays,
)
from jtune.data.encode.encoded import IGNORED, Encoded
from jtune.errors import DataError

# Rows that are planned at a time: a few tens of megabytes of temporary arrays.
PLANNED_ENTRIES = 2**20


class Examples(Protocol):
    """What is needed of an encoded dataset (see encoded.py)."""

    lengths: Any  # int32 array [n], tokens
    labelled: Any  # int32 array [n], places t with labels[t + 1] != -100
    first_labelled: Any  # int32 array [n], 1 where labels[0] != -100

    def __len__(self) -> int: ...

    def segment(self, index: int) -> Segment:
        """`input_ids` and `labels`, int32 `[length]`, of an example that is one sequence."""
        ...


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """What every update of a run holds. Make it with `plan_batches`; steps count from 0, but `epoch_at` from 1."""

    encoded: Examples
    epochs: Epochs
    shards: int
    packs: Packs | None  # rows that are made once for the run; None: examples are laid out update by update
    shapes: tuple[Shape, ...]
    shape_of: np.ndarray  # uint8 [max_steps], index into shapes
    capacities: Mapping[Shape, int]
    padding_share: float  # of the token slots of all used microbatches of the run, exact
    fields: Mapping[str, np.ndarray] | None = None  # of units, what a loss sees of each, [n, ...]; None: no units
    mismatched: "BatchPlan | None" = None  # of feedback, the same updates of answers to other prompts

    @property
    def max_steps(self) -> int:
        return self.epochs.max_steps

    @property
    def num_epochs(self) -> int:
        return self.epochs.num_epochs

    @property
    def updates_per_epoch(self) -> int:
        return self.epochs.updates_per_epoch

    def epoch_at(self, step: int) -> float:
        """The Trainer's `epoch` after `step` updates (see `Epochs.epoch_at`)."""
        return self.epochs.epoch_at(step)

    def with_reference(self, first: np.ndarray, other: np.ndarray | None = None) -> "BatchPlan":
        """The plan with the sums of a reference model, float32 `[n, segments, 2]`, among what a loss sees of units.

        Args:
          other: of mismatched answers.
        """
        mismatched = self.mismatched
        if mismatched is not None:
            assert other is not None
            mismatched = mismatched.with_reference(other)
        return replace(self, fields={**(self.fields or {}), "reference": first}, mismatched=mismatched)

    def label_capacity(self, shape: tuple[int, int, int]) -> int:
        """No microbatch of `shape` has more labelled targets than this on a shard; a multiple of 128, or all tokens."""
        return self.capacities[Shape(*shape)]

    @property
    def examples_per_update(self) -> int:
        return len(self.examples(0))

    def describe(self) -> str:
        """What there is, and how often it is gone through."""
        updates = f"{self.max_steps:,} updates in {self.num_epochs:g} epochs ({self.updates_per_epoch:,} an epoch)"
        return f"{len(self.encoded):,} examples, {updates}"

    def explain(self, step: int) -> str:
        """Which examples update `step` holds, in words."""
        return f"rows {', '.join(map(str, self.examples(step)[:8]))} ... of the data set"

    def mean_tokens(self, most: int) -> float:
        """Tokens of an update, of at most so many that are looked at."""
        some = np.unique(np.linspace(0, self.max_steps - 1, min(most, self.max_steps)).astype(int))
        return float(np.mean([self.tokens(int(step)) for step in some]))

    def examples(self, step: int) -> np.ndarray:
        """Indices of the examples of update `step`, int32, in the order of the run."""
        rows = self.epochs.rows(step)
        return rows if self.packs is None else self.packs.take(rows)[0]

    def tokens(self, step: int) -> int:
        """Tokens of update `step` that are learned from, padding not counted."""
        return int(self.encoded.lengths[self.examples(step)].sum())

    def widths(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        """Units whose first segment a row of `shape` may hold, and segments of any unit, at most."""
        assert isinstance(self.encoded, UnitSet)
        units, fit = self.epochs.batch * self.epochs.accumulation, max(1, shape[2] // self.encoded.shortest)
        return min(units, fit), min(units * len(self.encoded.sides), fit)

    def sizes(self, shape: tuple[int, int, int], other: tuple[int, int, int] | None = None) -> Sizes:
        """The static sizes of a batch of `shape`, and of its mismatched answers, whose shape is `other`."""
        if self.fields is None:
            return Sizes(self.label_capacity(shape))
        more = None
        if self.mismatched is not None:
            (only,) = self.mismatched.shapes
            more = only, self.mismatched.sizes(only)
        return Sizes(self.label_capacity(shape), *self.widths(shape), sizes_of_fields(self.fields), more)

    def shape(self, step: int) -> Shape:
        """`[accum, batch, seq]` of update `step`."""
        return self.shapes[self.shape_of[step]]

    def update(self, step: int, only: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
        """The arrays of update `step`, each `[accum, batch, seq]`: a pure function of `step`, at the same cost for all.

        Args:
          only: the part of the batch axis that is wanted, from a row up to another, whole shards; no more is read.

        Returns:
          input_ids, targets (the next token of the segment, 0 where it does not count), positions (from 0 in each
          segment), segment_ids (from 1 in each row, 0 is padding), int32; loss_weights (1 where the target counts),
          float32; and the scalar divisor, float32. Of units besides, beside the row of their first segment,
          `[accum, batch, units]` or with an axis for their segments: group int32, share and `fields` float32; and owner
          int32, which unit and side each segment of a row is (`jtune.data.batching.units.unit_arrays`). Of feedback all
          this of the mismatched answers, too, with `kl_` before its name, in a shape of their own.

        Raises:
          DataError: the data is not what it was when the plan was made.
        """
        rows = self.epochs.rows(step)
        shape = self.shape(step)
        if self.packs is not None:
            examples, slots = self.packs.take(rows)
        elif isinstance(self.encoded, UnitSet):
            examples, slots = rows, placed_units(self.encoded, rows[None], shape, self.shards)[0][0]
        else:
            examples = rows
            sizes = self.encoded.lengths[rows][None], self.encoded.labelled[rows][None]
            slots = place(*sizes, shape, self.shards)[0][0]
        units = None if self.fields is None else UnitLayout(self.fields, self.epochs.batch, self.widths(shape))
        layout = Layout(self.encoded, examples, slots, shape, self.capacities[shape], units)
        arrays = lay_out(layout, self.shards, only, f"update {step}")
        if self.mismatched is None:
            return arrays
        rows = None if only is None else same_rows(only, shape, self.mismatched.shape(step))
        return arrays | {OTHER + name: x for name, x in self.mismatched.update(step, rows).items() if name != "divisor"}


def same_rows(only: tuple[int, int], shape: Shape, other: Shape) -> tuple[int, int]:
    """The rows of `other` that lie on the devices of the rows `only` of `shape`: whole shards of both."""
    return only[0] * other.batch // shape.batch, only[1] * other.batch // shape.batch


class UnitLayout(NamedTuple):
    """What is laid out of units besides their tokens."""

    fields: Mapping[str, np.ndarray]  # of all units of the set, [n, ...]
    batch: int  # units of a group, LLaMA-Factory's microbatch
    widths: tuple[int, int]  # units, and segments, of a row, at most


class Layout(NamedTuple):
    """Where the examples of an update lie."""

    encoded: Any  # `Examples`; of units a `UnitSet`
    examples: np.ndarray  # int32 [n]
    slots: np.ndarray  # int64 [n], `microbatch * batch + row`; of units [n, segments]
    shape: Shape
    capacity: int  # targets of a (microbatch, shard), at most
    units: UnitLayout | None = None


def lay_out(layout: Layout, shards: int, only: tuple[int, int] | None, name: str) -> dict[str, np.ndarray]:
    """The arrays of an update (see `BatchPlan.update`); `name` is what it is called when something is wrong."""
    encoded, examples, slots, shape, capacity, units = layout
    first, stop = (0, shape.batch) if only is None else only
    beside: dict[str, np.ndarray] = {}
    if units is None:
        divisor = divisor_of(encoded, examples)
    else:
        group, share = grouped(len(examples), units.batch)
        divisor = group[-1] + 1
        fields = {"group": group, "share": share} | {name: x[examples] for name, x in units.fields.items()}
        beside = unit_arrays(fields, slots, shape, units.widths)
        encoded = Segments(encoded)  # type: ignore[arg-type]
        examples = (examples[:, None] * encoded.width + np.arange(encoded.width)).ravel()
        slots = slots.ravel()
    by_microbatch = lambda x: x.reshape(shape.accum, -1, *x.shape[1:])
    beside = {key: by_microbatch(x)[:, first:stop] for key, x in beside.items()}
    if (first, stop) != (0, shape.batch):
        microbatch, row = np.divmod(slots, shape.batch)
        mine = (row >= first) & (row < stop)
        examples, slots = examples[mine], (microbatch * (stop - first) + row - first)[mine]
        shards = shards * (stop - first) // shape.batch
        shape = shape._replace(batch=stop - first)
    arrays = fill(encoded, examples, slots, shape.accum * shape.batch, shape.seq)
    check_capacity(arrays["loss_weights"], shape.accum * shards, capacity, name)
    arrays = {key: by_microbatch(x) for key, x in arrays.items()} | beside
    return arrays | {"divisor": np.asarray(divisor, np.float32)}


def divisor_of(encoded: Examples, examples: np.ndarray) -> int:
    """What the sum of the losses of these examples is divided by: the number of labels that are not -100. (That of
    units is divided by the number of their groups.)

    As in Hugging Face's Trainer, the label of an example's first token is among them where there is one (stage pt,
    train_on_prompt), though nothing predicts it.
    """
    return int(encoded.labelled[examples].sum() + encoded.first_labelled[examples].sum())


def packing_windows(encoded: Encoded, data: DataArguments, stage: StageRules) -> np.ndarray | None:
    """Which examples may share a packed row, for `plan_batches` and `eval_batches`; None: all that are near.

    With neat_packing, those that LLaMA-Factory encodes, and packs, in one batch: the losses are the same. With packing
    alone it lets examples see each other, so that its losses differ anyway; rows are filled better then.
    """
    if stage.rows == "text" or not data.neat_packing:
        return None
    return encoded.preprocessing_batches(data.preprocessing_batch_size, data.preprocessing_num_workers)


class Size(NamedTuple):
    """How many rows an update has."""

    per_device: int  # of a microbatch, on each shard of the batch
    shards: int
    accumulation: int


class Order(NamedTuple):
    """Which rows come when; `max_steps` wins over `num_epochs` when it is positive, as in the Trainer."""

    seed: int  # `data_seed`, or else `seed`
    shuffle: bool
    num_epochs: float
    max_steps: int = -1
    drop_last: bool = False
    by_length: bool = False  # examples of similar length together; packed rows all have one length


def plan_batches(
    encoded: Examples,
    size: Size,
    order: Order,
    *,
    packing: bool,
    cutoff_len: int,
    windows: np.ndarray | None = None,
) -> BatchPlan:
    """Plan all updates of a run.

    With `packing`, rows of `cutoff_len` tokens are made once, and are what is then shuffled and counted:
    `size.per_device` rows on each shard. The blocks of stage pt, `cutoff_len` long, are such rows as they are. Without,
    an update holds the examples that LLaMA-Factory's would, laid out in at most four shapes. A microbatch never has
    more tokens on a shard than `size.per_device` rows of the longest example.

    The microbatches that hold anything come first; the train step may leave out the others (all segment 0, weight 0).
    `padding_share` does not count these, and the shapes are chosen on the understanding that they cost nothing.

    Args:
      encoded: examples of single sequences, or a `UnitSet`, of which a pair takes the place of an example.
      windows: of `pack`.

    Raises:
      DataError: nothing to train on, or an example that does not fit into a row.
    """
    packs = pack(encoded.lengths, filled(encoded, cutoff_len), windows) if packing else None
    epochs = plan_epochs(
        len(encoded) if packs is None else len(packs),
        batch=size.per_device * size.shards,
        accumulation=size.accumulation,
        num_train_epochs=order.num_epochs,
        max_steps=order.max_steps,
        drop_last=order.drop_last,
        seed=order.seed,
        shuffle=order.shuffle,
    )
    if order.by_length and packs is None:
        epochs = replace(epochs, lengths=np.asarray(encoded.lengths))
    tables = list(_tables(epochs))
    if isinstance(encoded, UnitSet):
        shapes, shape_of, peaks, slots = plan_units(encoded, tables, size.per_device, size.shards)
        lengths = np.append(encoded.lengths, 0)
    elif packs is None:
        shapes, shape_of, peaks, slots = _plan_layouts(encoded, epochs, tables, size.per_device, size.shards)
        lengths = np.append(encoded.lengths, 0)
    else:
        shapes, shape_of = [Shape(size.accumulation, epochs.batch, cutoff_len)], np.zeros(epochs.max_steps, np.uint8)
        labelled = np.append(packs.sums(encoded.labelled), 0)
        peaks = [max(labelled[t].reshape(-1, size.per_device).sum(axis=1).max() for t in tables)]
        slots = sum(int((t[:, :: epochs.batch] >= 0).sum()) for t in tables) * epochs.batch * cutoff_len
        lengths = np.append(packs.sums(encoded.lengths), 0)
    capacities = {s: capacity_of(peak, s.batch * s.seq // size.shards) for s, peak in zip(shapes, peaks)}
    real = sum(int(lengths[t].sum()) for t in tables)
    plan = BatchPlan(encoded, epochs, size.shards, packs, tuple(shapes), shape_of, capacities, 1 - real / slots)
    return with_units(plan, encoded, tables, size) if isinstance(encoded, UnitSet) else plan


def with_units(plan: BatchPlan, units: UnitSet, tables: list[np.ndarray], size: Size) -> BatchPlan:
    """The plan of units: with what a loss sees of them, and of feedback with the same updates of mismatched answers."""
    other = units.mismatched
    if other is None:
        return replace(plan, fields=units.fields)
    shapes, shape_of, peaks, _ = plan_units(other, tables, size.per_device, size.shards)
    capacities = {s: capacity_of(peak, s.batch * s.seq // size.shards) for s, peak in zip(shapes, peaks)}
    mismatched = replace(
        plan, encoded=other, shapes=tuple(shapes), shape_of=shape_of, capacities=capacities, fields=other.fields
    )
    return replace(plan, fields=units.fields, mismatched=mismatched)


def _tables(epochs: Epochs) -> Iterator[np.ndarray]:
    """All updates of the run in pieces, int32 `[updates, rows of an update]`, -1 (it picks an appended 0) for none."""
    for epoch in range(epochs.num_epochs):
        table = epochs.table(epoch)
        yield from np.array_split(table, -(-table.size // PLANNED_ENTRIES))


def _plan_layouts(encoded: Examples, epochs: Epochs, tables: list[np.ndarray], per_device: int, shards: int):
    """Lay out every update. Returns the shapes, the shape of each update (an index), for each shape the most labelled
    targets of a (microbatch, shard), and the token slots of all microbatches that are used."""
    lengths, labelled = np.append(encoded.lengths, 0), np.append(encoded.labelled, 0)
    by_length = [-np.sort(-lengths[t], axis=1) for t in tables]
    chosen = choose_shapes(
        by_length[0], updates=epochs.max_steps, longest=int(lengths.max()), per_device=per_device, shards=shards
    )
    rows = [np.concatenate([rows_needed(x, seq) for x in by_length]) for _, seq in chosen]
    shape_of = np.argmin([costs(r, *shape, shards) for r, shape in zip(rows, chosen)], axis=0)
    kept = np.unique(shape_of)
    shape_of = np.searchsorted(kept, shape_of).astype(np.uint8)

    shapes, peaks, slots = [], [], 0
    ends = np.cumsum([len(t) for t in tables])[:-1]
    for i, (batch, seq) in enumerate(chosen[k] for k in kept):
        microbatches = -(-rows[kept[i]][shape_of == i] // batch)
        slots += int(microbatches.sum()) * batch * seq
        shapes.append(Shape(int(microbatches.max()), batch, seq))
        mine = (t[which] for t, which in zip(tables, np.split(shape_of == i, ends)) if which.any())
        peaks.append(max(int(place(lengths[t], labelled[t], shapes[i], shards)[1].max()) for t in mine))
    return shapes, shape_of, peaks, slots


def filled(encoded: Examples, cutoff_len: int) -> int:
    """Tokens that a packed row takes: its padding stays empty (`jtune.config.packing`), unless an example needs it."""
    return cutoff_len if encoded.lengths.max() >= cutoff_len else cutoff_len - PADDING


def capacity_of(peak: int, tokens: int) -> int:
    """`peak` rounded up to a multiple of 128 (an array of static size is gathered), at most all `tokens` of a shard."""
    return min(tokens, max(128, -(-int(peak) // 128) * 128))


def check_capacity(loss_weights: np.ndarray, groups: int, capacity: int, name: str) -> None:
    most = int(loss_weights.reshape(groups, -1).sum(axis=1).max())
    if most > capacity:
        raise DataError(
            f"{name} has {most} labelled targets on a shard, planned were at most {capacity}: "
            "the encoded rows have changed since the plan was made. Start again with overwrite_cache: true."
        )


def fill(encoded: Examples, examples: np.ndarray, slots: np.ndarray, rows: int, seq: int) -> dict[str, np.ndarray]:
    """Read `examples` and lay them, as segments in this order, into `slots` (the row of each): arrays `[rows, seq]`.

    The target of a position is the label of the next one within the segment; the last position of a segment has none.
    """
    if len(examples) == 0:  # a process may have no part in an update
        return {name: np.zeros((rows, seq), dtype) for name, dtype in TOKENS.items()}
    order = np.argsort(slots, kind="stable")
    examples, slots = examples[order], slots[order]
    read = [encoded.segment(int(i)) for i in examples]
    lengths = np.array([len(r["input_ids"]) for r in read])
    number = np.arange(len(read))
    row_first = np.maximum.accumulate(np.where(np.diff(slots, prepend=-1) != 0, number, 0))
    ends = np.cumsum(lengths)
    begins = ends - lengths
    columns = begins - begins[row_first]
    if (columns + lengths).max() > seq:
        example = examples[(columns + lengths).argmax()]
        raise DataError(
            f"example {example} no longer fits into its row of {seq} tokens: "
            "the encoded rows have changed since the plan was made. Start again with overwrite_cache: true."
        )

    targets = np.append(np.concatenate([r["labels"] for r in read]), IGNORED)[1:]
    targets[ends[lengths > 0] - 1] = IGNORED
    counts = targets != IGNORED
    weighted = "weights" in read[0]
    weights = np.concatenate([r["weights"] for r in read]) if weighted else counts
    positions = np.arange(ends[-1]) - np.repeat(begins, lengths)
    where = np.repeat(slots * seq + columns, lengths) + positions

    def laid(values: np.ndarray, dtype: type = np.int32) -> np.ndarray:
        flat = np.zeros(rows * seq, dtype)
        flat[where] = values
        return flat.reshape(rows, seq)

    return {
        "input_ids": laid(np.concatenate([r["input_ids"] for r in read])),
        "targets": laid(np.where(counts, targets, 0)),
        "positions": laid(positions),
        "segment_ids": laid(np.repeat(number - row_first + 1, lengths)),
        "loss_weights": laid(weights, np.float32),
    }
