"""The loss of a reward model is that of Bradley and Terry, with margins and centring."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs64 import by_group, log_sigmoid, sigmoid, units

from jtune.losses.reward import score_objective

close = np.testing.assert_allclose


def objective(coefficient=0.0):
    return score_objective(SimpleNamespace(rm_center_coef=coefficient), SimpleNamespace(neftune_noise_alpha=None))


def scored(**fields):
    """Pairs with scores of about 1 in the place of log-probabilities."""
    given = units(4, **fields)
    scores = np.random.default_rng(4).normal(0, 1, given.policy.shape).astype(np.float32)
    return given._replace(policy=scores * (given.share > 0)[:, None], reference=None)


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
@pytest.mark.parametrize("margins", [False, True])
def test_loss_and_gradient_are_those_of_the_formula(coefficient, margins):
    given = scored(**({"margin": lambda rng, n: rng.uniform(0, 2, n)} if margins else {}))

    def total(policy):
        return jnp.sum(given.share * objective(coefficient).loss(given._replace(policy=policy))[0])

    loss, gradient = jax.value_and_grad(total)(jnp.asarray(given.policy))
    expected, gradients = 0.0, []
    for group in by_group(given):
        c, r = group.policy.T
        x = c - r - (group.margin if margins else 0)
        expected += np.mean(-log_sigmoid(x) + coefficient * (c + r) ** 2)
        slope, centring = -sigmoid(-x), 2 * coefficient * (c + r)
        gradients.append(np.stack([slope + centring, -slope + centring], -1) / len(c))
    close(loss, expected, rtol=2e-6)
    close(gradient[:8], np.concatenate(gradients), rtol=1e-5, atol=1e-7)
    assert not np.any(gradient[8:])


def test_accuracy_counts_pairs_whose_chosen_answer_has_the_higher_score():
    given = scored()
    policy = np.array(given.policy)
    policy[0, 1] = policy[0, 0]  # equal scores are not right
    value, weight = objective().loss(given._replace(policy=policy))[1]["accuracy"]
    right = policy[:8, 0] > policy[:8, 1]
    assert not right[0]
    close(jnp.sum(value * weight) / jnp.sum(weight), np.mean(right), rtol=1e-6)  # of all pairs, as LLaMA-Factory's


def test_equal_scores_cost_log_two_and_scores_need_no_reference():
    given = scored()
    losses, _ = objective().loss(given._replace(policy=jnp.zeros_like(given.policy)))
    close(losses, np.log(2), rtol=1e-6)
    assert (objective().scores, objective().anchored) == (True, False)
    assert (objective().name, objective(0.01).name) == ("Bradley-Terry", "Bradley-Terry, centred by 0.01")
