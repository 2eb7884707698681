"""What a stage computes, as a value: nothing else asks which stage a run is in.

A new stage is a file here with a `Stage`, its line in `STAGES`, its row in `jtune.config.stages.RULES` (the rows it
reads, the arguments that are for it), and its loss in `jtune.losses`.
"""

from jtune.stages.dpo import DPO
from jtune.stages.kto import KTO
from jtune.stages.pt import PT
from jtune.stages.rm import RM
from jtune.stages.sft import SFT
from jtune.stages.stage import Stage

STAGES = {entry.rules.name: entry for entry in (PT, SFT, DPO, KTO, RM)}


def stage_of(name: str) -> Stage:
    """The stage that `stage` of the arguments names; `jtune.config` has refused the names of others."""
    return STAGES[name]


__all__ = ["STAGES", "Stage", "stage_of"]
