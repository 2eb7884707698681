"""Stage pt: documents are learned, every token of them."""

from jtune.config.stages import RULES
from jtune.losses.objective import objective_of
from jtune.stages.stage import Stage

PT = Stage(RULES["pt"], objective=objective_of)
