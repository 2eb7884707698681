"""Log-probabilities of positions are those of whole logits, whatever trains and however they are cut, and keep none."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import CONFIG, weights

from jtune.losses.chunked import position_values
from jtune.losses.segments import STEP, Owners, SumsOf, log_probabilities, of_sums, segment_sums
from jtune.losses.units import log_ratios
from jtune.models import CausalLM

SHARDS, K, EMBED, VOCAB = 2, 13, 16, 48
close = np.testing.assert_allclose


def logits_of(params, hidden):
    """With a norm before the head, and soft-capped as Gemma 2's."""
    size = jnp.mean(jnp.square(hidden.astype(jnp.float32)), -1, keepdims=True)
    normed = hidden * params["norm"] * jax.lax.rsqrt(size + 1e-6)
    product = jnp.einsum("...d,dv->...v", normed.astype(hidden.dtype), params["kernel"])
    return 5.0 * jnp.tanh(product.astype(jnp.float32) / 5.0)


def value(params, hidden, targets):
    logs = jax.nn.log_softmax(logits_of(params, hidden))
    entropy = -jnp.sum(jnp.exp(logs) * logs, -1)
    return jnp.take_along_axis(logs, targets[..., None], -1)[..., 0], {"entropy": jax.lax.stop_gradient(entropy)}


@pytest.fixture
def case():
    keys = jax.random.split(jax.random.key(0), 5)
    params = {"norm": jax.random.uniform(keys[0], (EMBED,)) + 0.5, "kernel": jax.random.normal(keys[1], (EMBED, VOCAB))}
    hidden = jax.random.normal(keys[2], (SHARDS, K, EMBED))
    targets = jax.random.randint(keys[3], (SHARDS, K), 0, VOCAB)
    return params, hidden, targets, jax.random.normal(keys[4], (SHARDS, K))  # cotangents of either sign


def chunked(chunk, params, hidden, targets):
    return position_values(value, params, hidden, targets, jnp.ones(targets.shape), chunk)


def differentiated(form, trains, case, dtype=jnp.float32):
    """The values, the figures, and the gradients by what trains and by the hidden states, of a nonlinear function."""
    params, hidden, targets, cotangents = case
    params, hidden = jax.tree.map(lambda x: x.astype(dtype), (params, hidden))

    def loss(trained, hidden):
        values, figures = form({**params, **trained}, hidden, targets)
        return jnp.sum(cotangents * jnp.tanh(values / 4)), (values, figures)

    trained = {name: params[name] for name in trains}
    (_, found), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(trained, hidden)
    return found, grads


@pytest.mark.parametrize("trains", [(), ("norm", "kernel"), ("norm",)], ids=["frozen", "training", "half"])
@pytest.mark.parametrize("chunk", [13, 5])  # whole; two chunks and a ragged one
def test_values_and_gradients_are_those_of_whole_logits(chunk, trains, case):
    found, grads = differentiated(partial(chunked, chunk), trains, case)
    expected, expected_grads = differentiated(value, trains, case)
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-5, atol=1e-6), found, expected)
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-4, atol=2e-6), grads, expected_grads)
    assert np.abs(grads[1]).max() > 0.01


@pytest.mark.parametrize("trains", [(), ("kernel",)], ids=["frozen", "training"])
def test_in_bfloat16_values_stay_float32_and_gradients_have_the_dtype_of_what_they_are_of(trains, case):
    (values, _), grads = differentiated(partial(chunked, 5), trains, case, jnp.bfloat16)
    (expected, _), expected_grads = differentiated(value, trains, case, jnp.bfloat16)
    assert values.dtype == jnp.float32
    close(values, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        close(a, b, atol=0.02 * float(jnp.abs(b).max()))


def test_only_the_head_may_be_differentiated(case):
    params, hidden, targets, cotangents = case
    loss = lambda form: lambda params: jnp.sum(cotangents * form(params, hidden, targets)[0])
    jax.tree.map(
        lambda a, b: close(a, b, rtol=1e-4, atol=2e-6),
        jax.grad(loss(partial(chunked, 5)))(params),
        jax.grad(loss(value))(params),
    )


def compiled(form, trains, sizes=(2048, 64, 4096)):
    """The gradient of a loss of two sums, or where `trains` is None that loss."""
    positions, features, vocab = sizes
    shapes = {"norm": (features,), "kernel": (features, vocab)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    frozen = {name: x for name, x in params.items() if name not in (trains or ())}
    hidden = jax.ShapeDtypeStruct((1, positions, features), jnp.float32)

    def loss(trained, hidden, frozen, targets):
        values = form({**frozen, **trained}, hidden, targets)[0].reshape(2, -1).sum(-1)
        return jax.nn.softplus(values[1] - values[0])

    trained = {name: params[name] for name in trains or ()}
    targets = jax.ShapeDtypeStruct((1, positions), jnp.int32)
    form_of = jax.grad(loss, (0, 1)) if trains is not None else loss
    return jax.jit(form_of).lower(trained, hidden, frozen, targets).compile()


@pytest.mark.parametrize("trains", [None, (), ("norm", "kernel")], ids=["evaluated", "frozen", "training"])
def test_logits_are_never_all_there(trains):
    logits = 2048 * 4096 * 4
    memory = lambda form: compiled(form, trains).memory_analysis().temp_size_in_bytes
    assert memory(value) >= logits
    assert memory(partial(chunked, 64)) < logits / 4


def test_a_frozen_head_costs_what_cross_entropy_costs():
    """Two products with the head, that of the logits and that of their gradient by the hidden states; not three."""
    product = 2 * 2048 * 64 * 4096
    flops = lambda trains: compiled(partial(chunked, 2048), trains).cost_analysis()["flops"]
    elementwise = 40 * 2048 * 4096
    assert flops(()) < 2 * product + elementwise
    assert flops(("kernel",)) > 4 * product


# ---------------------------------------------------------------------- of a model


def model_case():
    model = CausalLM(CONFIG)
    params = {key: x for key, x in weights(CONFIG).items() if key in model.head_keys}
    hidden = jax.random.normal(jax.random.key(1), (2, 5, CONFIG.hidden_size))
    targets = jax.random.randint(jax.random.key(2), (2, 5), 0, CONFIG.vocab_size)
    return model, params, hidden, targets


def test_temperature_divides_logits_and_entropy_is_that_of_what_is_left():
    model, params, hidden, targets = model_case()
    values, figures = log_probabilities(model, temperature=0.5, entropy=True).value(params, hidden, targets)
    logits = model.apply({"params": params}, hidden, method="head")
    logs = jax.nn.log_softmax(logits / 0.5)
    close(values, jnp.take_along_axis(logs, targets[..., None], -1)[..., 0], rtol=1e-5)
    close(figures["entropy"], -jnp.sum(jnp.exp(logs) * logs, -1), rtol=1e-5)
    close(figures["logits"], logits.mean(-1), atol=1e-6)


def test_no_gradient_passes_through_figures():
    model, params, hidden, targets = model_case()
    of = log_probabilities(model, entropy=True).value
    for form in (of, lambda *xs: position_values(of, *xs, jnp.ones(xs[-1].shape), 2)):
        loss = lambda params, hidden, form=form: sum(map(jnp.sum, form(params, hidden, targets)[1].values()))
        for x in jax.tree.leaves(jax.grad(loss, (0, 1))(params, hidden)):
            assert not np.any(x)


def test_sums_in_two_parts_keep_what_two_models_differ_by():
    """1,000 tokens of some 5 nats: float32 knows a sum of 5,000 to 5e-4, and what one adds up to it to worse."""
    model, tokens = CausalLM(CONFIG), 1000
    rng = np.random.default_rng(0)
    logs, changes = -rng.uniform(3, 7, tokens), rng.normal(0, 0.01, tokens)
    moved = np.float32([logs, logs + changes - changes.mean() + 1e-3 / tokens])
    what = SumsOf((), lambda _, hidden, targets: (hidden[..., 0], {}), 1)
    batch = {"targets": jnp.zeros((2, tokens), jnp.int32), "loss_weights": jnp.ones((2, tokens), jnp.float32)}
    owners = Owners(jnp.broadcast_to(jnp.arange(2)[:, None], (2, tokens)), 2)
    find = lambda x: segment_sums(model, what, {}, x[..., None], batch, owners, capacity=2 * tokens, shards=1)[0]
    sums = np.asarray(find(jnp.asarray(moved)))
    assert not np.any(sums[:, 0] % STEP)
    close(sums.sum(-1), moved.astype(np.float64).sum(-1), rtol=1e-6)
    units = of_sums(jnp.asarray(sums[1:]), jnp.asarray(sums[:1]), counts=jnp.ones((1,)), share=1, group=0)
    exact = moved[1].astype(np.float64).sum() - moved[0].astype(np.float64).sum()
    assert abs(float(log_ratios(units)[0]) - exact) < 2e-5
    gradient = jax.grad(lambda x: find(x).sum())(jnp.asarray(moved))
    close(gradient, 1)  # the multiples of STEP are held fixed, and what is left moves with the value


@pytest.mark.parametrize("trains", [False, True])
def test_chunks_in_which_nothing_counts_are_left_out(trains):
    """The positions that count come first; the values of a chunk without any are 0, and so are its gradients."""
    random = np.random.default_rng(3)
    head, hidden = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((5, 7), (1, 8, 5)))
    targets, weights = jnp.asarray(random.integers(0, 7, (1, 8))), jnp.asarray([[1.0] * 3 + [0.0] * 5])
    of = lambda head, x, y: (jnp.take_along_axis(jax.nn.log_softmax(x @ head), y[..., None], -1)[..., 0], {})

    def weighed(form):
        def total(head, hidden):
            return jnp.sum(form(head if trains else jax.lax.stop_gradient(head), hidden) * weights)

        return jax.value_and_grad(total, argnums=(0, 1))(head, hidden)

    ours = weighed(lambda head, hidden: position_values(of, head, hidden, targets, weights, 2)[0])
    plain = weighed(lambda head, hidden: of(head, hidden, targets)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, plain)
    values = np.asarray(position_values(of, head, hidden, targets, weights, 2)[0])
    assert values[0, 3] != 0, "its chunk has a position that counts"
    assert (values[0, 4:] == 0).all()
