"""The chunked loss is the plain loss, its gradients the plain gradients, and a frozen head costs none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtune.losses.chunked import chunk_positions, gather_labelled, summed_loss
from jtune.losses.token import token_nll

SHARDS, BATCH, SEQ, EMBED, VOCAB = 2, 4, 8, 16, 32


def head(params, hidden):
    return 5.0 * jnp.tanh((hidden * params["scale"]) @ params["kernel"] / 5.0)  # soft-capped, as Gemma 2's


@pytest.fixture
def case():
    keys = jax.random.split(jax.random.key(0), 5)
    params = {"scale": jnp.ones(EMBED), "kernel": jax.random.normal(keys[0], (EMBED, VOCAB))}
    hidden = jax.random.normal(keys[1], (BATCH, SEQ, EMBED))
    targets = jax.random.randint(keys[2], (BATCH, SEQ), 0, VOCAB)
    weights = (jax.random.uniform(keys[3], (BATCH, SEQ)) < 0.4).astype(jnp.float32)
    return params, hidden, targets, weights


def nll(params, hidden, targets):
    return token_nll(head(params, hidden), targets)


def plain(params, hidden, targets, weights):
    return jnp.sum(nll(params, hidden, targets) * weights)


def chunked(params, hidden, targets, weights, capacity=12, chunk=4):
    return summed_loss(nll, params, *gather_labelled(hidden, targets, weights, capacity, SHARDS), chunk)


@pytest.mark.parametrize("chunk", [12, 5, 4, 1])
def test_chunked_loss_and_gradients_equal_the_plain_ones(case, chunk):
    value, grads = jax.value_and_grad(chunked, (0, 1))(*case, chunk=chunk)
    expected, expected_grads = jax.value_and_grad(plain, (0, 1))(*case)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grads, expected_grads)


def test_positions_without_a_label_get_no_gradient(case):
    d_hidden = jax.grad(chunked, 1)(*case)
    assert np.all(np.asarray(d_hidden)[np.asarray(case[3]) == 0] == 0)
    assert np.any(np.asarray(d_hidden)[np.asarray(case[3]) == 1] != 0)


def test_a_frozen_head_costs_no_gradient_matmul(case):
    params, *rest = case

    def flops(trained):
        frozen = {k: v for k, v in params.items() if k not in trained}
        loss = lambda t, h: chunked({**frozen, **t}, h, *rest[1:], chunk=12)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower({k: params[k] for k in trained}, rest[0]).compile()
        return compiled.cost_analysis()["flops"]

    saved = flops(["scale", "kernel"]) - flops(["scale"])
    assert saved >= 2 * SHARDS * 12 * EMBED * VOCAB  # one matmul of all gathered positions


def test_chunks_bound_the_logits_and_are_no_more_than_needed():
    for vocab in (1000, 32000, 151936, 2**26):
        for capacity in (1, 128, 4093, 4096, 131072):  # 4093 is prime
            chunk = chunk_positions(capacity, vocab)
            assert chunk * vocab <= 2**25 or chunk == 1
            wanted = max(1, 2**25 // vocab)
            assert -(-capacity // chunk) == -(-capacity // wanted)
