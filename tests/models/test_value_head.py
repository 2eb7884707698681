"""The value head beside a decoder: its scores are those of the formula, and the decoder does not know it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jtune import tuning
from jtune.models import CausalLM, DecoderConfig, init_params
from jtune.models.decoder import hidden_states
from jtune.models.value_head import draw_value_head, score, score_keys
from jtune.sharding import make_mesh, tree_shardings

CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
)
IDS = jnp.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def params():
    drawn = init_params(CONFIG, jax.random.key(0))
    scale = {"scale": jax.random.uniform(jax.random.key(1), (16,), minval=0.5, maxval=2.0)}
    return {**drawn, "norm": scale, "v_head": draw_value_head(16, jax.random.key(2))}


def test_a_score_is_the_normed_hidden_state_times_the_head(params):
    model = CausalLM(CONFIG)
    hidden = hidden_states(model, params, IDS).x
    scores = score(model, {key: params[key] for key in score_keys(model)}, hidden)
    x, norm, head = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), t) for t in (hidden, params["norm"], params["v_head"])
    )
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * norm["scale"]
    assert scores.shape == IDS.shape
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, (normed @ head["kernel"] + head["bias"])[..., 0], atol=1e-6)
    of_bfloat16 = score(model.clone(dtype=jnp.bfloat16), params, hidden.astype(jnp.bfloat16))
    assert of_bfloat16.dtype == jnp.float32
    np.testing.assert_allclose(of_bfloat16, scores, atol=0.02)


def test_the_decoder_computes_the_same_beside_a_value_head(params):
    model = CausalLM(CONFIG)
    without = {key: value for key, value in params.items() if key != "v_head"}
    np.testing.assert_array_equal(model.apply({"params": params}, IDS), model.apply({"params": without}, IDS))


def test_a_drawn_head_is_within_the_bounds_of_a_linear_layer_and_follows_from_the_key():
    heads = [draw_value_head(400, jax.random.key(seed)) for seed in (0, 0, 1)]
    assert heads[0]["kernel"].shape == (400, 1)
    assert 0.045 < float(abs(heads[0]["kernel"]).max()) < 0.05
    assert float(abs(heads[0]["bias"]).max()) < 0.05
    np.testing.assert_array_equal(heads[0]["kernel"], heads[1]["kernel"])
    assert float(abs(heads[0]["kernel"] - heads[2]["kernel"]).max()) > 0.01


def test_a_value_head_lies_whole_on_each_device_and_decays_but_for_its_bias(params):
    mesh = make_mesh(fsdp=8)
    where = tree_shardings(tuning.prepared_axes(params, CONFIG), params, mesh)
    assert {x.spec for x in jax.tree.leaves(where["v_head"])} == {P(None, None), P(None)}
    assert tuning.decay_mask(params)["v_head"] == {"kernel": True, "bias": False}
    assert ("v_head",) not in tuning.select(params, "all")
