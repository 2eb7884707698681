"""Other losses, noise and a reference model in the train step: the layout of tokens and the mesh change nothing."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import CONFIG, ONE_EACH, PACKED, RATE, adamw, examples, lay_out, prepared, program_of, same

from jtune import tuning
from jtune.config import FinetuningArguments, TrainingArguments
from jtune.data import Sizes
from jtune.evaluation.loss import make_eval_step
from jtune.loading.model import abstract_like, placement
from jtune.losses.batch import make_loss_sum, token_losses
from jtune.losses.objective import Objective, embedding_noise, objective_of
from jtune.losses.reference import WithReference, step_constants
from jtune.models import CausalLM
from jtune.sharding import batch_sharding, batch_shards, make_mesh, replicated
from jtune.train.program import lower_step
from jtune.train.state import abstract_state, init_state, shardings_of
from jtune.train.step import make_train_step

PEAKED = replace(CONFIG, logit_multiplier=20.0, layers=())  # else all tokens are about as likely
SOFTCAPPED = replace(PEAKED, logit_softcap=5.0, tie_word_embeddings=True)


def objective(noise=None, smoothing=0.0, **asked) -> Objective:
    training = TrainingArguments(neftune_noise_alpha=noise, label_smoothing_factor=smoothing)
    return objective_of(FinetuningArguments(**asked), training)


OBJECTIVES = {
    "smoothed": objective(smoothing=0.2),
    "dft": objective(use_dft_loss=True),
    "eaft": objective(use_eaft_loss=True, eaft_alpha=0.5),
    "asft": objective(use_asft_loss=True, asft_alpha=0.7),
}


def moved(params, mask, seed=5):
    """What trains, away from where it starts: else an adapter's model is its reference, and nothing is to be seen."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.tree.unflatten(tree, list(jax.random.split(jax.random.key(seed), len(leaves))))
    shift = lambda x, trains, key: x + 0.1 * jax.random.normal(key, x.shape) if trains else x
    return jax.tree.map(shift, params, mask, keys)


def train(rows, seq, goal, *, method="full", accum=1, updates=2, config=PEAKED, key=None):
    """Losses and gradient norms of two updates on one device; the reference is the start, the model is away from it."""
    batch = lay_out(rows, seq, accum)
    params, mask = prepared(method, config)
    frozen = step_constants(goal, *tuning.partition(params, mask), jnp.float32)
    capacity = batch["input_ids"].shape[1] * batch["input_ids"].shape[2]
    loss_sum = make_loss_sum(CausalLM(config), label_capacity=capacity, batch_shards=1, objective=goal)
    trainable = tuning.partition(moved(params, mask), mask)[0]
    tx = adamw(trainable)
    step = jax.jit(make_train_step(token_losses(loss_sum), tx, max_grad_norm=1.0, dropout_key=key))
    state, figures = init_state(trainable, tx), []
    for _ in range(updates):
        state, metrics = step(state, frozen, batch, RATE)
        figures.append((float(metrics.loss), float(metrics.grad_norm)))
    return figures


@pytest.mark.parametrize(
    ("kind", "method"), [("smoothed", "full"), ("dft", "lora"), ("eaft", "freeze"), ("asft", "full"), ("asft", "lora")]
)
def test_packed_and_accumulated_equal_one_padded_batch(kind, method):
    goal = OBJECTIVES[kind]
    packed = train(PACKED, 32, goal, method=method, accum=3)
    same(packed, train(ONE_EACH, 16, goal, method=method), rtol=5e-5)


@pytest.mark.parametrize(("kind", "method"), [(kind, "full") for kind in OBJECTIVES] + [("asft", "lora")])
def test_the_step_sums_the_formula(kind, method):
    """Over the logits of the model, and of the reference: the base without the adapter, or the model at its start."""
    goal, batch = OBJECTIVES[kind], lay_out(ONE_EACH, 16)
    start, mask = prepared(method, PEAKED)
    now = moved(start, mask)
    frozen = step_constants(goal, *tuning.partition(start, mask), jnp.float32)
    model = CausalLM(PEAKED)
    loss_sum = make_loss_sum(model, label_capacity=128, batch_shards=1, objective=goal)
    one = {name: x[0] for name, x in batch.items() if x.ndim}
    models = [now, tuning.lora.split(start)[0]] if goal.anchored else [now]
    logits = [model.apply({"params": x}, one["input_ids"], one["positions"], one["segment_ids"]) for x in models]
    losses = goal.token_loss(logits[0], one["targets"], *logits[1:])
    found = jax.jit(loss_sum)(tuning.partition(now, mask)[0], frozen, one, None)
    same(found, np.sum(losses * one["loss_weights"]))
    plain = Objective().token_loss(logits[0], one["targets"])
    assert abs(float(found - np.sum(plain * one["loss_weights"]))) > 1


@pytest.mark.parametrize(
    ("kind", "method", "sizes"),
    [
        ("smoothed", "full", {"fsdp": 1, "tensor": 8}),
        ("dft", "lora", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("eaft", "full", {"fsdp": 2, "context": 2, "tensor": 2}),
        ("asft", "full", {"fsdp": 2, "context": 2, "tensor": 2}),
        ("asft", "lora", {"data": 2, "fsdp": 4}),
        ("noise", "lora", {"data": 2, "fsdp": 2, "context": 2}),
    ],
    ids=str,
)
def test_eight_devices_equal_one(kind, method, sizes, monkeypatch):
    monkeypatch.setattr("jtune.tuning.axes.SMALL_ADAPTER", 0)
    goal = OBJECTIVES.get(kind, objective(noise=50.0))
    key = jax.random.key(3) if goal.noise_alpha else None
    mesh = make_mesh(**sizes)
    shards = batch_shards(mesh)
    config, accum = SOFTCAPPED, len(ONE_EACH) // shards // 2 or 1
    params, mask = prepared(method, config)
    params = jax.device_put(params, placement(params, config, mesh))
    trainable, frozen = tuning.partition(params, mask)
    frozen = step_constants(goal, trainable, frozen, jnp.float32)
    tx = adamw(trainable)
    like = abstract_state(trainable, tx, mesh, float16=False)
    rows = lambda x: batch_sharding(mesh, accumulated=True) if np.ndim(x) else replicated(mesh)
    batch = {name: jax.device_put(x, rows(x)) for name, x in lay_out(ONE_EACH, 16, accum).items()}
    program = program_of(CausalLM(config, mesh=mesh), tx, like, abstract_like(frozen), dropout_key=key, objective=goal)
    step = lower_step(program, abstract_like(batch), Sizes(len(ONE_EACH) // accum // shards * 16)).compile(
        {"xla_backend_optimization_level": 0}
    )
    start = tuning.partition(moved(params, mask), mask)[0]
    state, figures = jax.device_put(init_state(start, tx), shardings_of(like)), []
    for _ in range(2):
        state, metrics = step(state, frozen, batch, jax.device_put(jnp.float32(RATE), replicated(mesh)))
        figures.append((float(metrics.loss), float(metrics.grad_norm)))
    same(figures, train(ONE_EACH, 16, goal, method=method, accum=accum, config=config, key=key), rtol=1e-4)


# ---------------------------------------------------------------------- the reference


@pytest.mark.parametrize("method", ["full", "lora", "freeze"])
def test_the_reference_is_the_model_at_its_start_and_only_what_has_to_be_is_kept_twice(method):
    params, mask = prepared(method)
    trainable, frozen = tuning.partition(params, mask)
    held = step_constants(OBJECTIVES["asft"], trainable, frozen, jnp.bfloat16)
    assert isinstance(held, WithReference)
    kept = {x.dtype.name: x.size for x in jax.tree.leaves(held.start)}
    if method == "lora":
        assert jax.tree.leaves(held.start) == []
    else:
        assert kept.keys() == {"bfloat16"}
        assert sum(x.size for x in jax.tree.leaves(held.start)) == sum(x.size for x in jax.tree.leaves(trainable))
    like = step_constants(OBJECTIVES["asft"], abstract_like(trainable), abstract_like(frozen), jnp.bfloat16)
    assert abstract_like(held) == like  # what `jtune plan` takes it to be
    assert step_constants(OBJECTIVES["dft"], trainable, frozen, jnp.bfloat16) is frozen


def test_at_the_start_there_is_nothing_to_hold_back_and_later_there_is():
    """The first update of ASFT is DFT's; later the divergence from the start counts, though the state is donated."""
    batch = lay_out(ONE_EACH, 16)
    losses = {}
    for kind in ("dft", "asft"):
        params, mask = prepared(config=PEAKED)
        params = jax.tree.map(jnp.copy, params)
        trainable, frozen = tuning.partition(params, mask)
        held = step_constants(OBJECTIVES[kind], trainable, frozen, jnp.float32)
        loss_sum = make_loss_sum(CausalLM(PEAKED), label_capacity=128, batch_shards=1, objective=OBJECTIVES[kind])
        step = jax.jit(make_train_step(token_losses(loss_sum), adamw(trainable), max_grad_norm=1.0), donate_argnums=0)
        state, losses[kind] = init_state(trainable, adamw(trainable)), []
        for _ in range(3):
            state, metrics = step(state, held, batch, 1e-4 if not losses[kind] else 3e-2)
            losses[kind].append((float(metrics.loss), float(metrics.grad_norm)))
    same(losses["asft"][0], losses["dft"][0], rtol=1e-4)
    assert losses["asft"][2][0] > losses["dft"][2][0] + 1e-3


# ---------------------------------------------------------------------- noise


def test_noise_is_bounded_by_the_length_of_each_example_and_the_width():
    batch = {name: x[0] for name, x in lay_out(PACKED, 32).items() if x.ndim}
    segments, alpha, width = np.asarray(batch["segment_ids"]), 5.0, 2048
    noise = np.asarray(embedding_noise(jax.random.key(0), batch["segment_ids"], width, alpha, jnp.float32))
    seen = 0
    for row, members in enumerate(PACKED):
        for segment, (ids, _) in enumerate(members, 1):
            mine = noise[row][segments[row] == segment]
            bound = alpha / np.sqrt(len(ids) * width)
            assert mine.shape == (len(ids), width)
            assert 0.99 * bound < np.abs(mine).max() <= bound * (1 + 1e-6)
            assert abs(mine.std() / bound - 3**-0.5) < 0.02  # of a uniform distribution
            assert abs(mine.mean()) < 0.05 * bound
            seen += 1
    assert seen == len(examples())


def test_noise_follows_from_the_seed_the_step_and_the_microbatch():
    """With nothing learnt, only the noise can make updates differ."""
    goal = objective(noise=100.0)

    def losses(rows, accum, seed):
        batch = lay_out(rows, 16, accum)
        params, mask = prepared(config=PEAKED)
        trainable, frozen = tuning.partition(params, mask)
        loss_sum = make_loss_sum(CausalLM(PEAKED), label_capacity=128, batch_shards=1, objective=goal)
        step = jax.jit(
            make_train_step(
                token_losses(loss_sum), adamw(trainable), max_grad_norm=1.0, dropout_key=jax.random.key(seed)
            )
        )
        state = init_state(trainable, adamw(trainable))
        after, first = step(state, frozen, batch, 0.0)
        kept = jax.tree.map(np.asarray, after)  # as a checkpoint has it
        again, second, resumed = (step(x, frozen, batch, 0.0)[1] for x in (state, after, kept))
        assert float(again.loss) == float(first.loss)
        assert float(resumed.loss) == float(second.loss)
        return float(first.loss), float(second.loss)

    one, other = losses(ONE_EACH, 1, seed=0), losses(ONE_EACH, 1, seed=1)
    assert len({*one, *other}) == 4
    twice = losses(ONE_EACH * 2, 2, seed=0)
    assert abs(one[0] - twice[0]) > 1e-4  # or both halves would have had the same noise


def test_the_reference_hears_no_noise():
    """With alpha so large that the model knows nothing, its divergence from a quiet reference shows."""
    loud = objective(noise=1e4, use_asft_loss=True, asft_alpha=1.0)
    quiet = objective(use_asft_loss=True, asft_alpha=1.0)
    batch = {name: x[0] for name, x in lay_out(ONE_EACH, 16).items() if x.ndim}
    params, mask = prepared(config=PEAKED)
    trainable, frozen = tuning.partition(params, mask)
    held = step_constants(loud, trainable, frozen, jnp.float32)

    def divergence(goal):
        """What is left of the loss when all of it but the divergence is taken away."""
        kl = goal._replace(token_loss=lambda p, y, q: goal.token_loss(p, y, q) - OBJECTIVES["dft"].token_loss(p, y))
        loss_sum = make_loss_sum(CausalLM(PEAKED), label_capacity=128, batch_shards=1, objective=kl)
        return float(loss_sum(trainable, held, batch, jax.random.key(0)))

    assert abs(divergence(quiet)) < 1e-3
    assert divergence(loud) > 1.0


# ---------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_evaluation_sums_the_loss_and_the_likelihood(kind):
    goal = OBJECTIVES[kind]
    batch = {name: x[0] for name, x in lay_out(ONE_EACH, 16).items() if x.ndim}
    params, _ = prepared()
    owner = np.broadcast_to(np.arange(8)[:, None], (8, 16))
    given = {"label_capacity": 128, "batch_shards": 1, "slots": 9}
    step = jax.jit(make_eval_step(CausalLM(CONFIG), **given, token_loss=goal.eval_loss))
    sums = step(params, batch, owner)
    logits = CausalLM(CONFIG).apply({"params": params}, batch["input_ids"], None, batch["segment_ids"])
    of = lambda loss: np.sum(loss(logits, batch["targets"]) * batch["loss_weights"], 1)
    same(sums.nll[:8], of(Objective().token_loss), rtol=1e-4)
    same(sums.loss[:8], of(Objective().token_loss if kind == "asft" else goal.token_loss), rtol=1e-4)
