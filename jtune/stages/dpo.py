"""Stage dpo: pairs are learned: the chosen answer is to gain on the rejected one."""

from jtune.config.stages import RULES
from jtune.losses.preference import pair_objective
from jtune.stages.stage import Stage

DPO = Stage(RULES["dpo"], objective=pair_objective)
