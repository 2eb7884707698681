"""The decoder computes what transformers computes, for every family and option that it accepts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CORE, LLAMA3, ids, logits_of, make_model, write

from jtune.errors import DataError
from jtune.interop import hf
from jtune.loading.inference import load_model
from jtune.models import CausalLM
from jtune.models import decoder as decoder_module
from jtune.models.decoder import periods
from jtune.models.families import decoder_config

torch = pytest.importorskip("torch")
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
OPTIONS = [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": YARN | {"attention_factor": 0.7, "beta_fast": 16.0, "truncate": False}}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    ("llama", {"num_key_value_heads": 4, "head_dim": 24}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "tie_word_embeddings": False}),
    ("qwen3", {"attention_bias": True}),
    ("mistral", {"sliding_window": None}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "num_hidden_layers": 3}),
    ("mixtral", {"sliding_window": 8, "num_experts_per_tok": 3}),
]


def close(ours, theirs, atol=1e-4):
    assert np.abs(np.asarray(ours) - theirs).max() < atol * theirs.std()


@pytest.mark.parametrize("family", CORE)
def test_logits_equal_transformers(family, checkpoint):
    model, params = load_model(str(checkpoint(family)))
    close(model.apply({"params": params}, ids()), logits_of(make_model(family), ids()))


@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_logits_equal_transformers_with_options(family, options, tmp_path):
    model, params = load_model(str(write(tmp_path, family, **options)))
    # Long enough for the stretched frequencies to matter.
    close(model.apply({"params": params}, ids(1, 100)), logits_of(make_model(family, **options), ids(1, 100)))


def test_a_config_of_transformers_4_means_the_same(checkpoint):
    new = hf.read_config(checkpoint("llama"))
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "dtype")}
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    old |= {"rope_theta": 500000.0, "rope_scaling": scaling, "torch_dtype": "float32"}
    assert decoder_config(old) == decoder_config(new)


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("llama4_text", "kimi_linear")]


@pytest.mark.parametrize("family", [*CORE, "gemma4_text", "lfm2", *SLOW])
def test_packed_segments_do_not_see_each_other(family, checkpoint):
    model, params = load_model(str(checkpoint(family)))
    one, two = ids(1, 11, seed=2), ids(1, 17, seed=3)
    packed = np.concatenate([one, two, np.zeros((1, 4), np.int32)], axis=1)
    positions = np.concatenate([np.arange(11), np.arange(17), np.zeros(4)])[None].astype(np.int32)
    segments = np.repeat([1, 2, 0], [11, 17, 4])[None].astype(np.int32)
    logits = model.apply({"params": params}, packed, positions, segments)
    for alone, part in ((one, logits[:, :11]), (two, logits[:, 11:28])):
        close(part, np.asarray(model.apply({"params": params}, alone)), atol=2e-5)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
@pytest.mark.parametrize("cut", [(1,), (2,), (1, 2, 3)])
def test_layers_in_several_stacks_are_the_same_layers(family, cut, checkpoint):
    from jtune.tuning.freeze import cut_layers

    model, params = load_model(str(checkpoint(family)))
    whole = model.apply({"params": params}, ids())
    close(model.apply({"params": cut_layers(params, cut)}, ids()), np.asarray(whole), atol=1e-6)


@pytest.mark.parametrize("family", ["gemma2", pytest.param("gemma4_text", marks=pytest.mark.slow), "mixtral"])
def test_gradients_do_not_depend_on_what_is_computed_again(family, checkpoint, monkeypatch):
    monkeypatch.setattr(decoder_module, "THIN", 8)  # these models are narrow
    model, params = load_model(str(checkpoint(family)))

    def gradient(remat):
        again = CausalLM(model.config, remat=remat)
        return jax.jit(jax.grad(lambda p: again.apply({"params": p}, ids()).std()))(params)

    plain = gradient("none")
    for remat in ("dots", "attention", "full", "offload"):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(gradient(remat)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)
    assert all(bool((x != 0).any()) for x in jax.tree.leaves(plain))


def test_thin_products_are_not_kept_with_dots():
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)

    def layer(x, kernel, a, b):
        return jnp.sin(x @ kernel + x @ a @ b)

    def kept(policy):
        def residuals(*given):
            return jax.vjp(jax.checkpoint(layer, policy=policy), *given)[1]

        leaves = jax.tree.leaves(
            jax.eval_shape(residuals, shape(8, 1024), shape(1024, 999), shape(1024, 4), shape(4, 999))
        )
        return sum(x.shape == (8, 999) for x in leaves), sum(x.shape == (8, 4) for x in leaves)

    assert kept(jax.checkpoint_policies.dots_with_no_batch_dims_saveable) == (2, 1)
    assert kept(decoder_module._is_worth_keeping) == (1, 1)


def test_bfloat16_is_as_near_as_torchs(checkpoint):
    model, params = load_model(str(checkpoint("llama")), dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    logits = model.apply({"params": params}, ids())
    assert logits.dtype == jnp.float32
    exact = logits_of(make_model("llama"), ids())
    theirs = logits_of(make_model("llama").to(torch.bfloat16), ids())
    rms = lambda x: np.sqrt(np.mean(np.square(np.asarray(x) - exact)))
    assert rms(logits) < 1.2 * rms(theirs)


def test_layers_repeat_in_the_shortest_pattern():
    assert periods("aaaa") == [(0, 1, 4)]
    assert periods("abab") == [(0, 2, 2)]
    assert periods("aaaaab" * 2 + "aa") == [(0, 6, 2), (12, 1, 2)]
    assert periods("aabbb") == [(0, 1, 2), (2, 1, 3)]


@pytest.mark.parametrize(
    ("family", "change", "word"),
    [
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("llama", {"hidden_act": "tanh"}, "tanh"),
        ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
        ("llama", {"model_type": "lama"}, "llama"),
        ("llama", {"model_type": None}, "model_type"),
        ("llama", {"hidden_size": "many"}, "hidden_size"),
    ],
)
def test_an_option_that_is_not_honoured_is_refused_by_name(family, change, word, checkpoint):
    source = hf.read_config(checkpoint(family)) | change
    with pytest.raises(DataError, match=word.replace("=", "=")):
        decoder_config(json.loads(json.dumps(source)))
