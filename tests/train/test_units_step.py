"""The train step on units: where they lie, and who computes their reference, changes nothing of an update."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import CONFIG, RATE, adamw, prepared, program_of, same, weights

from jtune import tuning
from jtune.config import DataArguments, FinetuningArguments, ModelArguments, TrainingArguments
from jtune.data import Sizes, UnitSet
from jtune.data.batching.shapes import Shape
from jtune.data.batching.train import Layout, UnitLayout, lay_out
from jtune.evaluation.references import of_model
from jtune.evaluation.units import Reference, make_reference, make_sums, make_unit_measure
from jtune.loading.model import Model, abstract_like, placement
from jtune.losses.batch import sharding_of
from jtune.losses.reference import step_constants
from jtune.losses.segments import make_unit_losses, sums_of
from jtune.losses.units import UnitObjective
from jtune.models import CausalLM
from jtune.models.config import Experts
from jtune.models.decoder import hidden_states
from jtune.models.moe import balance_loss
from jtune.models.value_head import draw_value_head
from jtune.sharding import batch_shards, make_mesh, replicated
from jtune.stages import stage_of
from jtune.train.program import lower_step
from jtune.train.state import abstract_state, init_state, shardings_of
from jtune.train.step import make_train_step

UNITS, GROUP, WIDTH, SEQ = 8, 3, 4, 64  # microbatches of LLaMA-Factory of 3, 3 and 2 units
PROMPT = 2
SMALL = replace(CONFIG, num_hidden_layers=2, layers=(), logit_multiplier=20.0)  # else all tokens are about as likely
EXPERTS = replace(SMALL, layers=(), experts=Experts(4, 2, 32, aux_coef=0.1))

STAGES = {
    "sigmoid": ("dpo", {"pref_ftx": 0.5}),
    "orpo": ("dpo", {"pref_loss": ("orpo",)}),
    "bco_pair": ("dpo", {"pref_loss": ("bco_pair",)}),
    "aot": ("dpo", {"pref_loss": ("aot",)}),
    "kto": ("kto", {"pref_ftx": 0.3, "kto_chosen_weight": 1.5}),
    "rm": ("rm", {"rm_center_coef": 0.1}),
}


def goal_of(name, **training):
    stage, asked = STAGES[name]
    return stage_of(stage).objective(FinetuningArguments(stage=stage, **asked), TrainingArguments(**training))


# ---------------------------------------------------------------------- units, and where they lie


class Side:
    """One side of encoded rows: prompts and answers of random tokens; the answers are labelled."""

    def __init__(self, seed, marked=False):
        rng = np.random.default_rng(seed)
        self.ids = [rng.integers(1, CONFIG.vocab_size, rng.integers(PROMPT + 1, 15)) for _ in range(UNITS)]
        self.lengths = np.array([len(ids) for ids in self.ids], np.int32)
        self.labelled = self.lengths - PROMPT
        self.columns = {"kto_tags": (np.arange(UNITS) % 3 > 0).astype(np.float32)} if marked else {}

    def __len__(self):
        return UNITS

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": np.where(np.arange(len(self.ids[i])) < PROMPT, -100, self.ids[i])}

    def column(self, name):
        return self.columns.get(name)


@cache
def units_of(name):
    if name == "kto":
        return UnitSet((Side(0, marked=True),), mismatched=UnitSet((Side(2, marked=True),)))
    return UnitSet((Side(0), Side(1)), scores=name == "rm")


# The row of each unit, and [accum, batch, seq]. Those of a microbatch of LLaMA-Factory lie in several of ours.
ONE_EACH = np.arange(UNITS), Shape(1, UNITS, SEQ)
PACKED = np.array([5, 0, 0, 1, 1, 2, 3, 3]), Shape(4, 2, SEQ)  # a row of the third is empty, of the fourth all are
SPREAD = np.arange(UNITS), Shape(2, UNITS // 2, SEQ)
OTHERS = {1: (np.array([1, 2, 0, 0, 2, 3, 3, 3]), Shape(1, 4, SEQ)), 2: (np.arange(UNITS)[::-1], Shape(1, UNITS, SEQ))}


def batch_of(units, where, others=OTHERS[1], reference=None):
    """The arrays of an update of all units, laid out as asked."""

    def laid(units, slots, shape, sums):
        fields = units.fields if sums is None else units.fields | {"reference": sums}
        slots = slots if slots.ndim == 2 else np.repeat(slots[:, None], len(units.sides), axis=1)
        widths = WIDTH, WIDTH * len(units.sides)
        layout = Layout(units, np.arange(UNITS), slots, shape, 10**6, UnitLayout(fields, GROUP, widths))
        return lay_out(layout, 1, None, "update")

    first, other = reference or (None, None)
    batch = laid(units, *where, first)
    if units.mismatched is not None:
        more = laid(units.mismatched, *others, other)
        batch |= {f"kl_{name}": x for name, x in more.items() if name != "divisor"}
    return {name: jnp.asarray(x) for name, x in batch.items()}


# ---------------------------------------------------------------------- a run of updates


def model_of(name, method="lora", config=SMALL):
    params, _ = prepared(method, config)
    if goal_of(name).scores:
        params |= {"v_head": draw_value_head(config.hidden_size, jax.random.key(5))}
    return params, tuning.trainable_mask(params) if method == "lora" else tuning.full_mask(params)


def tokens(shape, shards=1):
    """Positions of a microbatch on a shard."""
    return shape.batch // shards * shape.seq


def update_of(name, batch, *, method="lora", config=SMALL, goal=None, key=None):
    """(state, constants, jitted step) on one device."""
    goal, units = goal or goal_of(name), units_of(name)
    params, mask = model_of(name, method, config)
    trainable, frozen = tuning.partition(params, mask)
    if "reference" in batch:
        goal = goal._replace(anchored=False)
    capacity = {"label_capacity": int(np.prod(batch["input_ids"].shape[1:]))}
    if units.mismatched is not None:
        capacity["other_capacity"] = int(np.prod(batch["kl_input_ids"].shape[1:]))
    losses, tx = make_unit_losses(CausalLM(config), goal, batch_shards=1, **capacity), adamw(trainable, config)
    step = jax.jit(make_train_step(losses, tx, max_grad_norm=1.0, dropout_key=key))
    constants = step_constants(goal, trainable, frozen, jnp.float32)
    return init_state(trainable, tx, running=goal.running), constants, step


def figures_of(metrics, state):
    """All that is logged of an update, and what is kept from update to update."""
    found = {"loss": metrics.loss, "grad_norm": metrics.grad_norm, "tokens": metrics.tokens}
    found |= {name: total / weight for name, (total, weight) in metrics.figures.items()}
    found |= {f"running {name}": x for name, x in (state.running or {}).items()}
    return {name: float(x) for name, x in found.items()}


def train(name, batch, *, updates=2, **how):
    state, constants, step = update_of(name, batch, **how)
    found = []
    for _ in range(updates):
        state, metrics = step(state, constants, batch, RATE)
        found.append(figures_of(metrics, state))
    return found


@cache
def one_each(name, method="lora", config=SMALL):
    """Of an update with a unit in each row, all in one microbatch."""
    return train(name, batch_of(units_of(name), ONE_EACH), method=method, config=config)


def assert_same(found, expected, rtol=1e-4):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=rtol, abs=5e-5)  # mean logits are near 0


@pytest.mark.parametrize(("name", "method"), [(name, "full" if name in ("orpo", "rm") else "lora") for name in STAGES])
def test_packed_and_accumulated_equal_a_unit_in_each_row(name, method):
    expected = one_each(name, method)
    assert expected[0]["tokens"] == 3
    assert expected[0]["loss"] != pytest.approx(expected[1]["loss"], rel=1e-3), "the update changes nothing"
    assert_same(train(name, batch_of(units_of(name), PACKED, OTHERS[2]), method=method), expected)


def test_the_loss_is_the_mean_of_llamafactorys_microbatches():
    """At the start the loss of DPO is log 2 whatever the shares; of ORPO it is not: by plain loops."""
    params = weights(SMALL)
    logits_of = jax.jit(lambda ids: CausalLM(SMALL).apply({"params": params}, ids))
    means = []
    for i in range(UNITS):
        of_pair = []
        for side in units_of("orpo").sides:
            ids = side.ids[i]
            padded = jnp.zeros((1, 16), jnp.int32).at[0, : len(ids)].set(ids)
            logs = np.asarray(jax.nn.log_softmax(logits_of(padded)[0]), np.float64)
            of_pair.append(np.mean([logs[t - 1, ids[t]] for t in range(PROMPT, len(ids))]))
        means.append(of_pair)
    chosen, rejected = np.array(means).T
    odds = lambda x: x - np.log1p(-np.exp(x))
    losses = -chosen + 0.1 * np.log1p(np.exp(odds(rejected) - odds(chosen)))
    expected = np.mean([losses[:3].mean(), losses[3:6].mean(), losses[6:].mean()])
    assert abs(expected - losses.mean()) > 1e-4, "the shares do not show"
    same(one_each("orpo", "full")[0]["loss"], expected, rtol=1e-5)
    assert one_each("sigmoid")[0]["rewards/accuracies"] == 0


# ---------------------------------------------------------------------- references


def settings(stage):
    return SimpleNamespace(
        data=DataArguments(cutoff_len=32),
        training=TrainingArguments(per_device_eval_batch_size=2, do_train=True),
        finetuning=FinetuningArguments(stage=stage),
        model=ModelArguments(),
    )


@cache
def precomputed(name, method="lora"):
    """The sums of the model as it is at the start, each segment in a row without its unit."""
    mesh = make_mesh(fsdp=1, devices=jax.devices()[:1])
    of = make_reference(CausalLM(SMALL, mesh=mesh), goal_of(name), units_of(name), mesh, settings(STAGES[name][0]))
    base = tuning.lora.split(model_of(name, method)[0])[0]
    return tuple(of(jax.device_put(base, placement(base, SMALL, mesh))))


@pytest.mark.parametrize(("name", "method"), [("sigmoid", "full"), ("aot", "lora"), ("kto", "lora")])
def test_a_reference_that_is_precomputed_is_that_of_the_step(name, method):
    batch = batch_of(units_of(name), PACKED, reference=precomputed(name, method))
    assert_same(train(name, batch, method=method), one_each(name, method))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("where", ["in the step", "precomputed"])
def test_before_the_first_update_the_model_is_its_reference(where, method):
    def differences(units):
        moved = jnp.max(jnp.abs(units.policy - units.reference), axis=-1)
        return jnp.sum(units.policy, -1), {"moved": (moved, (units.share > 0).astype(jnp.float32))}

    goal = UnitObjective("how far the model is from its reference", differences, anchored=True)
    reference = precomputed("sigmoid", method) if where == "precomputed" else None
    batch = batch_of(units_of("sigmoid"), PACKED, reference=reference)
    before, after = train("sigmoid", batch, method=method, goal=goal)
    assert before["moved"] < 1e-5 / UNITS
    assert after["moved"] > 0.1


def test_noise_is_drawn_for_the_model_that_trains_alone():
    goal, key = goal_of("sigmoid", neftune_noise_alpha=5.0), jax.random.key(9)
    noisy = train("sigmoid", batch_of(units_of("sigmoid"), PACKED), goal=goal, key=key)
    assert abs(noisy[0]["rewards/margins"]) > 1e-3  # in the step 0
    batch = batch_of(units_of("sigmoid"), PACKED, reference=precomputed("sigmoid"))
    assert_same(train("sigmoid", batch, goal=goal, key=key), noisy)


# ---------------------------------------------------------------------- what is kept from update to update


def test_an_update_that_is_skipped_leaves_the_running_means_as_they_were():
    good = batch_of(units_of("bco_pair"), PACKED, reference=precomputed("bco_pair"))
    bad = good | {"reference": jnp.where(good["share"][..., None, None] > 0, jnp.nan, good["reference"])}
    state, constants, step = update_of("bco_pair", good)
    for batch in (good, bad, good):
        before = state
        state, metrics = step(state, constants, batch, RATE)
        assert bool(metrics.finite) == (batch is good)
        if batch is bad:
            assert jax.tree.all(
                jax.tree.map(lambda a, b: bool((a == b).all()), before._replace(step=state.step), state)
            )
    assert float(state.running["groups"]) == 6
    assert float(state.running["mean"]) == pytest.approx(train("bco_pair", good)[1]["running mean"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigmoid", "kto"])
def test_the_load_of_experts_is_balanced_once(name):
    """Neither the reference nor mismatched answers add to it."""
    batch = batch_of(units_of(name), ONE_EACH)
    params, _ = model_of(name, "lora", EXPERTS)
    inputs = (batch[key][0] for key in ("input_ids", "positions", "segment_ids"))
    load = hidden_states(CausalLM(EXPERTS), params, *inputs).load
    free = replace(EXPERTS, experts=replace(EXPERTS.experts, aux_coef=0.0))
    assert float(balance_loss(load)) > 1
    with_load, without = (train(name, batch, config=config, updates=1)[0]["loss"] for config in (EXPERTS, free))
    same(with_load - without, 0.1 * balance_loss(load), rtol=1e-4)


# ---------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("name", "method", "sizes", "config"),
    [
        ("sigmoid", "lora", {"fsdp": 8}, SMALL),
        pytest.param("kto", "lora", {"data": 2, "fsdp": 2, "tensor": 2}, SMALL, marks=pytest.mark.slow),
        ("rm", "full", {"fsdp": 2, "context": 2, "tensor": 2}, SMALL),
        pytest.param("orpo", "full", {"fsdp": 2, "context": 4}, SMALL, marks=pytest.mark.slow),
        pytest.param("sigmoid", "full", {"fsdp": 2, "context": 2, "tensor": 2}, SMALL, marks=pytest.mark.slow),
        pytest.param("kto", "full", {"fsdp": 4, "context": 2}, SMALL, marks=pytest.mark.slow),
        pytest.param("bco_pair", "lora", {"data": 4, "fsdp": 1, "tensor": 2}, SMALL, marks=pytest.mark.slow),
        pytest.param("aot", "lora", {"data": 2, "fsdp": 2, "context": 2}, SMALL, marks=pytest.mark.slow),
        pytest.param("rm", "lora", {"fsdp": 8}, SMALL, marks=pytest.mark.slow),
        pytest.param("sigmoid", "lora", {"fsdp": 2, "expert": 4}, EXPERTS, marks=pytest.mark.slow),
    ],
    ids=lambda x: "experts" if x is EXPERTS else "dense" if x is SMALL else str(x),
)
def test_eight_devices_equal_one(name, method, sizes, config, monkeypatch):
    monkeypatch.setattr("jtune.tuning.axes.SMALL_ADAPTER", 0)
    goal, mesh, units = goal_of(name), make_mesh(**sizes), units_of(name)
    shards = batch_shards(mesh)
    where = ONE_EACH if shards == 8 or config is EXPERTS else SPREAD  # the load of experts is that of a microbatch
    batch = batch_of(units, where, OTHERS[2])
    batch = {k: jax.device_put(x, sharding_of(k, mesh) if x.ndim else replicated(mesh)) for k, x in batch.items()}
    params, mask = model_of(name, method, config)
    placed = jax.device_put(jax.tree.map(jnp.copy, params), placement(params, config, mesh))  # donated
    trainable, frozen = tuning.partition(placed, mask)
    constants, tx = step_constants(goal, trainable, frozen, jnp.float32), adamw(trainable, config)
    like = abstract_state(trainable, tx, mesh, float16=False, running=goal.running)
    program = program_of(CausalLM(config, mesh=mesh), tx, like, abstract_like(constants), objective=goal)
    sizes = Sizes(tokens(where[1], shards), WIDTH)
    if units.mismatched is not None:
        of_other = OTHERS[2][1]
        sizes = sizes._replace(other=(of_other, Sizes(tokens(of_other, shards), WIDTH)))
    step = lower_step(program, abstract_like(batch), sizes).compile({"xla_backend_optimization_level": 0})
    state, found = jax.device_put(init_state(trainable, tx, running=goal.running), shardings_of(like)), []
    for _ in range(2):
        state, metrics = step(state, constants, batch, jax.device_put(jnp.float32(RATE), replicated(mesh)))
        found.append(figures_of(metrics, state))
    # Adam's first update divides each gradient by its size: where that is rounding alone, devices differ by a step.
    assert_same(found, one_each(name, method, config), rtol=5e-4)


# ---------------------------------------------------------------------- evaluation


def test_the_reference_of_the_training_set_takes_no_longer_rows_than_training(monkeypatch):
    """Evaluation may have larger steps; a run without any must not need their memory."""
    mesh = make_mesh(fsdp=1, devices=jax.devices()[:1])
    config, asked = settings("dpo"), {}
    config.training = TrainingArguments(per_device_train_batch_size=1, per_device_eval_batch_size=6, do_train=True)

    def spy(module, objective, units, mesh, config, per_device=None):
        asked[len(asked)] = per_device
        return lambda params: Reference(np.zeros(0))

    monkeypatch.setattr("jtune.evaluation.references.make_reference", spy)
    monkeypatch.setattr("jtune.evaluation.references.key_of", lambda *_: "key")
    monkeypatch.setattr("jtune.evaluation.references.kept", lambda config, name, key, units, compute: compute())
    encoded = units_of("sigmoid").sides[0]
    encoded.rejected = units_of("sigmoid").sides[1]
    splits = SimpleNamespace(train=encoded, eval={"": encoded})
    model = Model(None, *model_of("sigmoid"))
    assert of_model(config, model, splits, mesh, goal_of("sigmoid")).sums.keys() == {"eval", "train"}
    assert list(asked.values()) == [None, 2]


def test_an_evaluation_goes_on_from_what_training_has_kept():
    """BCO's delta is the mean reward of all groups so far: 100 of training, then those of the set."""
    mesh, name = make_mesh(fsdp=1, devices=jax.devices()[:1]), "bco_pair"
    module, goal, units = CausalLM(SMALL, mesh=mesh), goal_of(name), units_of(name)
    params, _ = model_of(name)
    params = jax.device_put(params, placement(params, SMALL, mesh))
    encoded = units.sides[0]
    encoded.rejected = units.sides[1]  # as an `Encoded` has it
    zeros = Reference(np.zeros((UNITS, 2, 2), np.float32))
    measure = make_unit_measure(module, {"": encoded}, mesh, settings("dpo"), goal, {"eval": zeros})
    loss = lambda params, running=None: measure(params, "eval", running)[1]
    first, later = loss(params), loss(params, {"mean": jnp.float32(-3), "groups": jnp.float32(100)})
    assert first["eval_loss"] == loss(params, goal.running)["eval_loss"] == loss(params)["eval_loss"]
    rewards = np.array([first["eval_rewards/chosen"], first["eval_rewards/rejected"]])
    logps = jax.device_get(make_sums(module, sums_of(module, goal), units, mesh, settings("dpo"))[0](params)[0]).sum(-1)
    np.testing.assert_allclose(0.1 * logps.mean(0), rewards, rtol=1e-5)
    group_means = 0.1 * logps.reshape(UNITS // 2, 2, 2).mean((1, 2))  # groups of two, as they are evaluated
    deltas = (-300 + np.cumsum(group_means)) / (100 + np.arange(1, UNITS // 2 + 1))
    chosen, rejected = (0.1 * logps - np.repeat(deltas, 2)[:, None]).T
    same(later["eval_loss"], np.mean(np.log1p(np.exp(-chosen)) + np.log1p(np.exp(rejected))), rtol=1e-4)
