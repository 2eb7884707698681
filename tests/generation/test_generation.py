"""Answers: the same as transformers', whatever a prompt is padded or put together with; drawn from the right tokens."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_model

from jtune.generation import Sampling, decode, generate, stream
from jtune.generation.sampling import allowed
from jtune.loading.inference import load_model
from jtune.models import CausalLM, DecoderConfig, init_params
from jtune.models.config import Experts, Layer
from jtune.sharding import make_mesh, tree_shardings
from jtune.tuning import prepared_axes

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    layers=(Layer(window=6), Layer()),
)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 64, n).tolist() for n in (5, 13, 9)]


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    monkeypatch.setattr(decode, "BUCKET", 16)


@pytest.fixture(scope="module")
def model():
    params = jax.jit(lambda: init_params(CONFIG, jax.random.key(0)))()
    sharpen = lambda x: x * 8 if x.ndim > 2 else x  # else all tokens are about as likely
    return CausalLM(CONFIG), jax.tree.map(sharpen, params)


def test_padding_on_either_side_changes_nothing(model):
    s = Sampling(max_new_tokens=12)
    right, mask = decode.pad(PROMPTS)
    left, left_mask = np.zeros_like(right), np.zeros_like(mask)
    for row, prompt in enumerate(PROMPTS):
        left[row, -len(prompt) :], left_mask[row, -len(prompt) :] = prompt, 1
    keys = decode.row_keys(PROMPTS, 0)
    answers = decode.answer(model[0], s, model[1], right, mask, keys)
    np.testing.assert_array_equal(decode.answer(model[0], s, model[1], left, left_mask, keys), answers)
    assert generate(*model, PROMPTS, s) == np.asarray(answers).tolist()


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 2.0, "top_k": 20, "top_p": 0.9}])
def test_an_answer_does_not_depend_on_its_company(options, model):
    s = Sampling(max_new_tokens=12, **options)
    together = generate(*model, PROMPTS, s, seed=7)
    assert together == generate(*model, PROMPTS, s, seed=7, batch_size=2)
    assert together[::-1] == generate(*model, PROMPTS[::-1], s, seed=7)
    assert together == [generate(*model, [prompt], s, seed=7)[0] for prompt in PROMPTS]
    assert together[1] == list(stream(*model, PROMPTS[1], s, seed=7))


def test_a_prompt_that_comes_again_is_drawn_again(model):
    s = Sampling(max_new_tokens=12, do_sample=True, temperature=4.0)
    once, twice = generate(*model, [PROMPTS[0]] * 2, s)
    assert once != twice
    assert generate(*model, [PROMPTS[0]], s) == [once]
    assert generate(*model, [PROMPTS[0]], s, seed=1) != [once]


def test_an_answer_ends_before_any_of_several_tokens(model):
    whole = generate(*model, [PROMPTS[0]], Sampling(max_new_tokens=12))[0]
    end = whole[4]
    s = Sampling(max_new_tokens=12, eos_ids=(max(set(range(64)) - set(whole)), end))
    assert generate(*model, [PROMPTS[0]], s)[0] == list(stream(*model, PROMPTS[0], s)) == whole[: whole.index(end)]


@pytest.mark.parametrize("experts", [None, Experts(4, 2, 48)])
def test_a_mesh_answers_as_one_device_does(experts, model):
    """Also where prompts, or tokens, do not divide among the devices."""
    config = replace(CONFIG, experts=experts, layers=() if experts else CONFIG.layers)
    params = model[1] if experts is None else jax.jit(lambda: init_params(config, jax.random.key(0)))()
    mesh = make_mesh(fsdp=2, expert=2, tensor=2) if experts else make_mesh(data=2, fsdp=2, context=2)
    shardings = tree_shardings(prepared_axes(params, config), params, mesh)
    s = Sampling(max_new_tokens=12)
    spread = CausalLM(config, mesh=mesh), jax.device_put(params, shardings)
    assert generate(*spread, PROMPTS, s) == generate(CausalLM(config), params, PROMPTS, s)


def test_what_may_be_drawn_is_what_transformers_leaves():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    logits = np.random.default_rng(1).standard_normal((4, 50)).astype(np.float32) * 3
    for s, warpers in (
        (Sampling(temperature=0.7, top_k=9), [theirs.TemperatureLogitsWarper(0.7), theirs.TopKLogitsWarper(9)]),
        (Sampling(top_p=0.8), [theirs.TopPLogitsWarper(0.8)]),
        (Sampling(top_k=9, top_p=0.6), [theirs.TopKLogitsWarper(9), theirs.TopPLogitsWarper(0.6)]),
        (Sampling(min_p=0.1), [theirs.MinPLogitsWarper(0.1)]),
    ):
        expected = torch.tensor(logits)
        for warper in warpers:
            expected = warper(None, expected)
        expected = expected.softmax(-1).numpy()
        np.testing.assert_allclose(jax.nn.softmax(allowed(jnp.asarray(logits), s), -1), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "options", "ends"),
    [
        ("llama", {"num_beams": 3}, (7, 11)),
        ("mistral", {"num_beams": 4, "length_penalty": 2.0}, (5,)),
        ("mistral", {"num_beams": 2, "repetition_penalty": 1.5}, ()),
        ("llama", {"repetition_penalty": 1.3}, (7,)),
    ],
)
def test_beams_and_penalties_are_those_of_transformers(family, options, ends, checkpoint):
    torch = pytest.importorskip("torch")
    model, params = load_model(str(checkpoint(family)))
    reference = make_model(family)
    reference.generation_config.eos_token_id = list(ends) or None
    prompts = [np.random.default_rng(3).integers(20, 128, n).tolist() for n in (6, 11)]
    ours = generate(model, params, prompts, Sampling(max_new_tokens=16, eos_ids=ends, **options))
    for prompt, answer in zip(prompts, ours):
        whole = reference.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=0, **options
        )
        expected = whole[0, len(prompt) :].tolist()
        stop = next((i for i, token in enumerate(expected) if token in ends), len(expected))
        assert answer == expected[:stop]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": 0.0}, "do_sample: false"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2 with do_sample=True"),
    ],
)
def test_what_makes_no_sense_is_refused(options, word):
    with pytest.raises(ValueError, match=word):
        Sampling(**options)


def test_prompts_that_cannot_be_answered_are_refused(model):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(*model, [[3], []])
    config = DecoderConfig(**{**vars(CONFIG), "learned_positions": 32})
    with pytest.raises(ValueError, match="33 tokens long, but this model has 32"):
        generate(CausalLM(config), {}, [[3] * 13], Sampling(max_new_tokens=20))
