"""The gated delta rule: chunks, segments, padding, states. That it is transformers' rule is seen in test_families."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtune import tuning
from jtune.generation.forward import read_prompt, read_token
from jtune.models import CausalLM, DecoderConfig, init_params
from jtune.models.config import Delta, Layer
from jtune.models.convolution import number_runs
from jtune.models.delta import gated_delta_rule, inverse
from jtune.tuning import decay_mask, lora

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    layers=(Layer(linear=True), Layer()),
    attention_gate=True,
    norm_offset=True,
    delta=Delta(key_heads=2, value_heads=4, key_dim=8, value_dim=12, taps=4, joined=True),
)

prompt, token = jax.jit(read_prompt, static_argnums=(0, 4)), jax.jit(read_token, static_argnums=0)


@jax.jit
def logits_of(params, *given) -> Any:
    return CausalLM(CONFIG).apply({"params": params}, *given)


@pytest.fixture(scope="module")
def params():
    """Larger than at the start, so that layers say something; and of states that last."""
    grown = jax.tree.map(
        lambda x: 5 * x if x.ndim > 2 else x, jax.jit(lambda: init_params(CONFIG, jax.random.key(0)))()
    )
    for stack in grown["layers"]:
        if "linear_attn" in stack:
            stack["linear_attn"]["A_log"] -= 4.0
    return grown


def arguments(T, B=2, H=3, K=4, V=5, *, channels=False):
    """Keys that are alike, betas near one, and states that last: each token corrects much of what came before."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    q, k, v = unit(draw(B, T, H, K)), unit(draw(B, T, H, K) + 1), draw(B, T, H, V)
    shape = (B, T, H, K) if channels else (B, T, H)
    log_decay, beta = -0.1 * rng.random(shape, np.float32), 0.5 + 0.5 * rng.random((B, T, H), np.float32)
    return q, k, v, log_decay, beta


def one_by_one(q, k, v, log_decay, beta, run, state):
    """The rule as its definition has it, in float64."""
    state, outs = np.float64(state), []
    decay = np.exp(log_decay.reshape(*beta.shape, -1, 1))  # one, or one for each row of the state
    for t in range(q.shape[1]):
        fresh = run[:, t] != (run[:, t - 1] if t else 0)
        state = np.where(fresh[:, None, None, None], 0, state) * decay[:, t]
        wrong = v[:, t] - np.einsum("BHKV,BHK->BHV", state, k[:, t])
        state = state + np.einsum("BHK,BHV->BHKV", k[:, t], beta[:, t, :, None] * wrong)
        outs.append(np.einsum("BHKV,BHK->BHV", state, q[:, t]))
    return np.stack(outs, 1), state


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 8, 64])
def test_chunks_are_the_rule_token_by_token(chunk, channels):
    """With runs that end within chunks, at their ends, and span several."""
    given = arguments(19, channels=channels)
    run = np.array([[0] * 3 + [1] * 13 + [2] * 3, [1] * 4 + [2] + [3] * 4 + [4] * 10])
    state = np.random.default_rng(1).standard_normal((2, 3, 4, 5), np.float32)
    out, last = jax.jit(gated_delta_rule, static_argnames="chunk")(*given, run, state, chunk=chunk)
    expected, expected_last = one_by_one(*given, run, state)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(last, expected_last, atol=2e-5)


def test_an_inverse_and_its_gradient():
    """Of a size that is no power of two; what is on and above the diagonal is not read."""
    rng = np.random.default_rng(0)
    x, weights = (rng.standard_normal((2, 11, 11)).astype(np.float32) for _ in range(2))
    expected = np.linalg.inv(np.tril(x.astype(np.float64), -1) + np.eye(11))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    close(inverse(x), expected)
    back = np.swapaxes(expected, -1, -2)
    close(jax.grad(lambda x: jnp.sum(inverse(x) * weights))(x), np.tril(-back @ weights @ back, -1))


@pytest.mark.parametrize("channels", [False, True])
def test_fast_decays_give_finite_numbers_and_gradients(channels):
    """A chunk in which all is forgotten many times over; a run that starts in it."""
    q, k, v, log_decay, beta = arguments(40, channels=channels)
    run = np.repeat([[1, 2]], [13, 27], axis=1).repeat(2, 0)
    total = lambda *given: gated_delta_rule(*given, run, chunk=32)[0].sum()
    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3, 4)))(q, k, v, np.full_like(log_decay, -60.0), beta)
    assert all(np.isfinite(x).all() for x in gradients)


def test_runs_are_numbered_by_segments_and_padding_belongs_to_what_was_before():
    segments = jnp.array([[0, 0, 1, 1, 2, 0], [3, 3, 3, 1, 1, 1]])
    assert number_runs(segments).tolist() == [[0, 0, 1, 1, 2, 2], [1, 1, 1, 2, 2, 2]]


def test_packed_segments_and_their_gradients_are_those_of_segments_alone(params):
    """Over several chunks; the loss of the packed row is the sum of those of its pieces, which have a row each."""
    rng, lengths = np.random.default_rng(0), (70, 3, 45)
    rows, real = rng.integers(0, 64, (3, 70)), np.arange(70) < np.array(lengths)[:, None]
    packed = np.pad(rows[real], (2, 5))[None]
    positions = np.concatenate([np.zeros(2, int), *map(np.arange, lengths), np.zeros(5, int)])[None]
    segments = np.repeat([0, 1, 2, 3, 0], [2, *lengths, 5])[None]

    @jax.jit
    def gradient(params, ids, positions, segments):
        def loss(params):
            logits = logits_of(params, ids, positions, segments)
            return jnp.sum(jax.nn.log_softmax(logits)[..., 7] * (segments > 0)), logits

        return jax.grad(loss, has_aux=True)(params)

    together, logits = gradient(params, packed, positions, segments)
    apart, alone = gradient(params, rows, np.arange(70) * real, real.astype(int))
    assert alone.std() > 0.1
    np.testing.assert_allclose(logits[0, 2:-5], alone[real], atol=2e-5)
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 + 1e-4 * np.abs(b).max())
    jax.tree.map(near, together, apart)


@pytest.mark.parametrize("length", [1, 2, 9, 66])
def test_padding_on_either_side_leaves_the_same_state(params, length):
    """Shorter than the convolution, and longer than a chunk; then two tokens more. What is expected has no cache."""
    model, width = CausalLM(CONFIG), 70
    tokens = np.random.default_rng(0).integers(0, 64, width)
    ids, mask = np.zeros((2, 2, width), np.int32)
    ids[0, :length] = ids[1, -length:] = tokens[:length]
    mask[0, :length] = mask[1, -length:] = 1
    expected = np.asarray(logits_of(params, tokens[None]))[0, length - 1 :]
    cache, logits, position = prompt(model, params, ids, mask, 4)
    for i in range(3):
        np.testing.assert_allclose(logits, np.stack([expected[i]] * 2), atol=2e-5)
        if i < 2:
            cache, logits = token(model, params, np.full(2, tokens[length + i]), position + i, cache)
    for entry in cache[0]:  # of the linear layers
        for x in entry.values():
            np.testing.assert_allclose(x[:, 0], x[:, 1], atol=2e-6, rtol=1e-5)
            assert np.abs(x).max() > 1e-3


def test_what_has_no_kernel_has_no_adapter_and_biases_do_not_decay(params):
    adapted = lora.add(params, "all", rank=2)
    nodes = {path[-2:] for path, x in tuning.kernels(adapted) if tuning.is_node(x)}
    assert {path for path in nodes if path[0] == "linear_attn"} == {
        ("linear_attn", name) for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")
    }
    decays = decay_mask(params)["layers"][0]["linear_attn"]
    assert decays["A_log"]
    assert decays["conv1d"]["weight"]
    assert not decays["dt_bias"]
    assert not decays["norm"]["scale"]
