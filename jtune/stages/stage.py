"""The record of a stage."""

from collections.abc import Callable
from typing import NamedTuple

from jtune.config import FinetuningArguments, TrainingArguments
from jtune.config.stages import StageRules
from jtune.losses.objective import Objective
from jtune.losses.units import UnitObjective


class Stage(NamedTuple):
    """A stage of training.

    Attributes:
      rules: the kind of its rows, which says how they are encoded, and the arguments that are for it.
      objective: what an update minimises, from the arguments.
    """

    rules: StageRules
    objective: Callable[[FinetuningArguments, TrainingArguments], Objective | UnitObjective]
