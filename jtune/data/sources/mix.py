"""Which rows take part: picked, mixed, held out. The order of steps and the random draws are LLaMA-Factory's."""

from collections.abc import Sequence
from typing import TypeVar

import datasets
import numpy as np

from jtune.errors import ConfigError, DataError

Table = TypeVar("Table", datasets.Dataset, datasets.IterableDataset)

STOPPING = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


def pick_rows(
    total: int, num_samples: int | None, max_samples: int | None, random: np.random.RandomState
) -> np.ndarray | None:
    """Rows of a set of `total`: `num_samples` drawn (some again if there are fewer), the first `max_samples` of them.

    Returns:
      int64 indices, or None for all in order.
    """
    rows = None
    if num_samples is not None:
        rows = random.permutation(total)[:num_samples]
        if num_samples > total:
            rows = np.concatenate([rows, random.choice(total, num_samples - total)])
    if max_samples is not None and max_samples < (total if rows is None else len(rows)):
        rows = (np.arange(total) if rows is None else rows)[:max_samples]
    return rows


def merge(
    tables: Sequence[Table],
    strategy: str = "concat",
    probabilities: Sequence[float] | None = None,
    seed: int = 42,
) -> Table:
    """One set after the other, or drawn in turn.

    Raises:
      ConfigError: an unknown strategy, or not one probability for each set.
    """
    if len(tables) == 1:
        return tables[0]
    if strategy == "concat":
        return datasets.concatenate_datasets(list(tables))
    if strategy not in STOPPING:
        raise ConfigError(f"mix_strategy {strategy!r} is unknown: there are concat, {', '.join(STOPPING)}")
    if probabilities and len(probabilities) != len(tables):
        raise ConfigError(f"interleave_probs has {len(probabilities)} values for {len(tables)} sets")
    return datasets.interleave_datasets(
        list(tables),
        probabilities=list(probabilities) if probabilities else None,
        seed=seed,
        stopping_strategy=STOPPING[strategy],  # pyright: ignore[reportArgumentType]
    )


def hold_out(table: datasets.Dataset, val_size: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Training rows and evaluation rows: `val_size` rows if it is 1 or more, else that share; shuffled, both.

    Raises:
      DataError: one of the two would have no rows.
    """
    if val_size <= 1e-6:
        return table, None
    size = int(val_size) if val_size >= 1 else val_size
    try:
        parts = table.train_test_split(test_size=size, seed=seed)
    except ValueError as error:
        raise DataError(f"val_size {val_size:g} of {len(table)} rows leaves nothing on one side: {error}") from error
    return parts["train"], parts["test"]
