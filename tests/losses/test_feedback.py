"""KTO is its formula, by groups; the mark of an answer decides on which side it is; a group may lack a side."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs64 import by_group, sigmoid, units

from jtune.losses.feedback import feedback_objective, group_statistics, with_margins

BETA, GOOD, BAD = 0.2, 1.5, 0.75
close = np.testing.assert_allclose


def objective(**changed):
    values = {"pref_beta": BETA, "kto_chosen_weight": GOOD, "kto_rejected_weight": BAD, "pref_ftx": 0.0}
    return feedback_objective(SimpleNamespace(**values | changed), SimpleNamespace(neftune_noise_alpha=None))


def feedback(wanted=(1, 0, 1, 0, 0, 0, 1, 1), groups=(3, 3, 2)):
    """Marked answers, and the same prompts with answers to others; the second group has no good one."""
    marks = np.float32(wanted)
    given = units(0, groups, segments=1)._replace(wanted=np.concatenate([marks, [0, 0]]).astype(np.float32))
    others = units(1, groups, segments=1)._replace(wanted=given.wanted)
    policy = np.array(others.policy)
    policy[6:8] = others.reference[6:8] - 3  # the divergence of the last group is negative: it counts as 0
    return given, others._replace(policy=policy)


def formula(given, others, ftx=0.0):
    """The loss of the update and its gradient, float64: KL held fixed, one group after the other."""
    means, gradients = [], []
    groups = by_group(given)
    for group, other in zip(groups, by_group(others), strict=True):
        kl = max(0.0, np.mean(other.policy - other.reference))
        z, wanted = (group.policy - group.reference)[:, 0], group.wanted == 1
        losses = np.where(wanted, GOOD * (1 - sigmoid(BETA * (z - kl))), BAD * (1 - sigmoid(BETA * (kl - z))))
        steep = BETA * sigmoid(BETA * (z - kl)) * sigmoid(BETA * (kl - z))
        gradient = np.where(wanted, -GOOD * steep, BAD * steep) / len(z)
        mean = losses.mean()
        if ftx and wanted.any():
            mean += ftx * np.mean(-group.policy[wanted, 0] / group.counts[wanted, 0])
            gradient -= np.where(wanted, ftx / group.counts[:, 0] / wanted.sum(), 0)
        means.append(mean)
        gradients.append(gradient / len(groups))
    return np.mean(means), np.concatenate(gradients)


def update(objective, given, others):
    shared, _ = jax.jit(objective.shared)(others, given.group, None)

    def total(policy):
        losses, metrics = objective.loss(given._replace(policy=policy, shared=shared))
        sums = {name: (jnp.sum(value * weight), jnp.sum(weight)) for name, (value, weight) in metrics.items()}
        return jnp.sum(given.share * losses) / jnp.sum(given.share), sums

    (loss, sums), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(given.policy))
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all()
    assert not np.any(gradient[given.share == 0])
    return float(loss), gradient[given.share > 0][:, 0], {name: float(v / w) for name, (v, w) in sums.items() if w}


@pytest.mark.parametrize("ftx", [0.0, 0.3])
def test_loss_and_gradient_are_those_of_the_formula(ftx):
    given, others = feedback()
    loss, gradient, _ = update(objective(pref_ftx=ftx), given, others)
    expected = formula(given, others, ftx)
    close(loss, expected[0], rtol=2e-6)
    close(gradient, expected[1], rtol=1e-5, atol=1e-8)


def test_where_answers_lie_does_not_matter():
    given, others = feedback()
    order = np.random.default_rng(2).permutation(10)
    there = [i for i in order if i < 8]
    moved = [jax.tree.map(lambda x: x[order].reshape(5, 1, 2, *x.shape[1:]), x) for x in (given, others)]
    for ftx in (0.0, 1.0):
        loss, gradient, logged = update(objective(pref_ftx=ftx), given, others)
        found = update(objective(pref_ftx=ftx), *moved)
        close(found[0], loss, rtol=1e-6)
        close(found[1], gradient[there], rtol=1e-5, atol=1e-8)
        assert found[2] == pytest.approx(logged, rel=1e-5)


def test_mismatched_answers_may_lie_in_other_rows_than_the_units():
    given, others = feedback()
    order = [3, 1, 2, 0, 7, 5, 4, 6]
    moved = jax.tree.map(lambda x: x[order].reshape(4, 2, 1, *x.shape[1:]), others)
    for ftx in (0.0, 1.0):
        close(update(objective(pref_ftx=ftx), given, moved)[0], update(objective(pref_ftx=ftx), given, others)[0])


def test_at_the_start_a_good_and_a_bad_answer_lose_half_their_weight():
    given, others = feedback()
    start = [x._replace(policy=x.reference) for x in (given, others)]
    loss, gradient, logged = update(objective(), *start)
    close(loss, np.mean([(2 * GOOD + BAD) / 3, BAD, GOOD]) / 2, rtol=1e-6)
    wanted = given.wanted[:8] == 1
    assert (gradient[wanted] < 0).all()  # more of the good
    assert (gradient[~wanted] > 0).all()
    assert logged["rewards/chosen"] == logged["rewards/rejected"] == logged["kl"] == 0


def test_the_divergence_is_the_mean_over_a_group_and_never_negative():
    given, others = feedback()
    shared, _ = group_statistics(others, given.group, None)
    drift = (others.policy - others.reference)[:, 0]
    close(shared["kl"][:8], np.repeat([max(0, drift[:3].mean()), max(0, drift[3:6].mean()), 0], [3, 3, 2]), rtol=1e-5)
    close(shared["good_share"][:8], np.repeat([2 / 3, 0, 1], [3, 3, 2]), rtol=1e-6)
    assert shared["kl"][0] > 0 or shared["kl"][3] > 0


def test_metrics_are_means_over_the_answers_of_their_kind():
    given, others = feedback()
    logged = update(objective(), given, others)[2]
    policy, wanted = given.policy[:8, 0], given.wanted[:8] == 1
    z = policy - given.reference[:8, 0]
    drift = [max(0, np.mean(x.policy - x.reference)) for x in by_group(others)]
    assert logged == pytest.approx(
        {
            "rewards/chosen": BETA * z[wanted].mean(),
            "rewards/rejected": BETA * z[~wanted].mean(),
            "logps/chosen": policy[wanted].mean(),
            "logps/rejected": policy[~wanted].mean(),
            "kl": np.mean(drift),
        },
        rel=1e-5,
    )


def test_a_margin_is_the_difference_of_two_means_where_there_are_both():
    given, others = feedback()
    logged = update(objective(), given, others)[2]
    both = with_margins(logged)
    close(both["rewards/margins"], logged["rewards/chosen"] - logged["rewards/rejected"])
    only_bad = update(objective(pref_ftx=1.0), *feedback(wanted=[0] * 8))[2]
    assert "rewards/chosen" not in only_bad
    assert with_margins(only_bad) == only_bad
    assert (
        with_margins({"rewards/margins": 7.0, "rewards/chosen": 1.0, "rewards/rejected": 0.0})["rewards/margins"] == 7
    )


def test_the_mark_decides_and_not_whether_the_answer_has_tokens():
    given, others = feedback()
    policy, counts, reference = (np.array(x) for x in (given.policy, given.counts, given.reference))
    policy[0] = counts[0] = reference[0] = 0  # a good answer without a token
    empty = given._replace(policy=policy, counts=counts, reference=reference)
    for ftx in (0.0, 0.5):
        loss, gradient, logged = update(objective(pref_ftx=ftx), empty, others)
        assert np.isfinite([loss, *gradient, *logged.values()]).all()
    z = (policy - reference)[:8, 0]
    close(logged["rewards/chosen"], BETA * z[given.wanted[:8] == 1].mean(), rtol=1e-5)


def test_the_name_says_what_is_minimised():
    plain = objective(kto_chosen_weight=1.0, kto_rejected_weight=1.0)
    assert plain.name == "KTO, beta 0.2"
    assert (plain.anchored, plain.mismatched, plain.scores) == (True, True, False)
    assert objective(pref_ftx=0.1).name == (
        "KTO, beta 0.2, good answers weigh 1.5 and bad ones 0.75, cross-entropy of good answers of weight 0.1"
    )


def test_what_both_models_have_in_common_may_be_left_out_of_both():
    whole = feedback()
    offsets = [np.float32(np.round(x.reference)) for x in whole]
    less = [
        x._replace(policy=x.policy - offset, reference=x.reference - offset, offset=offset)
        for x, offset in zip(whole, offsets, strict=True)
    ]
    for ftx in (0.0, 0.5):
        loss, gradient, logged = update(objective(pref_ftx=ftx), *whole)
        found = update(objective(pref_ftx=ftx), *less)
        close(found[0], loss, rtol=1e-5)
        close(found[1], gradient, rtol=1e-4, atol=1e-7)
        assert found[2] == pytest.approx(logged, rel=1e-4, abs=1e-5)
