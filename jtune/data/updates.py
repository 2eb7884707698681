"""The updates of a run, from what its user said: the one place that reads arguments for them."""

from typing import Any

from jtune.data.batches import BatchPlan, packing_windows, plan_batches
from jtune.data.encoded import Encoded


def plan_updates(config: Any, encoded: Encoded, shards: int) -> BatchPlan:
    """All updates of a run of `config` (a jtune.config.Config) over `encoded`, for `shards` parts of the batch axis.

    What `jtune train` runs, `jtune plan` counts and `jtune data` tells.
    """
    training, data = config.training, config.data
    return plan_batches(
        encoded,
        stage=config.finetuning.stage,
        packing=rows_are_packed(config),
        cutoff_len=data.cutoff_len,
        per_device_batch_size=training.per_device_train_batch_size,
        batch_shards=shards,
        accumulation=training.gradient_accumulation_steps,
        seed=order_seed(config),
        shuffle=not config.finetuning.disable_shuffling,
        num_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        drop_last=training.dataloader_drop_last,
        windows=packing_windows(encoded, data, config.finetuning.stage),
    )


def order_seed(config: Any) -> int:
    """The seed of the order of rows."""
    return config.training.seed if config.training.data_seed is None else config.training.data_seed


def rows_are_packed(config: Any) -> bool:
    """Whether several examples share a row: always with `packing`, but the blocks of stage pt are rows already."""
    return bool(config.data.neat_packing or (config.data.packing and config.finetuning.stage != "pt"))
