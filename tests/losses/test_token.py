"""The losses of tokens are those of LLaMA-Factory and of torch, and no gradient passes through what is held fixed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtune.losses.chunked import gather_labelled, summed_loss
from jtune.losses.token import asft, dft, eaft, smoothed_nll, token_nll

# Loss and norm of the gradient by the logits, recorded from LLaMA-Factory 0.9.5 (`dft_loss_func`, `eaft_loss_func` and
# `asft_loss_func` of its trainer_utils.py) and transformers 5.6 (`LabelSmoother`) on `recorded_case`.
RECORDED = {
    "dft": (dft, 0.04604514688253403, 0.008448692038655281),
    "eaft 1": (partial(eaft, alpha=1.0), 5.08892822265625, 0.3369447588920593),
    "eaft 0.5": (partial(eaft, alpha=0.5), 5.4927802085876465, 0.36243513226509094),
    "asft 0.1": (partial(asft, alpha=0.1), 0.082501620054245, 0.012557866983115673),
    "asft 2": (partial(asft, alpha=2.0), 0.7751744985580444, 0.16389821469783783),
    "smoothed 0.1": (partial(smoothed_nll, factor=0.1), 5.885581016540527, 0.35399532318115234),
}


def recorded_case():
    """Logits of the model and of a reference `[2, 6, 40]`, labels `[2, 6]`."""
    i = np.arange(2 * 6 * 40, dtype=np.float64)
    model, reference = ((3 * np.sin(1.7 * i) + np.cos(c * i * i)).astype(np.float32) for c in (0.31, 0.29))
    labels = (np.arange(12) * 7 % 40).reshape(2, 6)
    labels[:, :2] = labels[1, 5] = -100
    return model.reshape(2, 6, 40), reference.reshape(2, 6, 40), labels


@pytest.mark.parametrize("name", RECORDED)
def test_losses_and_gradients_are_those_that_llamafactory_computes(name):
    loss, value, norm = RECORDED[name]
    logits, reference, labels = recorded_case()
    counts = labels[:, 1:] != -100

    def mean(logits):
        compared = (reference[:, :-1],) if name.startswith("asft") else ()
        losses = loss(logits[:, :-1], jnp.asarray(np.maximum(labels[:, 1:], 0)), *compared)
        return jnp.sum(losses * counts) / counts.sum()

    found, gradient = jax.value_and_grad(mean)(jnp.asarray(logits))
    np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(gradient), norm, rtol=1e-5)


def by_torch(name, logits, reference, targets):
    """The published formulas, in torch, with its autograd: the loss of each token and the gradient by the logits."""
    import torch

    x, q, y = torch.tensor(logits, requires_grad=True), torch.tensor(reference).softmax(-1), torch.tensor(targets)
    nll = torch.nn.functional.cross_entropy(x, y, reduction="none")
    p, top = (-nll).exp().detach(), x.detach().topk(20).values.softmax(-1)
    entropy = -(top * top.log()).sum(-1)
    kl = torch.nn.functional.kl_div(x.log_softmax(-1), q, reduction="none").sum(-1)
    losses = {
        "dft": p * nll,
        "eaft": (entropy / 3) ** 1.5 * nll,
        "asft": p * nll + 0.3 * kl,
        "smoothed": torch.nn.functional.cross_entropy(x, y, reduction="none", label_smoothing=0.2),
    }[name]
    losses.sum().backward()
    assert x.grad is not None
    return losses.detach().numpy(), x.grad.numpy()


KINDS = {
    "dft": dft,
    "eaft": partial(eaft, alpha=1.5),
    "asft": partial(asft, alpha=0.3),
    "smoothed": partial(smoothed_nll, factor=0.2),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_token_has_torchs_loss_and_gradient(name):
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, reference = (4 * rng.standard_normal((30, 50), np.float32) for _ in range(2))
    targets = rng.integers(0, 50, 30)
    compared = (reference,) if name == "asft" else ()
    total = lambda x: (jnp.sum(found := KINDS[name](x, jnp.asarray(targets), *compared)), found)
    (_, found), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(logits))
    losses, expected = by_torch(name, logits, reference, targets)
    np.testing.assert_allclose(found, losses, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, expected, atol=3e-6)


def test_a_weight_only_scales_the_gradient_of_cross_entropy():
    logits, reference, _ = recorded_case()
    targets = jnp.asarray(np.arange(12).reshape(2, 6))
    plain = jax.grad(lambda x: token_nll(x, targets).sum())(logits)
    for loss in (dft, partial(eaft, alpha=2.0)):
        weight = loss(logits, targets) / token_nll(logits, targets)
        gradient = jax.grad(lambda x: loss(x, targets).sum())(logits)  # noqa: B023
        np.testing.assert_allclose(gradient, weight[..., None] * plain, atol=1e-6)
    by_reference = jax.grad(lambda r: asft(logits, targets, r, alpha=1.0).sum())(reference)
    assert not np.any(by_reference)


def test_losses_meet_at_their_limits():
    logits, _, labels = recorded_case()
    targets = jnp.asarray(np.maximum(labels, 0))
    nll = token_nll(logits, targets)
    same = partial(np.testing.assert_allclose, rtol=1e-6)
    same(smoothed_nll(logits, targets, factor=0.0), nll)
    same(eaft(logits, targets, alpha=0.0), nll)
    same(asft(logits, targets, logits, alpha=5.0), dft(logits, targets), atol=1e-6)  # nothing diverges from itself
    few = logits[..., :7]  # a vocabulary of fewer than the 20 likeliest tokens
    entropy = -np.sum(jax.nn.softmax(few) * jax.nn.log_softmax(few), -1)
    same(eaft(few, targets % 7, alpha=1.0), entropy / 3 * token_nll(few, targets % 7), rtol=1e-5)


def test_a_sure_model_gives_numbers():
    """Where all the probability lies on one token, right or wrong, losses and gradients are finite."""
    logits = jnp.asarray([[0.0] * 30, [0.0] * 30]).at[:, 3].set(3e4)
    targets = jnp.asarray([3, 4])
    for name, loss in {**KINDS, "root": partial(eaft, alpha=0.5)}.items():
        compared = (logits[::-1],) if name == "asft" else ()
        value, gradient = jax.value_and_grad(lambda x: loss(x, targets, *compared).sum())(logits)  # noqa: B023
        assert np.isfinite(value), name
        assert np.all(np.isfinite(gradient)), name


# ---------------------------------------------------------------------- chunk by chunk

SHARDS, BATCH, SEQ, EMBED, VOCAB = 2, 4, 8, 16, 32


def head(params, hidden):
    return 5.0 * jnp.tanh((hidden * params["scale"]) @ params["kernel"] / 5.0)  # soft-capped, as Gemma 2's


def of(kind):
    """The loss of positions: of the model, and for ASFT of the reference beside it."""
    return lambda heads, hidden, targets: KINDS[kind](
        head(heads[0], hidden[0]), targets, *(head(h, x) for h, x in zip(heads[1:], hidden[1:]))
    )


@pytest.fixture
def case():
    """(heads, hidden states), of the model and of a reference; targets and weights."""
    keys = iter(jax.random.split(jax.random.key(0), 6))
    draw = lambda *shape: jax.random.normal(next(keys), shape)
    heads = tuple({"scale": jnp.ones(EMBED), "kernel": draw(EMBED, VOCAB)} for _ in range(2))
    hidden = draw(BATCH, SEQ, EMBED), draw(BATCH, SEQ, EMBED)
    targets = jax.random.randint(next(keys), (BATCH, SEQ), 0, VOCAB)
    weights = (jax.random.uniform(next(keys), (BATCH, SEQ)) < 0.4).astype(jnp.float32)
    return heads, hidden, targets, weights


def chunked(kind, mine, heads, hidden, targets, weights, chunk=5):
    heads, hidden = ((own, *others) for own, others in zip(mine, (heads[1:], hidden[1:])))
    return summed_loss(of(kind), heads, *gather_labelled(hidden, targets, weights, 12, SHARDS), chunk)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(case, kind):
    heads, hidden, targets, weights = case
    mine, count = (heads[0], hidden[0]), 2 if kind == "asft" else 1
    whole = lambda own: jnp.sum(of(kind)((own[0], *heads[1:count]), (own[1], *hidden[1:count]), targets) * weights)
    expected, expected_gradients = jax.value_and_grad(whole)(mine)
    for chunk in (12, 5):
        total = lambda own: chunked(kind, own, heads[:count], hidden[:count], targets, weights, chunk)  # noqa: B023
        found, gradients = jax.value_and_grad(total)(mine)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), gradients, expected_gradients)


def test_a_reference_costs_one_product_and_no_gradient(case):
    heads, hidden, targets, weights = case

    def flops(kind, count):
        f = lambda own, *others: chunked(kind, own, *others, targets, weights, chunk=12)
        given = (heads[0], hidden[0]), heads[:count], hidden[:count]
        return jax.jit(jax.grad(f)).lower(*given).compile().cost_analysis()["flops"]

    product = 2 * SHARDS * 12 * EMBED * VOCAB
    assert product <= flops("asft", 2) - flops("dft", 1) < 1.9 * product
