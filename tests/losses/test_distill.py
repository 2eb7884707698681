"""Distillation: each divergence against its formula, and a teacher of another shape in the train step."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import CONFIG, ONE_EACH, PACKED, RATE, adamw, lay_out, prepared, program_of, same, weights

from jtune import tuning
from jtune.config import FinetuningArguments, TrainingArguments
from jtune.data import Sizes
from jtune.loading.model import abstract_like, placement
from jtune.losses.batch import make_loss_sum, token_losses
from jtune.losses.distill import distilled
from jtune.losses.objective import describe_objective, objective_of
from jtune.losses.reference import WithSecond, step_constants
from jtune.losses.token import token_nll
from jtune.models import CausalLM
from jtune.sharding import batch_sharding, batch_shards, make_mesh, replicated
from jtune.train.program import lower_step
from jtune.train.state import abstract_state, init_state, shardings_of
from jtune.train.step import make_train_step
from jtune.tuning import quantize

STUDENT = replace(CONFIG, logit_multiplier=20.0, layers=())  # else all tokens are about as likely
# Wider, deeper, with another head: its table is padded to other rows.
TEACHER = replace(
    CONFIG, vocab_size=72, hidden_size=48, intermediate_size=80, num_hidden_layers=5, num_attention_heads=6,
    logit_multiplier=15.0, logit_softcap=8.0, tie_word_embeddings=True, layers=(),
)  # fmt: skip
KINDS = {
    "forward": {"distill_loss": "forward"},
    "reverse": {"distill_loss": "reverse", "distill_temperature": 2.0},
    "js": {"distill_loss": "js", "distill_beta": 0.3, "distill_temperature": 0.7, "distill_weight": 0.6},
}
GOALS = {
    kind: objective_of(FinetuningArguments(teacher_model="teacher", **asked), TrainingArguments())
    for kind, asked in KINDS.items()
}


def formula(kind, logits, targets, teacher, *, beta=0.5, tau=1.0, weight=1.0):
    """The loss of each position, in float64; `logits` and `teacher` [..., V], perhaps of two sizes."""

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    common = min(logits.shape[-1], teacher.shape[-1])
    s, t = softmax(logits[..., :common] / tau), softmax(teacher[..., :common] / tau)
    kl = lambda p, q: np.sum(p * (np.log(p) - np.log(q)), -1)
    m = beta * t + (1 - beta) * s
    value = {"forward": kl(t, s), "reverse": kl(s, t), "js": beta * kl(t, m) + (1 - beta) * kl(s, m)}[kind]
    nll = -np.log(np.take_along_axis(softmax(logits), targets[..., None], -1)[..., 0])
    return weight * tau**2 * value + (1 - weight) * nll


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
@pytest.mark.parametrize(("tau", "weight", "beta"), [(1.0, 1.0, 0.5), (2.5, 0.4, 0.1)])
@pytest.mark.parametrize("extra", [-3, 0, 5], ids=lambda n: f"{n} rows more")
def test_each_divergence_is_its_formula_and_so_is_its_gradient(kind, tau, weight, beta, extra):
    rng = np.random.default_rng(3)
    logits, teacher = rng.normal(size=(4, 11)) * 3, rng.normal(size=(4, 11 + extra)) * 3
    targets = rng.integers(0, 8, 4)
    options = {"beta": beta, "tau": tau, "weight": weight}
    loss = partial(distilled, divergence=kind, beta=beta, temperature=tau, weight=weight)
    found = loss(jnp.float32(logits), targets, jnp.float32(teacher))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, formula(kind, logits, targets, teacher, **options), rtol=2e-5)
    gradient = jax.grad(lambda x: loss(x, targets, jnp.float32(teacher)).sum())(jnp.float32(logits))
    expected, step = np.zeros_like(logits), 1e-6
    for at in np.ndindex(logits.shape):
        moved = [logits.copy(), logits.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        ahead, behind = (formula(kind, x, targets, teacher, **options).sum() for x in moved)
        expected[at] = (ahead - behind) / (2 * step)
    np.testing.assert_allclose(gradient, expected, atol=3e-5)
    by_teacher = jax.grad(lambda x: loss(jnp.float32(logits), targets, x).sum())(jnp.float32(teacher))
    assert not np.any(by_teacher)


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(kind):
    logits = jax.random.normal(jax.random.key(0), (6, 50)) * 30  # many probabilities are 0 in float32
    loss = partial(distilled, divergence=kind, beta=0.3, temperature=1.3, weight=1.0)
    value, gradient = jax.value_and_grad(lambda x: loss(x, jnp.zeros(6, int), logits).sum())(logits)
    assert abs(float(value)) < 1e-5
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_the_ends_of_beta_are_the_two_directions():
    """There the mixture is one of the two models, and the formula is 0 whatever they say."""
    of = lambda **asked: objective_of(FinetuningArguments(teacher_model="t", **asked), TrainingArguments())
    rng = np.random.default_rng(0)
    logits, teacher, targets = rng.normal(size=(3, 9)), rng.normal(size=(3, 9)), np.arange(3)
    for beta, kind in ((0.0, "forward"), (1.0, "reverse")):
        loss = of(distill_loss="js", distill_beta=beta).token_loss
        same(loss(logits, targets, teacher), of(distill_loss=kind).token_loss(logits, targets, teacher))
        nearly = beta * 0.9998 + 0.0001
        value = of(distill_loss="js", distill_beta=nearly).token_loss(logits, targets, teacher)
        same(value / min(nearly, 1 - nearly), formula(kind, logits, targets, teacher), rtol=5e-3)


def test_the_log_says_who_teaches_and_how():
    assert describe_objective(GOALS["js"]) == (
        "loss: Jensen-Shannon, beta 0.3 at temperature 0.7; 60% of it, the rest is cross-entropy; "
        "the reference is teacher"
    )
    assert GOALS["js"].eval_loss is token_nll


# ---------------------------------------------------------------------- in the step


def teacher_of(form=None):
    params = jax.tree.map(lambda x: x * 4.0 if x.ndim > 1 else x, dict(weights(TEACHER)))  # has opinions
    return quantize.apply(params, form)


def train(rows, seq, kind, *, method="full", accum=1, updates=2, form=None):
    """Losses and gradient norms of updates on one device."""
    batch, goal = lay_out(rows, seq, accum), GOALS[kind]
    params, mask = prepared(method, STUDENT)
    trainable, frozen = tuning.partition(params, mask)
    held = step_constants(goal, trainable, frozen, jnp.float32, teacher_of(form))
    capacity = batch["input_ids"].shape[1] * batch["input_ids"].shape[2]
    modules = {"second": CausalLM(TEACHER)}
    loss_sum = make_loss_sum(CausalLM(STUDENT), label_capacity=capacity, batch_shards=1, objective=goal, **modules)
    tx = adamw(trainable)
    step = jax.jit(make_train_step(token_losses(loss_sum), tx, max_grad_norm=1.0))
    state, figures = init_state(trainable, tx), []
    for _ in range(updates):
        state, metrics = step(state, held, batch, RATE)
        figures.append((float(metrics.loss), float(metrics.grad_norm)))
    return figures


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_sums_the_formula_over_labelled_positions(kind):
    goal = GOALS[kind]
    one = {name: x[0] for name, x in lay_out(ONE_EACH, 16).items() if x.ndim}
    params, mask = prepared("full", STUDENT)
    of = lambda config, params: np.asarray(
        CausalLM(config).apply({"params": params}, one["input_ids"], one["positions"], one["segment_ids"]), np.float64
    )
    asked = {name.removeprefix("distill_"): x for name, x in KINDS[kind].items()}
    options = {"beta": asked.get("beta", 0.5), "tau": asked.get("temperature", 1.0), "weight": asked.get("weight", 1.0)}
    teacher = teacher_of()
    losses = formula(kind, of(STUDENT, params), np.asarray(one["targets"]), of(TEACHER, teacher), **options)
    trainable, frozen = tuning.partition(params, mask)
    held = step_constants(goal, trainable, frozen, jnp.float32, teacher)
    assert isinstance(held, WithSecond)
    loss_sum = make_loss_sum(
        CausalLM(STUDENT), label_capacity=128, batch_shards=1, objective=goal, second=CausalLM(TEACHER)
    )
    same(jax.jit(loss_sum)(trainable, held, one, None), np.sum(losses * np.asarray(one["loss_weights"])))


@pytest.mark.parametrize(("kind", "method"), [("forward", "full"), ("reverse", "lora"), ("js", "freeze")])
def test_packed_and_accumulated_equal_one_padded_batch(kind, method):
    padded = train(ONE_EACH, 16, kind, method=method)
    same(train(PACKED, 32, kind, method=method, accum=3), padded, rtol=5e-5)
    same(train(ONE_EACH, 16, kind, method=method, accum=4), padded, rtol=5e-5)


@pytest.mark.parametrize("form", [quantize.Form("int8"), quantize.Form("nf4", double=True)], ids=str)
def test_a_teacher_in_few_bits_teaches_nearly_the_same(form):
    whole, few = train(ONE_EACH, 16, "forward", updates=1), train(ONE_EACH, 16, "forward", updates=1, form=form)
    assert whole != few
    same(few, whole, rtol=0.02 if form.kind == "int8" else 0.25)


@pytest.mark.parametrize(
    ("kind", "method", "sizes"),
    [
        ("forward", "full", {"fsdp": 2, "context": 2, "tensor": 2}),
        ("js", "lora", {"data": 2, "fsdp": 4}),
    ],
    ids=str,
)
def test_eight_devices_equal_one(kind, method, sizes, monkeypatch):
    monkeypatch.setattr("jtune.tuning.axes.SMALL_ADAPTER", 0)
    goal, mesh = GOALS[kind], make_mesh(**sizes)
    shards = batch_shards(mesh)
    accum = len(ONE_EACH) // shards // 2 or 1
    params, mask = prepared(method, STUDENT)
    placed = jax.device_put(jax.tree.map(jnp.copy, params), placement(params, STUDENT, mesh))  # donated
    trainable, frozen = tuning.partition(placed, mask)
    teacher = teacher_of()
    teacher = jax.device_put(teacher, placement(teacher, TEACHER, mesh))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(teacher))
    held = step_constants(goal, trainable, frozen, jnp.float32, teacher)
    tx = adamw(trainable)
    like = abstract_state(trainable, tx, mesh, float16=False)
    rows = lambda x: batch_sharding(mesh, accumulated=True) if np.ndim(x) else replicated(mesh)
    batch = {name: jax.device_put(x, rows(x)) for name, x in lay_out(ONE_EACH, 16, accum).items()}
    modules = CausalLM(STUDENT, mesh=mesh), CausalLM(TEACHER, mesh=mesh)
    program = program_of(modules[0], tx, like, abstract_like(held), objective=goal, second=modules[1])
    step = lower_step(program, abstract_like(batch), Sizes(len(ONE_EACH) // accum // shards * 16)).compile(
        {"xla_backend_optimization_level": 0}
    )
    state, figures = jax.device_put(init_state(trainable, tx), shardings_of(like)), []
    for _ in range(2):
        state, metrics = step(state, held, batch, jax.device_put(jnp.float32(RATE), replicated(mesh)))
        figures.append((float(metrics.loss), float(metrics.grad_norm)))
    same(figures, train(ONE_EACH, 16, kind, method=method, accum=accum), rtol=1e-4)
