"""The losses of pairs, `pref_loss` of stage dpo: each is a line of mathematics on sums over the two answers.

An answer y has the log-probability log p(y), the sum over its labelled tokens. Its log-ratio is log p(y) less that of
the reference model. Each formula is that of the paper beside it, with the names of arguments that TRL and LLaMA-Factory
give to its constants.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtune.config.preference import WITHOUT_REFERENCE


class Pair(NamedTuple):
    """What the loss of a pair may read, float32 `[U]` each."""

    chosen: jax.Array  # log-ratio of the chosen answer
    rejected: jax.Array
    mean_chosen: jax.Array  # the same, divided by the answer's labelled tokens
    mean_rejected: jax.Array
    logp_chosen: jax.Array  # log-probability of the chosen answer, divided by its labelled tokens: no reference in it
    logp_rejected: jax.Array
    margin: jax.Array  # 0 where the rows have none
    shared: Mapping[str, jax.Array]  # what follows from the other pairs, held fixed: see `jtune.losses.preference`


class Options(NamedTuple):
    """The constants of the formulas."""

    beta: float = 0.1  # pref_beta
    smoothing: float = 0.0  # dpo_label_smoothing
    gamma: float = 0.5  # simpo_gamma
    tau: float = 0.05  # discopop_tau


PairLoss = Callable[[Pair, Options], jax.Array]

EXO_SMOOTHING = 1e-3  # what EXO takes where no smoothing is set: it has a log of it
SURE = -1e-6  # a mean log-probability nearer to 0 counts as this in ORPO's odds: those of probability 1 are infinite


def logistic(x: jax.Array) -> jax.Array:
    """-log sigmoid(x)."""
    return -jax.nn.log_sigmoid(x)


def smoothed(x: jax.Array, smoothing: float) -> jax.Array:
    """The logistic loss where a share `smoothing` of the labels is expected to be swapped (cDPO)."""
    return (1 - smoothing) * logistic(x) + smoothing * logistic(-x)


def delta(p: Pair) -> jax.Array:
    return p.chosen - p.rejected


def mean_delta(p: Pair) -> jax.Array:
    return p.mean_chosen - p.mean_rejected


def robust(x: jax.Array, smoothing: float) -> jax.Array:
    return ((1 - smoothing) * logistic(x) - smoothing * logistic(-x)) / (1 - 2 * smoothing)


def exo(x: jax.Array, smoothing: float) -> jax.Array:
    """KL of (sigmoid(x), sigmoid(-x)) from (1 - smoothing, smoothing)."""
    likely, unlikely = jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)
    return jnp.exp(likely) * (likely - math.log(1 - smoothing)) + jnp.exp(unlikely) * (unlikely - math.log(smoothing))


def log_odds(p: Pair) -> jax.Array:
    """log(odds of chosen / odds of rejected), the odds of a probability P being P / (1 - P), P that of a mean token."""
    odds = lambda x: x - jnp.log(-jnp.expm1(jnp.minimum(x, SURE)))
    return odds(p.logp_chosen) - odds(p.logp_rejected)


def bco(p: Pair, o: Options) -> jax.Array:
    return logistic(o.beta * p.chosen - p.shared["delta"]) + logistic(p.shared["delta"] - o.beta * p.rejected)


def aot_unpaired(p: Pair, o: Options) -> jax.Array:
    """The loss of the chosen answer beside the rejected one of its rank, and the gradient of the rejected one besides.

    A rejected answer belongs to the term of the chosen one of its rank, which may be that of another pair. The second
    term has that one's gradient and the value 0, so that all together have value and gradient of the sum over ranks.
    """
    by_chosen = smoothed(o.beta * (p.chosen - p.shared["ranked_rejected"]), o.smoothing)
    by_rejected = smoothed(o.beta * (p.shared["ranked_chosen"] - p.rejected), o.smoothing)
    return by_chosen + (by_rejected - jax.lax.stop_gradient(by_rejected))


def kto_pair(p: Pair, o: Options) -> jax.Array:
    good = jax.nn.sigmoid(o.beta * (p.shared["kl_rejected"] - p.chosen))
    return (good + jax.nn.sigmoid(o.beta * (p.rejected - p.shared["kl_chosen"]))) / 2


def discopop(x: jax.Array, tau: float) -> jax.Array:
    """`exp(-x)` where x is above 0 and the logistic loss below, blended by `sigmoid(x / tau)`."""
    blend = jax.nn.sigmoid(x / tau)
    return (1 - blend) * logistic(x) + jnp.exp(jax.nn.log_sigmoid(x / tau) - x)  # not blend * exp(-x): 0 * inf


# fmt: off
LOSSES: dict[str, PairLoss] = {
    # DPO, arXiv:2305.18290; the margin as in LLaMA 2, arXiv:2307.09288, and ODPO, arXiv:2402.10571
    "sigmoid": lambda p, o: smoothed(o.beta * delta(p) - p.margin, o.smoothing),
    # SLiC, arXiv:2305.10425, on log-ratios: arXiv:2309.06657
    "hinge": lambda p, o: jax.nn.relu(1 - o.beta * delta(p)),
    # IPO, arXiv:2310.12036, on means over tokens, as its authors say it is meant
    "ipo": lambda p, o: (mean_delta(p) - 1 / (2 * o.beta)) ** 2,
    # KTO on pairs, arXiv:2402.01306: the divergence is estimated by the other side's answers
    "kto_pair": kto_pair,
    # ORPO, arXiv:2403.07691
    "orpo": lambda p, o: -p.logp_chosen + o.beta * logistic(log_odds(p)),
    # SimPO, arXiv:2405.14734
    "simpo": lambda p, o: logistic(o.beta * (p.logp_chosen - p.logp_rejected) - o.gamma),
    # robust DPO, arXiv:2403.00409
    "robust": lambda p, o: robust(o.beta * delta(p), o.smoothing),
    # EXO, arXiv:2402.00856, equation 16
    "exo_pair": lambda p, o: exo(o.beta * delta(p), o.smoothing or EXO_SMOOTHING),
    # NCA, arXiv:2402.05369
    "nca_pair": lambda p, o:
        logistic(o.beta * p.chosen) + logistic(-o.beta * p.chosen) / 2 + logistic(-o.beta * p.rejected) / 2,
    # BCO, arXiv:2404.04656
    "bco_pair": bco,
    # SPPO with hard labels, arXiv:2405.00675
    "sppo_hard": lambda p, o: (p.chosen - 1 / (2 * o.beta)) ** 2 + (p.rejected + 1 / (2 * o.beta)) ** 2,
    # AOT, arXiv:2406.05882: what the policy says of pairs against what the reference does, both sorted
    "aot": lambda p, o: smoothed(o.beta * (delta(p) + p.shared["reference_shift"]), o.smoothing),
    "aot_unpaired": aot_unpaired,
    # APO, arXiv:2408.06266, equations 7 and 8
    "apo_zero": lambda p, o: jax.nn.sigmoid(-o.beta * p.chosen) + jax.nn.sigmoid(o.beta * p.rejected),
    "apo_down": lambda p, o: jax.nn.sigmoid(o.beta * p.chosen) + jax.nn.sigmoid(-o.beta * delta(p)),
    # DiscoPOP, arXiv:2406.08414, equation 5
    "discopop": lambda p, o: discopop(o.beta * delta(p), o.tau),
    # DPO on means over tokens, arXiv:2411.15124
    "sigmoid_norm": lambda p, o: logistic(o.beta * mean_delta(p)),
    # cross-entropy of the chosen answer, for sums of several (MPO, arXiv:2411.10442)
    "sft": lambda p, o: -p.logp_chosen,
}
# fmt: on
ON_MEANS = {"ipo", "sigmoid_norm", *WITHOUT_REFERENCE}  # on means over an answer's tokens, and not on sums
