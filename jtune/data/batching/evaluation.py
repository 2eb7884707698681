"""The batches of an evaluation."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jtune.config.stages import StageRules
from jtune.data.batching.order import grouped_by_length, permutation
from jtune.data.batching.pack import Packs, pack
from jtune.data.batching.shapes import rung
from jtune.data.batching.train import Examples, capacity_of, check_capacity, fill, filled
from jtune.errors import DataError


class EvalBatch(NamedTuple):
    """One step of an evaluation."""

    arrays: dict[str, np.ndarray]  # as of an update, [batch, seq]
    example: np.ndarray  # int32 [batch, seq]: which of `indices`; EvalPlan.slots - 1 where there is padding
    indices: np.ndarray  # int32 [k], k < EvalPlan.slots: the examples in here


@dataclass(frozen=True, eq=False)
class EvalPlan:
    """An evaluation over all examples, in steps of one static shape. Make it with `eval_batches`; iterate over it."""

    encoded: Examples
    shards: int
    packs: Packs
    shape: tuple[int, int]  # batch, seq
    slots: int  # for sums over the examples of a step; the last is for padding
    label_capacity: int  # as of a BatchPlan
    group_of: np.ndarray  # int32 [n], the Trainer's batch that each example belongs to
    group_weights: np.ndarray  # int64 [groups], what the mean of each counts for in the mean over all

    def __len__(self) -> int:
        return -(-len(self.packs) // self.shape[0])

    def __getitem__(self, step: int) -> EvalBatch:
        if not 0 <= step < len(self):
            raise IndexError(f"evaluation step {step} of {len(self)}")
        batch, seq = self.shape
        rows = np.arange(step * batch, min((step + 1) * batch, len(self.packs)))
        examples, slots = self.packs.take(rows)
        arrays = fill(self.encoded, examples, slots, batch, seq)
        check_capacity(arrays["loss_weights"], self.shards, self.label_capacity, f"evaluation step {step}")
        first = np.zeros((batch, 1), np.int64)
        first[: len(rows), 0] = self.packs.starts[rows] - self.packs.starts[rows[0]]
        segments = arrays["segment_ids"]
        example = np.where(segments > 0, first + segments - 1, self.slots - 1).astype(np.int32)
        return EvalBatch(arrays, example, examples)

    def mean_loss(self, losses: np.ndarray, counts: np.ndarray) -> float:
        """The Trainer's `eval_loss`: the mean over tokens in each of its batches, then over batches.

        A batch without a labelled target, which would be nan there, is left out; nan if no batch has any.

        Args:
          losses, counts: float `[n]`, sum of the token losses of each example and number of its targets.
        """
        groups = len(self.group_weights)
        counts = counts + self.encoded.first_labelled  # as in training (see divisor_of)
        losses, counts = (np.bincount(self.group_of, x, groups) for x in (losses, counts))
        weights = np.where(counts > 0, self.group_weights, 0)
        if not weights.any():
            return math.nan
        return float((weights * losses / np.maximum(counts, 1)).sum() / max(weights.sum(), 1))


def eval_batches(
    encoded: Examples,
    *,
    stage: StageRules,
    per_device_batch_size: int,
    batch_shards: int,
    packing: bool = False,
    cutoff_len: int,
    windows: np.ndarray | None = None,
    length_seed: int | None = None,
) -> EvalPlan:
    """Plan an evaluation: all examples, once, packed into rows; `per_device_batch_size` rows on each shard.

    Sums are formed example by example, so how examples lie in memory does not show in the figures: they are always
    packed, into rows of the longest example. With `packing`, rows are of `cutoff_len` tokens, and a row is what the
    Trainer would take for an example.

    Args:
      stage: of texts, the Trainer's batches count by their size; of conversations, those of LLaMA-Factory's
        Seq2SeqTrainer all count the same, also the last one, which may be smaller.
      length_seed: of an order by length; the Trainer's batches then hold examples of similar length. None: the order
        of the data set.

    Raises:
      DataError: there is no example.
    """
    if len(encoded) == 0:
        raise DataError("no evaluation examples are left: see the data report for what was skipped, and why")
    seq = cutoff_len if packing else rung(int(encoded.lengths.max()))
    packs = pack(encoded.lengths, filled(encoded, cutoff_len) if packing else seq, windows)
    per_device = min(per_device_batch_size, -(-len(packs) // batch_shards))
    batch = per_device * batch_shards

    unit_of = np.arange(len(encoded))
    if packing:
        unit_of[packs.examples] = np.repeat(np.arange(len(packs)), np.diff(packs.starts))
    # The Trainer takes the mean on each device before it takes the mean over devices: their number does not show.
    units = len(packs) if packing else len(encoded)
    rank = np.arange(units)
    if length_seed is not None:
        lengths = np.ones(units, np.int32) if packing else np.asarray(encoded.lengths)
        rank[grouped_by_length(permutation(units, length_seed), lengths, per_device_batch_size)] = np.arange(units)
    group_of = rank[unit_of] // per_device_batch_size
    sizes = np.bincount(np.arange(units) // per_device_batch_size)
    weights = sizes if stage.rows == "text" else np.ones_like(sizes)

    peak = np.add.reduceat(packs.sums(encoded.labelled), np.arange(0, len(packs), per_device)).max()
    slots = 1 + int(np.add.reduceat(np.diff(packs.starts), np.arange(0, len(packs), batch)).max())
    capacity = capacity_of(peak, per_device * seq)
    return EvalPlan(encoded, batch_shards, packs, (batch, seq), slots, capacity, group_of.astype(np.int32), weights)
