"""Attention within segments: one function, with a kernel for each platform.

choose ── attend (dispatch) ─┬─ reference   all scores at once; the others must equal it
                             ├─ blocks      XLA, a block of queries at a time
                             ├─ splash      TPUs
                             └─ flash       GPUs (flash_kernels)
"""

from jtune.models.attention.cached import attend_cached
from jtune.models.attention.choose import choose
from jtune.models.attention.dispatch import BACKENDS, attend
from jtune.models.attention.reference import MASKED, RESIDUALS, alibi_bias

__all__ = ["BACKENDS", "MASKED", "RESIDUALS", "alibi_bias", "attend", "attend_cached", "choose"]
