"""The updates of a run, from what its user said: the one place that reads arguments for them."""

from functools import partial

import numpy as np

from jtune.config import Config
from jtune.config.packing import packs_examples
from jtune.config.stages import rules_of
from jtune.data.batching.stream import StreamPlan, joined
from jtune.data.batching.train import BatchPlan, Examples, Order, Size, packing_windows, plan_batches
from jtune.data.batching.units import units_of
from jtune.data.encode.encoded import Encoded
from jtune.data.stream import Stream

Plan = BatchPlan | StreamPlan

MODELLED = 1000  # updates over the first window of a stream, by which shapes are chosen


def plan_updates(config: Config, encoded: Encoded, shards: int, stream: Stream | None = None) -> Plan:
    """All updates of a run of `config` over `encoded`, for `shards` shards of the batch axis.

    What `jtune train` runs, `jtune plan` counts and `jtune data` tells.

    Args:
      stream: the rest, where `encoded` is the first window of it.
    """
    training, data = config.training, config.data
    stage = rules_of(config.finetuning.stage)
    windows = packing_windows(encoded, data, stage)
    units = units_of(encoded, stage, config.finetuning.ld_alpha)
    if stream is None:
        return _plan(config, units, shards, training.max_steps, training.dataloader_drop_last, windows)
    how = shards, min(training.max_steps, MODELLED), False
    model = _plan(config, units, *how, windows)
    size, count = model.epochs.batch * model.epochs.accumulation, model.epochs.examples
    if count < size:  # an update reaches over several windows: so must those of the model
        again = -(-size // count)
        model = _plan(config, joined([units] * again), *how, None)
    of_window = partial(units_of, stage=stage, beyond=config.finetuning.ld_alpha)
    return StreamPlan(stream, model, max_steps=training.max_steps, cutoff_len=data.cutoff_len, units_of=of_window)


def _plan(
    config: Config, encoded: Examples, shards: int, max_steps: int, drop_last: bool, windows: np.ndarray | None
) -> BatchPlan:
    training = config.training
    shuffle = not config.finetuning.disable_shuffling
    return plan_batches(
        encoded,
        Size(training.per_device_train_batch_size, shards, training.gradient_accumulation_steps),
        Order(
            order_seed(config),
            shuffle,
            training.num_train_epochs,
            max_steps,
            drop_last,
            length_seed(config) is not None,
        ),
        packing=rows_are_packed(config),
        cutoff_len=config.data.cutoff_len,
        windows=windows,
    )


def order_seed(config: Config) -> int:
    """The seed of the order of rows."""
    return config.training.seed if config.training.data_seed is None else config.training.data_seed


def length_seed(config: Config) -> int | None:
    """The seed of an order in which rows of similar length come together; None: of any other order."""
    by_length = config.training.train_sampling_strategy == "group_by_length" and not config.data.streaming
    return order_seed(config) if by_length else None


def rows_are_packed(config: Config) -> bool:
    """Whether several examples share a row in this run."""
    return packs_examples(config.data, rules_of(config.finetuning.stage))
