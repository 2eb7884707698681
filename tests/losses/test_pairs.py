"""Each loss of pairs is its formula, in value and gradient; groups, padding and rows change nothing else."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs64 import BETA, FORMULAS, GAMMA, SMOOTHING, TAU, Sides, by_group, held_fixed, units, update_loss

from jtune.config import preference
from jtune.config.preference import LOSSES as names_of_cases
from jtune.errors import DataError
from jtune.losses.pairs import LOSSES, ON_MEANS, WITHOUT_REFERENCE
from jtune.losses.preference import pair_objective

SMOOTHED = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"}


def objective(*losses, **changed):
    values = {
        **{"pref_loss": losses, "pref_loss_weights": (), "pref_beta": BETA, "pref_ftx": 0.0, "pref_bco_weight": 0.0},
        **{"simpo_gamma": GAMMA, "discopop_tau": TAU, "ld_alpha": None},
        "dpo_label_smoothing": SMOOTHING if SMOOTHED & set(losses) else 0.0,
    }
    return pair_objective(SimpleNamespace(**values | changed), SimpleNamespace(neftune_noise_alpha=None))


def with_shared(objective, given, running=None):
    """The units with what their losses must know of each other, and what is kept."""
    if objective.shared is None:
        return given, running
    running = objective.running if running is None else running
    shared, running = jax.jit(objective.shared)(given, given.group, running)
    return given._replace(shared=shared), running


def update(objective, given, running=None):
    """Loss of the update, its gradient by the sums of the real units, metrics as they are logged."""
    given, _ = with_shared(objective, given, running)

    def total(policy):
        losses, metrics = objective.loss(given._replace(policy=policy))
        logged = {name: jnp.sum(value * weight) / jnp.sum(weight) for name, (value, weight) in metrics.items()}
        return jnp.sum(given.share * losses) / jnp.sum(given.share), logged

    (loss, logged), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(given.policy))
    assert np.all(np.isfinite(gradient))
    assert not np.any(np.asarray(gradient)[given.share == 0])
    return float(loss), np.asarray(gradient)[given.share > 0], {name: float(x) for name, x in logged.items()}


close = np.testing.assert_allclose


@pytest.mark.parametrize("name", FORMULAS)
def test_each_loss_has_the_value_and_the_gradient_of_its_formula(name):
    given = units()
    loss, gradient, _ = update(objective(name), given)
    expected, by_differences = update_loss(given, FORMULAS[name])
    close(loss, expected, rtol=2e-6)
    close(gradient, by_differences, rtol=2e-4, atol=2e-6)


def test_there_is_a_formula_for_each_loss():
    assert set(FORMULAS) == set(LOSSES) == set(preference.LOSSES)


@pytest.mark.parametrize("name", FORMULAS)
def test_where_units_lie_does_not_matter(name):
    """The same units in [accum, batch, units], in another order, with padding anywhere."""
    given = units(padding=4)
    order = np.random.default_rng(1).permutation(12)
    moved = jax.tree.map(lambda x: x[order].reshape(2, 3, 2, *x.shape[1:]), given)
    loss, gradient, logged = update(objective(name), given)
    there = [i for i in order if i < 8]
    moved_loss, moved_gradient, moved_logged = update(objective(name), moved)
    close(moved_loss, loss, rtol=1e-6)
    close(moved_gradient, gradient[there], rtol=1e-5, atol=1e-7)
    assert moved_logged == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"kto_pair", "bco_pair", "aot", "aot_unpaired"}))
def test_a_pair_has_its_loss_whatever_is_beside_it(name):
    together, one_group = units(), units(groups=(8,))
    losses = [np.asarray(objective(name).loss(given)[0]) for given in (together, one_group)]
    close(*losses, rtol=1e-6)


AT_START = {
    **dict.fromkeys(("sigmoid", "robust", "aot", "aot_unpaired", "sigmoid_norm"), np.log(2)),
    **{"hinge": 1, "ipo": (1 / (2 * BETA)) ** 2, "kto_pair": 0.5, "nca_pair": 2 * np.log(2), "bco_pair": 2 * np.log(2)},
    **{"sppo_hard": 2 * (1 / (2 * BETA)) ** 2, "apo_zero": 1, "apo_down": 1, "discopop": (np.log(2) + 1) / 2},
    "exo_pair": np.log(0.5) - (np.log(1 - SMOOTHING) + np.log(SMOOTHING)) / 2,
}


@pytest.mark.parametrize("name", AT_START)
def test_a_policy_that_is_its_reference_has_a_known_loss(name):
    given = units()
    loss, gradient, logged = update(objective(name), given._replace(policy=given.reference))
    close(loss, AT_START[name], rtol=1e-6)
    assert np.any(gradient)
    # Strictly greater: no pair is right where nothing has been learned.
    assert [logged[f"rewards/{x}"] for x in ("chosen", "rejected", "margins", "accuracies")] == [0, 0, 0, 0]


def test_losses_that_need_a_reference_say_so():
    assert {name for name in LOSSES if not objective(name).anchored} == {*WITHOUT_REFERENCE} == {"orpo", "simpo", "sft"}
    assert objective("sft", "sigmoid").anchored
    assert objective("simpo", pref_bco_weight=1.0).anchored


@pytest.mark.parametrize("name", sorted(WITHOUT_REFERENCE))
def test_no_reference_is_read_where_there_is_none(name):
    given = units()
    alone = update(objective(name), given._replace(reference=None))
    close(alone[0], update(objective(name), given)[0], rtol=1e-6)
    s = [Sides(g.policy, g) for g in by_group(given)]
    close(alone[2]["rewards/chosen"], BETA * np.mean([x.pc.mean() for x in s]), rtol=1e-5)
    close(alone[2]["logps/rejected"], np.mean([x.pr.mean() for x in s]), rtol=1e-5)


def test_several_losses_are_added_by_weight():
    given, parts = units(), [("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0)]  # MPO, arXiv:2411.10442
    losses, weights = zip(*parts, strict=True)
    several = objective(*losses, pref_loss_weights=weights, dpo_label_smoothing=0.0)
    loss, gradient, logged = update(several, given)
    single = [update(objective(name, dpo_label_smoothing=0.0), given) for name in losses]
    close(loss, sum(w * x[0] for w, x in zip(weights, single, strict=True)), rtol=1e-6)
    close(gradient, sum(w * x[1] for w, x in zip(weights, single, strict=True)), rtol=1e-4, atol=1e-7)
    assert logged == pytest.approx(single[0][2])  # the rewards are those of each alone, not times the weights
    assert several.name == "0.8 sigmoid + 0.2 bco_pair + sft, beta 0.4"
    close(update(objective("hinge", "ipo"), given)[0], sum(update(objective(x), given)[0] for x in ("hinge", "ipo")))


def test_bco_beside_another_loss_and_the_cross_entropy_of_chosen_answers():
    given = units()
    found = update(objective("hinge", pref_bco_weight=0.5, pref_ftx=0.3), given)
    formula = lambda s, held: (FORMULAS["hinge"](s, held) + 0.5 * FORMULAS["bco_pair"](s, held)) / 1.5 - 0.3 * s.pc
    expected, gradient = update_loss(given, formula)
    close(found[0], expected, rtol=2e-6)
    close(found[1], gradient, rtol=2e-4, atol=2e-6)


def test_the_baseline_of_bco_is_the_running_mean_of_the_rewards_of_groups():
    """delta goes on from update to update, and is that of one group after the other."""
    bco, running = objective("bco_pair"), None
    every = [units(seed, groups) for seed, groups in enumerate([(3, 3, 2), (2, 2, 2), (4, 1)])]
    mean, count = 0.0, 0
    for given in every:
        found, by_jit = with_shared(bco, given, running)
        running = bco.shared(given, given.group, bco.running if running is None else running)[1]
        close(jax.tree.leaves(running), jax.tree.leaves(by_jit), rtol=1e-6)
        held = held_fixed(given, mean, count)
        expected = [held[number]["delta"] for number in found.group[found.share > 0]]
        close(found.shared["delta"][found.share > 0], expected, rtol=1e-5)
        mean, count = held[-1]["delta"], count + len(held)
    close([running["mean"], running["groups"]], [mean, 8], rtol=1e-5)


def test_the_gradient_of_sorted_answers_is_that_of_the_sorted_definition():
    """Where all of a group is in one call, autodiff through the sort itself gives the same."""
    given = units(groups=(9,), padding=0)

    def by_sorting(policy, unpaired):
        c, r = jnp.moveaxis(policy - given.reference, -1, 0)
        ours, theirs = (x[:, 0] - x[:, 1] for x in (policy, given.reference))
        x = jnp.sort(c) - jnp.sort(r) if unpaired else jnp.sort(ours) - jnp.sort(theirs)
        losses = -(1 - SMOOTHING) * jax.nn.log_sigmoid(BETA * x) - SMOOTHING * jax.nn.log_sigmoid(-BETA * x)
        return losses.mean()

    for name in ("aot", "aot_unpaired"):
        loss, gradient, _ = update(objective(name), given)
        expected = jax.value_and_grad(by_sorting)(jnp.asarray(given.policy), name == "aot_unpaired")
        close(loss, expected[0], rtol=1e-6)
        close(gradient, expected[1], rtol=1e-5, atol=1e-7)


def test_answers_are_ranked_among_those_of_their_group():
    apart, together = units(3, (4, 4)), units(3, (8,))
    for name in ("aot", "aot_unpaired"):
        close(update(objective(name), apart)[0], update_loss(apart, FORMULAS[name])[0], rtol=1e-6)
        assert abs(update(objective(name), apart)[0] - update(objective(name), together)[0]) > 1e-3


def test_a_margin_is_what_the_reward_of_the_chosen_answer_must_exceed():
    given = units(margin=lambda rng, n: rng.uniform(0, 2, n))
    loss, gradient, _ = update(objective("sigmoid"), given)
    expected = update_loss(given, FORMULAS["sigmoid"])
    close(loss, expected[0], rtol=2e-6)
    close(gradient, expected[1], rtol=2e-4, atol=2e-6)
    assert loss > update(objective("sigmoid"), given._replace(margin=None))[0]
    with pytest.raises(DataError, match="margin, which pref_loss: hinge does not use"):
        objective("hinge").loss(given)


def test_what_is_logged_is_what_llamafactory_logs():
    given = units()
    s = [Sides(g.policy, g) for g in by_group(given)]
    mean = lambda values: np.mean([np.mean(x) for x in values])  # of groups, as they weigh alike
    logged = update(objective("sigmoid"), given)[2]
    assert logged == pytest.approx(
        {
            "rewards/chosen": mean([BETA * x.c for x in s]),
            "rewards/rejected": mean([BETA * x.r for x in s]),
            "rewards/accuracies": mean([x.c > x.r for x in s]),
            "rewards/margins": mean([BETA * (x.c - x.r) for x in s]),
            "logps/chosen": mean([g.policy[:, 0] for g in by_group(given)]),
            "logps/rejected": mean([g.policy[:, 1] for g in by_group(given)]),
        },
        rel=1e-5,
    )
    assert 0 < logged["rewards/accuracies"] < 1
    ipo = update(objective("ipo"), given)[2]
    assert ipo["rewards/chosen"] == pytest.approx(mean([BETA * x.mc for x in s]), rel=1e-5)
    assert ipo["logps/chosen"] == pytest.approx(mean([x.pc for x in s]), rel=1e-5)
    orpo = update(objective("orpo", pref_ftx=1.0), given._replace(reference=None))
    plain = update_loss(given, FORMULAS["orpo"])[0]
    assert orpo[2]["sft_loss"] == pytest.approx(mean([-x.pc for x in s]), rel=1e-5)
    # pref_ftx is in the loss, and not in the part that is the odds ratio's.
    assert orpo[2]["odds_ratio_loss"] == pytest.approx((plain - orpo[2]["sft_loss"]) / BETA, rel=1e-4)
    assert orpo[0] == pytest.approx(plain + orpo[2]["sft_loss"], rel=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_answers_far_from_the_reference_or_without_a_token_give_numbers(name):
    given = units(groups=(4,), padding=1)
    policy, counts, reference = (np.array(x) for x in (given.policy, given.counts, given.reference))
    policy[0], policy[1] = (-2e3, -1), (-1, -2e3)
    policy[2] = 0  # sure of both answers
    policy[3], counts[3], reference[3] = 0, 0, 0
    loss, gradient, logged = update(objective(name), given._replace(policy=policy, counts=counts, reference=reference))
    assert np.isfinite([loss, *logged.values()]).all()
    assert np.isfinite(gradient).all()


def test_the_name_says_what_is_minimised():
    assert objective("sigmoid", dpo_label_smoothing=0.0).name == "sigmoid, beta 0.4"
    found = objective("simpo", pref_beta=2.0, pref_ftx=0.1, pref_bco_weight=0.5, ld_alpha=0.5).name
    assert found == (
        "simpo, beta 2, gamma 0.3, tokens beyond the shorter answer weigh 0.5, BCO of weight 0.5, "
        "cross-entropy of chosen answers of weight 0.1"
    )
    assert "tau 0.7" in objective("discopop").name
    assert "labels smoothed by 0.1" in objective("robust").name


def test_rewards_are_of_means_where_all_losses_are():
    assert {"ipo", "sigmoid_norm", "orpo", "simpo", "sft"} == ON_MEANS
    given = units()
    sums = update(objective("sigmoid"), given)[2]["rewards/chosen"]
    assert update(objective("sigmoid", "ipo"), given)[2]["rewards/chosen"] == sums
    assert update(objective("sigmoid_norm"), given)[2]["rewards/chosen"] != sums


@pytest.mark.parametrize("name", FORMULAS)
def test_what_both_models_have_in_common_may_be_left_out_of_both(name):
    given = units()
    offset = np.float32(np.round(given.reference))
    less = given._replace(policy=given.policy - offset, reference=given.reference - offset, offset=offset)
    loss, gradient, logged = update(objective(name), given)
    found = update(objective(name), less)
    close(found[0], loss, rtol=1e-5)
    close(found[1], gradient, rtol=1e-4, atol=1e-6)
    assert found[2] == pytest.approx(logged, rel=1e-4, abs=1e-5)


def test_the_losses_that_a_case_may_name_are_those_that_there_are():
    assert set(names_of_cases) == LOSSES.keys()
