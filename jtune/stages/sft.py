"""Stage sft: answers of conversations are learned, token by token."""

from jtune.config.stages import RULES
from jtune.losses.objective import objective_of
from jtune.stages.stage import Stage

SFT = Stage(RULES["sft"], objective=objective_of)
