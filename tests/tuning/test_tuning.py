"""What is tuned: selected by name, shown, and nothing else."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtune import tuning
from jtune.config import FinetuningArguments
from jtune.errors import ConfigError, DataError
from jtune.models import CausalLM, DecoderConfig, init_params
from jtune.models.config import Experts
from jtune.models.families import file_names
from jtune.tuning import lora
from jtune.tuning.freeze import cut_layers
from jtune.tuning.prepare import whole_modules
from jtune.tuning.show import show, tensor

DENSE = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
MIXTURE = DecoderConfig(**{**vars(DENSE), "family": "mixtral", "experts": Experts(4, 2, 48), "layers": ()})
IDS = np.arange(20, dtype=np.int32).reshape(2, 10)


@cache
def weights(config=DENSE):
    return jax.jit(lambda: init_params(config, jax.random.key(0)))()


def logits(params, config=DENSE, **options):
    return np.asarray(CausalLM(config, **options).apply({"params": params}, IDS))


def moved(params, scale=0.1):
    """With b, and a, off their start."""
    mask = tuning.adapter_mask(params)
    noise = lambda x, m: x + scale * jax.random.normal(jax.random.key(3), x.shape, x.dtype) if m else x
    return jax.tree.map(noise, params, mask)


def same_tree(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def prepare(adapters=(), load=None, config=DENSE, dtype="float32", params=None, **args):
    return tuning.prepare(
        weights(config) if params is None else params,
        FinetuningArguments(**args),
        config,
        adapters=adapters,
        load_adapter=load or (lambda *_: pytest.fail("no adapter was asked for")),
        key=jax.random.key(1),
        frozen_dtype=jnp.dtype(dtype),
    )


# ---------------------------------------------------------------------- lora


@pytest.mark.parametrize("config", [DENSE, MIXTURE])
def test_a_new_adapter_changes_nothing_until_it_is_trained(config):
    targets = ["all"] if config is DENSE else ["all", "gate", "w1", "w2", "w3"]
    params = lora.add(weights(config), targets, names=file_names(config))
    np.testing.assert_allclose(logits(params, config), logits(weights(config), config), atol=1e-6)
    assert np.abs(logits(moved(params), config) - logits(params, config)).max() > 1e-2


@pytest.mark.parametrize("config", [DENSE, MIXTURE])
def test_merged_equals_unmerged(config):
    targets = ["q_proj", "lm_head"] + (["down_proj"] if config is DENSE else ["gate", "gate_proj", "down_proj"])
    params = moved(lora.add(weights(config), targets, rank=3, use_rslora=True))
    np.testing.assert_allclose(logits(lora.merge(params), config), logits(params, config), atol=1e-5)
    assert jax.tree.structure(lora.merge(params)) == jax.tree.structure(weights(config))


def test_merging_keeps_the_dtype_of_the_base_and_computes_in_float32():
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights())
    params = moved(lora.add(base, ["q_proj"]))
    kernel = lora.merge(params)["layers"]["self_attn"]["q_proj"]["kernel"]
    node = params["layers"]["self_attn"]["q_proj"]["kernel"]
    exact = np.float32(node.base) + node.scale * (np.asarray(node.a) @ np.asarray(node.b))
    assert kernel.dtype == jnp.bfloat16
    # Rounded once: half of the last place, and a little for the order of a sum in float32, which is a processor's own.
    np.testing.assert_allclose(np.float32(kernel), exact, rtol=2**-8 * 1.01)


def test_split_gives_the_base_and_the_adapters_alone():
    params = moved(lora.add(weights(), "q_proj,v_proj"))
    base, adapters = lora.split(params)
    same_tree(base, weights())
    assert len(jax.tree.leaves(adapters)) == 4
    assert adapters["layers"]["self_attn"]["q_proj"]["kernel"].base is None


def names(params):
    return {path[-1] for path, kernel in tuning.kernels(params) if tuning.is_node(kernel)}


@pytest.mark.parametrize(
    ("config", "targets", "expected"),
    [
        (DENSE, "all", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        (DENSE, "q_proj, v_proj", "q_proj v_proj"),
        (DENSE, ("self_attn.q_proj", "lm_head"), "q_proj lm_head"),
        (MIXTURE, "all", "q_proj k_proj v_proj o_proj"),
        (MIXTURE, ("w1", "w2", "block_sparse_moe.gate"), "gate_proj down_proj gate"),
    ],
)
def test_targets_are_names_of_modules(config, targets, expected):
    assert names(lora.add(weights(config), targets, names=file_names(config))) == set(expected.split())


def test_a_target_that_matches_nothing_is_an_error_with_the_names_that_would():
    with pytest.raises(ConfigError, match=r"'q_prj' matches no module.*did you mean 'q_proj'") as error:
        lora.add(weights(), ["q_prj", "v_proj"])
    assert "down_proj" in str(error.value)
    with pytest.raises(ConfigError, match="additional_target: embed_tokens"):
        lora.add(weights(), ["embed_tokens"])
    with pytest.raises(ValueError, match="merge it first"):
        lora.add(lora.add(weights(), ["q_proj"]), ["q_proj"])


def test_what_an_adapter_starts_from_follows_from_the_key_and_its_path_alone():
    one = lora.add(weights(), ["q_proj"], key=jax.random.key(1))["layers"]["self_attn"]["q_proj"]["kernel"]
    two = lora.add(weights(), ["all"], key=jax.random.key(1))["layers"]["self_attn"]
    other = lora.add(weights(), ["q_proj"], key=jax.random.key(2))["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(one.a, two["q_proj"]["kernel"].a)
    assert (one.a != other.a).all()
    assert (two["k_proj"]["kernel"].a != one.a).all()
    assert (one.a[0] != one.a[1]).all()  # layers differ
    assert float(jnp.abs(one.a).max()) <= 1 / np.sqrt(32)
    assert float(jnp.abs(one.a).max()) > 0.9 / np.sqrt(32)
    assert one.scale == 2.0
    assert lora.add(weights(), ["q_proj"], rank=4, alpha=6, use_rslora=True)["layers"]["self_attn"]["q_proj"][
        "kernel"
    ].scale == pytest.approx(3.0)


def test_dropout_acts_only_with_a_key():
    params = moved(lora.add(weights(), ["q_proj"], dropout=0.5))
    model = CausalLM(DENSE)
    with_key = lambda n: np.asarray(model.apply({"params": params}, IDS, rngs={"dropout": jax.random.key(n)}))
    np.testing.assert_array_equal(with_key(0), with_key(0))
    assert (with_key(0) != with_key(1)).any()
    assert (with_key(0) != logits(params)).any()
    assert tuning.has_dropout(params)
    assert not tuning.has_dropout(weights())


# ---------------------------------------------------------------------- its relatives


@pytest.mark.parametrize("form", ["lora", "dora", "pissa"])
def test_each_form_changes_nothing_until_it_is_trained_and_merges(form):
    params = lora.add(weights(), "q_proj,down_proj,lm_head", rank=3, form=form)
    np.testing.assert_allclose(logits(params), logits(weights()), atol=2e-6)
    trained = moved(params)
    np.testing.assert_allclose(logits(lora.merge(trained)), logits(trained), atol=1e-5)
    assert np.abs(logits(trained) - logits(params)).max() > 1e-2
    base, adapters = lora.split(trained)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), base, weights())
    assert jax.tree.leaves(adapters, is_leaf=tuning.is_node)[0].base is None


def dora_by_definition(x, base, a, b, magnitude):
    w = base + 2.0 * a @ b
    return x @ (magnitude * w / jax.lax.stop_gradient(jnp.linalg.norm(w, axis=0)))


def test_dora_is_its_definition_with_all_gradients():
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    leaves = draw(0, 5, 8), draw(1, 8, 6), draw(2, 8, 3), draw(3, 3, 6), draw(4, 6)
    node = lambda x, base, a, b, m: lora.DoRA(base, a, b, 2.0, 0.0, m).project(x, None, None)
    gradients = lambda f: jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))), (0, 2, 3, 4))(*leaves)
    np.testing.assert_allclose(node(*leaves), dora_by_definition(*leaves), rtol=1e-5)
    for ours, theirs in zip(gradients(node), gradients(dora_by_definition)):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("iterations", [-1, 16])
def test_pissa_takes_the_largest_singular_values(iterations):
    kernel = weights()["layers"]["self_attn"]["q_proj"]["kernel"]
    node = lora.add(weights(), "q_proj", rank=3, form="pissa", svd_iterations=iterations)
    node = node["layers"]["self_attn"]["q_proj"]["kernel"]
    values = np.linalg.svd(np.asarray(kernel), compute_uv=False)
    left = np.linalg.svd(np.asarray(node.base), compute_uv=False)
    np.testing.assert_allclose(left[:, :-3], values[:, 3:], rtol=1e-3)
    np.testing.assert_allclose(left[:, -3:], 0, atol=1e-5)
    np.testing.assert_allclose(np.einsum("lir,lir->lr", node.a, node.a) * node.scale, values[:, :3], rtol=1e-3)


def test_modules_may_have_a_rank_and_an_alpha_of_their_own():
    patterns = {"rank_pattern": {"mlp.down_proj": 2}, "alpha_pattern": {"q_proj": 2}}
    params = lora.add(weights(), "all", rank=4, alpha=8, **patterns)
    node = {path[-1]: kernel for path, kernel in tuning.kernels(params) if tuning.is_node(kernel)}
    assert (node["down_proj"].a.shape[-1], node["down_proj"].scale) == (2, 4.0)
    assert (node["q_proj"].a.shape[-1], node["q_proj"].scale) == (4, 0.5)
    assert (node["up_proj"].a.shape[-1], node["up_proj"].scale) == (4, 2.0)
    with pytest.raises(ConfigError, match="'down_proj' is no module that gets an adapter: q_proj"):
        lora.add(weights(), "q_proj", rank_pattern={"down_proj": 2})


# ---------------------------------------------------------------------- freeze


@pytest.mark.parametrize(
    ("count", "expected"), [(2, [False, False, True, True]), (-1, [True, False, False, False]), (9, [True] * 4)]
)
def test_freeze_counts_from_the_end_or_the_beginning(count, expected):
    params, mask = tuning.freeze(weights(), count, ("all",), ())
    stacks = mask["layers"] if isinstance(mask["layers"], tuple) else (mask["layers"],)
    sizes = params["layers"] if isinstance(params["layers"], tuple) else (params["layers"],)
    found = []
    for m, stack in zip(stacks, sizes):
        assert len(set(jax.tree.leaves(m))) == 1
        found += [jax.tree.leaves(m)[0]] * jax.tree.leaves(stack)[0].shape[0]
    assert found == expected
    assert not any(jax.tree.leaves({k: v for k, v in mask.items() if k != "layers"}))
    np.testing.assert_allclose(logits(params), logits(weights()), atol=1e-6)


def trained(mask):
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, trains in leaves if trains}


def test_freeze_selects_modules_and_extra_modules_as_llamafactory_does():
    _, mask = tuning.freeze(weights(), 1, ("mlp",), ("norm",))
    # "norm" is part of the name of every norm.
    norms = {f"layers.{i}.{name}.scale" for i in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")}
    mlp = {f"layers.1.mlp.{name}_proj.kernel" for name in ("gate", "up", "down")}
    assert trained(mask) == norms | mlp | {"norm.scale"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"freeze_trainable_modules": ("mpl",)}, "'mpl'.*Did you mean 'mlp'"),
        ({"freeze_extra_modules": ("embed",)}, "'embed'.*embed_tokens"),
    ],
)
def test_a_frozen_name_that_matches_nothing_is_an_error(args, words):
    with pytest.raises(ConfigError, match=words):
        prepare(finetuning_type="freeze", **args)


# ---------------------------------------------------------------------- prepare


def test_what_trains_is_float32_and_what_does_not_is_as_small_as_the_computation():
    params, mask = prepare(finetuning_type="lora", lora_target=("q_proj",), dtype="bfloat16")
    for x, trains in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True):
        assert x.dtype == (jnp.float32 if trains else jnp.bfloat16)
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights())
    params, mask = prepare(finetuning_type="freeze", params=stored)
    for x, trains in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True):
        assert x.dtype == (jnp.float32 if trains else jnp.bfloat16)
    params, _ = prepare(finetuning_type="full", pure_bf16=True, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_adapters_are_merged_but_for_the_last_which_goes_on():
    loaded = []

    def load(params, decoder, path):
        assert not any(tuning.is_node(k) for _, k in tuning.kernels(params))
        loaded.append(path)
        return moved(lora.add(params, [path], rank=2)), ("norm",)

    params, mask = prepare(("q_proj", "v_proj"), load, finetuning_type="lora")
    assert loaded == ["q_proj", "v_proj"]
    assert names(params) == {"v_proj"}
    assert trained(mask) == {
        "layers.self_attn.v_proj.kernel.a",
        "layers.self_attn.v_proj.kernel.b",
        "norm.scale",
        "layers.input_layernorm.scale",
        "layers.post_attention_layernorm.scale",
    }
    fresh, _ = prepare(
        ("q_proj", "v_proj"), load, finetuning_type="lora", create_new_adapter=True, lora_target=("o_proj",)
    )
    assert names(fresh) == {"o_proj"}
    np.testing.assert_allclose(logits(fresh), logits(params), atol=1e-5)


def test_whole_modules_train_beside_the_adapter():
    params = lora.add(weights(), ["q_proj"])
    mask = whole_modules(params, tuning.adapter_mask(params), ["embed_tokens", "lm_head"])
    assert {"embed_tokens.embedding", "lm_head.kernel"} < trained(mask)
    with pytest.raises(ConfigError, match="has an adapter already"):
        whole_modules(params, tuning.adapter_mask(params), ["q_proj"])
    with pytest.raises(ConfigError, match=r"embedd not found.*embed_tokens"):
        whole_modules(params, tuning.adapter_mask(params), ["embedd"])


def test_the_selection_can_be_read():
    text = tuning.describe_trainable(*prepare(finetuning_type="lora", lora_target=("q_proj", "v_proj"), lora_rank=4))
    # 4 layers of (32 + 32) * 4 and (32 + 16) * 4
    assert "trains 1,792 of" in text
    assert "layers.*.self_attn.{q_proj,v_proj}: LoRA of rank 4, scale 2" in text
    text = tuning.describe_trainable(*prepare(finetuning_type="freeze", freeze_trainable_layers=1))
    assert "layers.3.mlp.{down_proj,gate_proj,up_proj}: whole" in text


def test_decay_leaves_norms_and_biases_alone():
    params = {"norm": {"scale": jnp.ones(2)}, "x": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    assert tuning.decay_mask(params) == {"norm": {"scale": False}, "x": {"kernel": True, "bias": False}}
    adapters, _ = tuning.partition(*prepare(finetuning_type="lora"))
    assert all(jax.tree.leaves(tuning.decay_mask(adapters)))


def test_partition_and_combine_are_inverse():
    params, mask = prepare(finetuning_type="lora")
    trainable, frozen = tuning.partition(params, mask)
    same_tree(tuning.combine(trainable, frozen), params)
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(params))


def test_without_another_word_adapters_train_or_everything_does():
    assert all(jax.tree.leaves(tuning.trainable_mask(weights())))
    assert sum(jax.tree.leaves(tuning.trainable_mask(lora.add(weights(), ["q_proj"])))) == 2


def test_show_is_a_table_with_totals(capsys):
    show(lora.add(weights(), ["q_proj"]))
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("layers.self_attn.q_proj.kernel.a"))
    assert row.split() == [
        "layers.self_attn.q_proj.kernel.a",
        "4x32x8",
        "float32",
        "4.0",
        "KiB",
        "one",
        "device",
        "yes",
    ]
    assert "2,048 of them train" in text


def test_show_may_tell_how_large_values_are(capsys):
    show({"norm": {"scale": jnp.full((4,), -2.0)}}, norms=True)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("norm.scale"))
    assert row.split()[4:6] == ["B", "2"]


@pytest.mark.parametrize("stacks", ["one", "two"])
def test_a_tensor_is_found_by_its_name_in_the_files(stacks):
    model, params = CausalLM(DENSE), lora.add(weights(), ["q_proj"])
    kernel = weights()["layers"]["self_attn"]["q_proj"]["kernel"]
    params = params if stacks == "one" else cut_layers(params, [1])
    np.testing.assert_array_equal(tensor(model, params, "model.layers.2.self_attn.q_proj.weight"), kernel[2].T)
    np.testing.assert_array_equal(tensor(model, params, "lm_head.weight"), weights()["lm_head"]["kernel"].T)
    with pytest.raises(DataError, match=r"Did you mean model\.layers\.2\.self_attn\.q_proj\.weight\?"):
        tensor(model, params, "model.layers.2.attention.q_proj.weight")


def test_what_no_gradient_reaches_does_not_train():
    experts = Experts(4, 2, 16, "sigmoid", correction_bias=True)
    config = DecoderConfig(**{**vars(DENSE), "family": "deepseek_v3", "experts": experts, "layers": ()})
    name = "e_score_correction_bias"
    for mask in (tuning.full_mask(weights(config)), tuning.freeze(weights(config), 4, ("all",), ())[1]):
        mlp = mask["layers"]["mlp"]
        assert mlp["gate"]["kernel"]
        assert not mlp[name]
