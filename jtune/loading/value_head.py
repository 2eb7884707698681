"""From the arguments of a run to its value head: from a file, or drawn."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jtune.config import Config, ModelArguments
from jtune.config.stages import rules_of
from jtune.errors import DataError
from jtune.interop import hf, value_head
from jtune.models.value_head import VALUE_HEAD, draw_value_head

log = logging.getLogger("jtune")


def scores(config: Config) -> bool:
    """Whether the model of a run has a value head."""
    return rules_of(config.finetuning.stage).scores


def head_folder(config: Config, folder: Path) -> Path | None:
    """Where the value head of a run is: beside its last adapter, else in its model; None: it is drawn.

    Args:
      folder: of the model.
    """
    if not scores(config) or config.model.train_from_scratch:
        return None
    return head_beside(config.model, folder)


def head_beside(args: ModelArguments, folder: Path) -> Path | None:
    """The folder that has a value head: that of the last adapter, or of the model, `folder`."""
    return next(filter(value_head.holds_head, [*adapter_folders(args)[-1:], folder]), None)


def adapter_folders(args: ModelArguments) -> list[Path]:
    """The folders of the adapters that are given, downloaded if they are hub ids."""
    return [hf.fetch(path, **args.hub) / (args.adapter_folder or "") for path in args.adapter_name_or_path]


def load_value_head(config: Config, folder: Path | None, hidden_size: int, *, trains: bool) -> dict[str, Any]:
    """The value head of a run, float32: as it is in `folder`, or drawn from the seed.

    Args:
      folder: see `head_folder`.
      trains: False: it cannot be drawn.

    Raises:
      DataError: what is in the folder does not fit the model; or there is none, and none is trained.
    """
    if folder is not None:
        log.info("reading the value head in %s", folder)
        return value_head.read_value_head(folder, hidden_size)
    if not trains:
        args = config.model
        where = [*args.adapter_name_or_path[-1:], args.model_name_or_path]
        raise DataError(
            f"there is no {value_head.FILE} in {' or '.join(map(str, where))}: its scores would be random. Give the "
            f"folder of a reward model, or train one (do_train: true)"
        )
    log.info("drawing a value head: there is no %s", value_head.FILE)
    return draw_value_head(hidden_size, jax.random.key(config.training.seed))


def with_value_head(params: Any, mask: Any, head: Any) -> tuple[Any, Any]:
    """A prepared tree and its mask with a value head, which trains in float32 whatever else does."""
    return {**params, VALUE_HEAD: head}, {**mask, VALUE_HEAD: jax.tree.map(lambda _: True, head)}


def head_shapes(hidden_size: int) -> dict[str, Any]:
    """A value head of nothing but shapes, to be traced."""
    return {"kernel": jnp.zeros((hidden_size, 1), jnp.float32), "bias": jnp.zeros(1, jnp.float32)}
