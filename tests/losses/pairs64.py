"""The published formulas of losses of units in float64, group by group, and units to try them on."""

import numpy as np

from jtune.losses.units import Units

BETA, SMOOTHING, GAMMA, TAU = 0.4, 0.1, 0.3, 0.7


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def units(seed=0, groups=(3, 3, 2), padding=2, segments=2, shape=None, **fields):
    """Units in groups of these sizes, with padding at the end, as float32 arrays `[*shape]`."""
    rng = np.random.default_rng(seed)
    real, n = sum(groups), sum(groups) + padding
    counts = rng.integers(4, 30, (n, segments)).astype(np.float32)
    reference = -counts * rng.uniform(0.5, 2.5, (n, segments))
    policy = reference + rng.normal(0, 4, (n, segments))
    group = np.concatenate([np.repeat(np.arange(len(groups)), groups), np.zeros(padding, int)])
    share = np.concatenate([np.repeat(1 / np.asarray(groups), groups), np.zeros(padding)])
    there = (np.arange(n) < real)[:, None]
    found = {
        "policy": np.minimum(policy, -0.5) * there,
        "counts": counts * there,
        "share": share,
        "reference": reference * there,
        **{name: values(rng, n) * there[:, 0] for name, values in fields.items()},
    }
    shape = shape or (n,)
    arrays = {name: x.astype(np.float32).reshape(*shape, *x.shape[1:]) for name, x in found.items()}
    return Units(group=group.astype(np.int32).reshape(shape), **arrays)


def by_group(given):
    """The real units of each group, flat, float64, in a list."""
    flat = [None if x is None or isinstance(x, dict) else np.asarray(x) for x in given]
    axes = given.share.ndim
    flat = Units(*(None if x is None else x.reshape(-1, *x.shape[axes:]).astype(np.float64) for x in flat))
    numbers = np.unique(flat.group[flat.share > 0])
    picked = [(flat.group == number) & (flat.share > 0) for number in numbers]
    return [Units(*(None if x is None else x[where] for x in flat)) for where in picked]


class Sides:
    """What the formulas are written in: log-ratios c, r; means of them; mean log-probabilities; the two models."""

    def __init__(self, policy, group):
        ratio = policy - group.reference
        self.c, self.r = ratio.T
        self.mc, self.mr = (ratio / group.counts).T
        self.pc, self.pr = (policy / group.counts).T
        self.ours, self.reference = policy[:, 0] - policy[:, 1], group.reference[:, 0] - group.reference[:, 1]
        self.margin = 0 if group.margin is None else group.margin


def smoothed(x):
    return -(1 - SMOOTHING) * log_sigmoid(x) - SMOOTHING * log_sigmoid(-x)


def odds(mean_logp):
    return np.exp(mean_logp) / (1 - np.exp(mean_logp))


def bco(s, held):
    return -log_sigmoid(BETA * s.c - held["delta"]) - log_sigmoid(-(BETA * s.r - held["delta"]))


def discopop(x):
    mixed = sigmoid(x / TAU)
    return -log_sigmoid(x) * (1 - mixed) + np.exp(-x) * mixed


def exo(x):
    target, likely = np.array([1 - SMOOTHING, SMOOTHING]), np.stack([sigmoid(x), sigmoid(-x)], -1)
    return np.sum(likely * np.log(likely / target), -1)


# The losses of the pairs of a group; what is held fixed comes as a second argument.
FORMULAS = {
    "sigmoid": lambda s, held: smoothed(BETA * (s.c - s.r) - s.margin),
    "hinge": lambda s, held: np.maximum(0, 1 - BETA * (s.c - s.r)),
    "ipo": lambda s, held: (s.mc - s.mr - 1 / (2 * BETA)) ** 2,
    "kto_pair": lambda s, held: (
        (1 - sigmoid(BETA * (s.c - held["kl_r"])) + 1 - sigmoid(BETA * (held["kl_c"] - s.r))) / 2
    ),
    "orpo": lambda s, held: -s.pc - BETA * log_sigmoid(np.log(odds(s.pc) / odds(s.pr))),
    "simpo": lambda s, held: -log_sigmoid(BETA * (s.pc - s.pr) - GAMMA),
    "robust": lambda s, held: (
        ((1 - SMOOTHING) * -log_sigmoid(BETA * (s.c - s.r)) + SMOOTHING * log_sigmoid(-BETA * (s.c - s.r)))
        / (1 - 2 * SMOOTHING)
    ),
    "exo_pair": lambda s, held: exo(BETA * (s.c - s.r)),
    "nca_pair": lambda s, held: (
        -log_sigmoid(BETA * s.c) - 0.5 * log_sigmoid(-BETA * s.c) - 0.5 * log_sigmoid(-BETA * s.r)
    ),
    "bco_pair": bco,
    "sppo_hard": lambda s, held: (s.c - 0.5 / BETA) ** 2 + (s.r + 0.5 / BETA) ** 2,
    "aot": lambda s, held: smoothed(BETA * (np.sort(s.ours) - np.sort(s.reference))),
    "aot_unpaired": lambda s, held: smoothed(BETA * (np.sort(s.c) - np.sort(s.r))),
    "apo_zero": lambda s, held: 1 - sigmoid(BETA * s.c) + sigmoid(BETA * s.r),
    "apo_down": lambda s, held: sigmoid(BETA * s.c) + 1 - sigmoid(BETA * (s.c - s.r)),
    "discopop": lambda s, held: discopop(BETA * (s.c - s.r)),
    "sigmoid_norm": lambda s, held: -log_sigmoid(BETA * (s.mc - s.mr)),
    "sft": lambda s, held: -s.pc,
}


def held_fixed(given, mean=0.0, count=0):
    """For each group: the divergences of its sides, and the mean reward of all groups so far and of this one."""
    found = []
    for group in by_group(given):
        s = Sides(group.policy, group)
        mean, count = (mean * count + BETA * np.mean([s.c, s.r])) / (count + 1), count + 1
        found.append({"kl_c": max(0, s.c.mean()), "kl_r": max(0, s.r.mean()), "delta": mean})
    return found


def update_loss(given, formula):
    """The loss of an update, the mean over groups of the means of their pairs, and its gradient by `policy`, flat."""
    held, groups = held_fixed(given), by_group(given)

    def total(policies):
        means = [formula(Sides(p, g), h).mean() for p, g, h in zip(policies, groups, held, strict=True)]
        return np.mean(means)

    gradients = []
    for number, group in enumerate(groups):
        gradient = np.zeros_like(group.policy)
        for place in np.ndindex(*gradient.shape):
            moved = []
            for step in (1e-5, -1e-5):
                policies = [g.policy.copy() for g in groups]
                policies[number][place] += step
                moved.append(total(policies))
            gradient[place] = (moved[0] - moved[1]) / 2e-5
        gradients.append(gradient)
    return total([g.policy for g in groups]), np.concatenate(gradients)
