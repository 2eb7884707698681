"""Stage rm: scores of pairs are learned: the chosen answer is to have the higher one."""

from jtune.config.stages import RULES
from jtune.losses.reward import score_objective
from jtune.stages.stage import Stage

RM = Stage(RULES["rm"], objective=score_objective)
