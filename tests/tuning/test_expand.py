"""LLaMA Pro: an expanded model computes the same, and only what was added trains."""

import importlib.util
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jtune import tuning
from jtune.config import FinetuningArguments
from jtune.errors import ConfigError, DataError
from jtune.models import CausalLM, DecoderConfig, init_params
from jtune.models.config import Experts, Layer
from jtune.models.families import decoder_config
from jtune.sharding import make_mesh
from jtune.tuning import expand as expansion
from jtune.tuning import is_node
from jtune.tuning.expand import expand, expand_config, order

DENSE = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
)
MIXED = DecoderConfig(
    **{
        **vars(DENSE),
        "mlp_bias": False,
        "experts": Experts(4, 2, 24, bias=True, shared_size=16),
        "layers": (Layer(), Layer(window=4, sparse=True), Layer(sparse=True), Layer(window=4, sparse=True)),
    }
)
IDS = np.arange(20, dtype=np.int32).reshape(2, 10)


@cache
def weights(config):
    """Random, biases and all."""
    noisy = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    return jax.jit(lambda: jax.tree.map(noisy, init_params(config, jax.random.key(0))))()


def logits(params, config):
    return np.asarray(jax.jit(lambda params: CausalLM(config).apply({"params": params}, IDS))(params))


def script():
    path = Path(__file__).parents[2] / "scripts" / "llama_pro.py"
    spec = importlib.util.spec_from_file_location("llama_pro", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("config", [DENSE, MIXED], ids=["dense", "experts and windows"])
@pytest.mark.parametrize("num_expand", [1, 4])
def test_an_expanded_model_computes_the_same_until_it_is_trained(config, num_expand):
    params = weights(config)
    grown, deeper = expand(params, config, num_expand)
    assert deeper.num_hidden_layers == 4 + num_expand
    expected = logits(params, config)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits(grown, deeper), expected, atol=1e-6)


def test_the_new_layers_are_those_that_llama_pro_trains():
    assert order(6, 2) == [0, 1, 2, 2, 3, 4, 5, 5]
    grown, deeper = expand(weights(DENSE), DENSE, 2)
    zero = [bool(jnp.all(x == 0)) for x in grown["layers"]["self_attn"]["o_proj"]["kernel"]]
    cut, mask = tuning.freeze(grown, 2, ["all"], [], expanded=True)
    trains = []
    for stack, m in zip(cut["layers"], mask["layers"]):
        trains += [all(jax.tree.leaves(m))] * stack["self_attn"]["o_proj"]["kernel"].shape[0]
    assert trains == zero == [False, False, True, False, False, True]
    assert deeper.layers == (Layer(),) * 6


@pytest.mark.parametrize("count", [0, 3])
def test_layers_that_cannot_be_evenly_spaced_are_refused(count):
    with pytest.raises(ConfigError, match=f"`num_layers` 4 should be divisible by `num_expand` {count}"):
        expand(weights(DENSE), DENSE, count)
    with pytest.raises(ConfigError, match=f"`num_layers` 4 should be divisible by `num_layer_trainable` {count}"):
        tuning.freeze(weights(DENSE), count, ["all"], [], expanded=True)


def prepared(params, config=DENSE, **args):
    return tuning.prepare(
        params,
        FinetuningArguments(use_llama_pro=True, **args),
        config,
        load_adapter=lambda *_: pytest.fail("no adapter was asked for"),
        key=jax.random.key(1),
        frozen_dtype=jnp.dtype("float32"),
    )


@pytest.mark.parametrize("config", [DENSE, MIXED], ids=["dense", "experts"])
def test_only_the_new_layers_get_adapters(config):
    grown, deeper = expand(weights(config), config, 2)
    params, mask = prepared(grown, deeper, finetuning_type="lora", freeze_trainable_layers=2, lora_rank=2)
    adapted, first = [], []
    for stack in params["layers"]:
        node = stack["self_attn"]["q_proj"]["kernel"]
        adapted += [is_node(node)] * jax.tree.leaves(node)[0].shape[0]
        first += [np.asarray(node.a[0])] if is_node(node) else []
    assert adapted == [False, False, True, False, False, True]
    assert not np.array_equal(*first)  # each has its own start
    assert jax.tree.structure(params) == jax.tree.structure(mask)
    np.testing.assert_allclose(logits(params, deeper), logits(grown, deeper), atol=1e-6)


def test_what_is_not_expanded_gets_no_gradient():
    grown, deeper = expand(weights(DENSE), DENSE, 2)
    params, mask = prepared(grown, deeper, finetuning_type="freeze", freeze_trainable_layers=2)
    trainable, frozen = tuning.partition(params, mask)
    loss = lambda t: logits_sum(tuning.combine(t, frozen), deeper)
    gradients = jax.jit(jax.grad(loss))(trainable)
    layer = sum(x.size for x in jax.tree.leaves(grown["layers"])) // 6
    assert sum(x.size for x in jax.tree.leaves(gradients)) == 2 * layer
    out = [stack["mlp"]["down_proj"]["kernel"] for stack in gradients["layers"] if jax.tree.leaves(stack)]
    assert all(float(jnp.abs(x).max()) > 0 for x in out)


def logits_sum(params, config):
    return jnp.square(CausalLM(config).apply({"params": params}, IDS)).mean()


# ---------------------------------------------------------------------- checkpoints


COUNTED = ("gemma4_text", "llama4_text")  # of which layer has what, a rule decides that counts them


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_a_longer_model_of_every_family_can_be_described(family):
    source = {"model_type": family, **tiny.BASE, **tiny.FAMILIES[family]}
    decoder = decoder_config(source)
    if family in COUNTED:
        with pytest.raises(DataError, match="a rule that counts them"):
            expand_config(source, 2)
        return
    layers = decoder_config(expand_config(source, 2)).layers
    assert layers == tuple(decoder.layers[i] for i in order(decoder.num_hidden_layers, 2))


def test_an_image_text_model_is_not_expanded():
    source = {"model_type": "gemma3", "text_config": tiny.BASE}
    with pytest.raises(DataError, match="gemma3 is an image-text model"):
        expand_config(source, 2)


# Layers alike; windows and norms on both sides; biases; lists by layer; dense layers first; the delta rule.
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss", "deepseek_v3", "qwen3_5_text"])
def test_transformers_gives_the_same_logits_for_what_the_script_writes(family, checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    class NoTokenizer:
        def save_pretrained(self, folder):
            pass

    module = script()
    monkeypatch.setattr(module, "load_tokenizer", lambda _: NoTokenizer())
    monkeypatch.setattr(module, "make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))
    folder = checkpoint(family)
    arguments = ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path), "--num_expand", "2"]
    assert module.main(arguments) == 0
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    there, again = load(folder), load(tmp_path)
    assert again.config.num_hidden_layers == 6
    np.testing.assert_allclose(tiny.logits_of(again, tiny.ids()), tiny.logits_of(there, tiny.ids()), atol=2e-6)


def test_what_cannot_be_expanded_is_refused_before_weights_are_read(tmp_path, monkeypatch, capsys):
    module = script()
    assert module.main(["--model_name_or_path", str(tmp_path / "none"), "--output_dir", "x", "--num_expand", "2"]) == 3
    assert "there is no such folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **tiny.BASE}))
    assert module.main(["--model_name_or_path", str(tmp_path), "--output_dir", "x", "--num_expand", "3"]) == 2
    assert "`num_layers` 4 should be divisible by `num_expand` 3" in capsys.readouterr().err
    # A family whose config does not tell of each layer, but has a rule.
    rule = lambda source: replace(DENSE, layers=tuple(Layer(window=4 if i % 2 else None) for i in range(source["n"])),
                                  num_hidden_layers=source["n"])  # fmt: skip
    monkeypatch.setattr(expansion, "decoder_config", rule)
    monkeypatch.setattr(expansion, "full_config", lambda source: ({}, {}))
    with pytest.raises(DataError, match="by a rule that counts them"):
        expand_config({"n": 4}, 2)
