"""Names of metrics as Hugging Face's callbacks report them."""

from collections.abc import Mapping
from typing import Any


def numbers(record: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a record, but for its step, which trackers have a place of its own for.

    >>> numbers({"loss": 1.5, "step": 3, "seconds": {"step": 2.0}, "eval_loss": None})
    {'loss': 1.5}
    """
    return {key: value for key, value in record.items() if key != "step" and isinstance(value, int | float)}


def tag(key: str) -> str:
    """
    >>> tag("loss"), tag("eval_loss"), tag("eval_rewards/chosen")
    ('train/loss', 'eval/loss', 'eval/rewards/chosen')
    """
    return "eval/" + key.removeprefix("eval_") if key.startswith("eval_") else "train/" + key
