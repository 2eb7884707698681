"""Stage kto: answers that are marked as good or bad are learned."""

from jtune.config.stages import RULES
from jtune.losses.feedback import feedback_objective
from jtune.stages.stage import Stage

KTO = Stage(RULES["kto"], objective=feedback_objective)
