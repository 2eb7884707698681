"""Which example goes into which update: a pure function of (seed, epoch, step), the same as Hugging Face's Trainer.

LLaMA-Factory leaves the order to the Trainer: `torch.randperm` seeded with `seed + epoch` (or the identity when
shuffling is disabled), cut into microbatches, `accumulation` of them to an update; the last update of an epoch takes
what is left, and no update reaches over the end of an epoch. On several devices the Trainer fills up the last batch
with examples from the start of the epoch; here each comes exactly once. Nothing depends on where the run started, so
resuming is a seek.
"""

import math
from array import array
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from jtune.errors import DataError

# From here on torch draws 64 bits for each swap: another stream, which nobody has needed yet.
TORCH_RANDPERM_LIMIT = (2**32 - 1) // 20
SWAPS = 2**20  # that are Python numbers at a time


def permutation(n: int, seed: int) -> np.ndarray:
    """`torch.randperm(n, generator=torch.Generator().manual_seed(seed))`, int32 `[n]`, without torch.

    torch seeds a Mersenne twister with the low 32 bits of the seed, as numpy's legacy generator does, and swaps each
    place i with place i + draw % (n - i), one draw a place. A million take a third of a second.

    >>> permutation(5, 42)
    array([2, 4, 3, 0, 1], dtype=int32)
    """
    if n >= TORCH_RANDPERM_LIMIT:
        raise DataError(
            f"cannot shuffle {n} rows: at most {TORCH_RANDPERM_LIMIT - 1}. Set disable_shuffling: true, or max_samples."
        )
    draws = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, size=max(n - 1, 0), dtype=np.uint32)
    place = np.arange(n - 1, dtype=np.uint32)
    partner = place + draws % (np.uint32(n) - place)
    order = array("i", range(n))
    for begin in range(0, n - 1, SWAPS):  # each swap needs the ones before it
        for i, j in enumerate(partner[begin : begin + SWAPS].tolist(), begin):
            order[i], order[j] = order[j], order[i]
    return np.frombuffer(order, np.int32).copy()


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of `n` examples in `epoch` (from 0), int32 `[n]`, read-only."""
    order = permutation(n, seed + epoch) if shuffle else np.arange(n, dtype=np.int32)
    order.flags.writeable = False
    return order


def grouped_by_length(order: np.ndarray, lengths: np.ndarray, batch: int) -> np.ndarray:
    """`order` with examples of similar length side by side, int32 `[n]`: transformers' `LengthGroupedSampler`.

    Pieces of 50 batches (of fewer, if there would be fewer than four pieces) are sorted, the longest example first.
    The longest of all changes places with the first one, so that a lack of memory shows at once.

    Args:
      lengths: tokens of each example.
      batch: examples of an update.

    >>> grouped_by_length(np.array([2, 0, 3, 1]), np.array([5, 7, 1, 9]), 1)
    array([3, 0, 2, 1])
    """
    size = batch * max(1, min(len(order) // (batch * 4), 50))
    pieces = [order[begin : begin + size] for begin in range(0, len(order), size)]
    pieces = [piece[np.argsort(-lengths[piece], kind="stable")] for piece in pieces]
    most = int(np.argmax([lengths[piece[0]] for piece in pieces]))
    pieces[0][0], pieces[most][0] = pieces[most][0], pieces[0][0]
    return np.concatenate(pieces)


@lru_cache(maxsize=4)
def order_of(epochs: "Epochs", epoch: int) -> np.ndarray:
    """The order of the examples of a run in `epoch` (from 0), int32 `[examples]`, read-only."""
    order = epoch_order(epochs.examples, epochs.seed, epoch, epochs.shuffle)
    if epochs.lengths is None:
        return order
    order = grouped_by_length(order, epochs.lengths, epochs.batch * epochs.accumulation)
    order.flags.writeable = False
    return order


@dataclass(frozen=True, eq=False)
class Epochs:
    """The Trainer's arithmetic of a run. Make it with `plan_epochs`; steps count from 0, `epoch_at` from 1."""

    examples: int  # that there are
    batch: int  # examples of a microbatch, over all shards
    accumulation: int  # microbatches of an update
    microbatches: int  # of an epoch
    updates_per_epoch: int
    max_steps: int
    num_epochs: int  # epochs begun
    seed: int
    shuffle: bool
    lengths: np.ndarray | None = None  # tokens of each example, if those of similar length come together

    def epoch_at(self, step: int) -> float:
        """What the Trainer logs as `epoch` after `step` updates: whole epochs, plus the share of microbatches seen.

        43 examples, batch 2, accumulation 2: 22 microbatches, 11 updates; 1/11 after one update, 1.0 after eleven.
        """
        if step <= 0:
            return 0.0
        epoch, update = divmod(step - 1, self.updates_per_epoch)
        return epoch + min((update + 1) * self.accumulation, self.microbatches) / self.microbatches

    def rows(self, step: int) -> np.ndarray:
        """The examples of update `step`, in order, int32 `[batch * accumulation]`; fewer at the end of an epoch."""
        if not 0 <= step < self.max_steps:
            raise IndexError(f"update {step} of a run of {self.max_steps} updates (they count from 0)")
        epoch, update = divmod(step, self.updates_per_epoch)
        size = self.batch * self.accumulation
        used = min(self.examples, self.microbatches * self.batch)  # fewer than all when the last batch is dropped
        return order_of(self, epoch)[:used][update * size : (update + 1) * size]

    def table(self, epoch: int) -> np.ndarray:
        """All updates of `epoch` that the run reaches, int32 `[updates, batch * accumulation]`, -1 for none."""
        steps = min(self.updates_per_epoch, self.max_steps - epoch * self.updates_per_epoch)
        size = self.batch * self.accumulation
        used = min(self.examples, self.microbatches * self.batch, steps * size)
        table = np.full(steps * size, -1, np.int32)
        table[:used] = order_of(self, epoch)[:used]
        return table.reshape(steps, size)


def plan_epochs(
    examples: int,
    *,
    batch: int,
    accumulation: int,
    num_train_epochs: float,
    max_steps: int = -1,
    drop_last: bool = False,
    seed: int = 42,
    shuffle: bool = True,
) -> Epochs:
    """The arithmetic of a run over `examples` examples with `batch` of them in a microbatch (over all shards).

    `max_steps > 0` wins over `num_train_epochs`, which may be a fraction: 1.5 epochs stop in the middle of the second.

    Raises:
      DataError: there is no example, or `drop_last` leaves no whole microbatch.
    """
    if examples == 0:
        raise DataError("no training examples are left: see the data report for what was skipped, and why")
    microbatches = examples // batch if drop_last else math.ceil(examples / batch)
    if microbatches == 0:
        raise DataError(
            f"dataloader_drop_last leaves nothing: {examples} rows do not fill one batch of {batch}. "
            "Set dataloader_drop_last: false, or a smaller per_device_train_batch_size."
        )
    updates_per_epoch = math.ceil(microbatches / accumulation)
    if max_steps > 0:
        num_epochs = math.ceil(max_steps / updates_per_epoch)
    else:
        max_steps = math.ceil(num_train_epochs * updates_per_epoch)
        num_epochs = math.ceil(num_train_epochs)
    return Epochs(examples, batch, accumulation, microbatches, updates_per_epoch, max_steps, num_epochs, seed, shuffle)
