"""Adapters: PEFT's act the same here, and ours act the same in PEFT."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import CORE, ids, logits_of, make_model

from jtune.errors import DataError
from jtune.interop.peft import load_adapter, save_adapter
from jtune.interop.peft_shapes import adapter_shapes
from jtune.loading.inference import load_model
from jtune.models.families import file_names
from jtune.tuning import adapter_mask, lora, trainable_mask
from jtune.tuning.prepare import whole_modules

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def slow(family):
    return pytest.param(family, marks=pytest.mark.slow)


def theirs(folder, family, **options):
    """A PEFT adapter with b not zero, saved; and its logits."""
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(make_model(family), config).eval()
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name or "modules_to_save" in name:
                p.add_(0.1 * torch.from_numpy(rng.standard_normal(p.shape, dtype=np.float32)))
    model.save_pretrained(folder)
    return logits_of(model, ids())


def in_peft(adapter, family):
    return logits_of(peft.PeftModel.from_pretrained(make_model(family), adapter).eval(), ids())


def logits(model, params):
    return np.asarray(model.apply({"params": params}, ids()))


@pytest.mark.parametrize("family", [*CORE, "gemma4_text", slow("kimi_linear"), slow("lfm2"), slow("lfm2_moe")])
def test_pefts_adapter_acts_the_same_here_and_when_written_again(family, checkpoint, tmp_path):
    expected = theirs(tmp_path / "theirs", family)
    model, params = load_model(str(checkpoint(family)), adapter=str(tmp_path / "theirs"))
    np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)
    np.testing.assert_allclose(logits(model, lora.merge(params)), expected, atol=1e-4)
    save_adapter(params, adapter_mask(params), model.config, tmp_path / "again", base="base")
    np.testing.assert_allclose(in_peft(tmp_path / "again", family), expected, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2}},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"use_dora": True},
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True, "rank_pattern": {"v_proj": 2}},
    ],
)
def test_pefts_options_are_honoured(options, checkpoint, tmp_path):
    expected = theirs(tmp_path, "llama", **options)
    model, params = load_model(str(checkpoint("llama")), adapter=str(tmp_path))
    np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)


@pytest.mark.parametrize("family", [*CORE, slow("llama4_text"), slow("lfm2_moe")])
def test_our_adapter_acts_the_same_in_peft(family, checkpoint, tmp_path):
    model, base = load_model(str(checkpoint(family)))
    targets = ["q_proj", "v_proj"]
    experts = {"mixtral": ["w1", "w2", "w3", "gate"], "lfm2_moe": ["w1", "w2", "w3", "gate", "in_proj", "out_proj"]}
    experts |= {"llama4_text": ["down_proj", "gate_up_proj", "router"]}
    targets += experts.get(family, ["down_proj"])
    params = lora.add(base, targets, rank=4, use_rslora=True, names=file_names(model.config))
    mask = whole_modules(params, adapter_mask(params), ["embed_tokens"])
    rng = np.random.default_rng(6)
    moved = lambda x, trains: x + 0.05 * jnp.asarray(rng.standard_normal(x.shape), x.dtype) if trains else x
    params = jax.tree.map(moved, params, mask)
    save_adapter(params, mask, model.config, tmp_path, base=str(checkpoint(family)), use_rslora=True)
    np.testing.assert_allclose(in_peft(tmp_path, family), logits(model, params), atol=1e-4)
    again, whole = load_adapter(base, model.config, str(tmp_path))
    assert whole == ("embed_tokens",)
    if family not in (
        "mixtral",
        "lfm2_moe",
    ):  # their gate and up are one adapter in the file: the same, but not laid out the same
        jax.tree.map(np.testing.assert_array_equal, again, params)
    np.testing.assert_allclose(logits(model, again), logits(model, params), atol=1e-5)


def test_pefts_experts_leave_the_other_mlps_of_a_mixture_their_adapters(checkpoint, tmp_path):
    """Of layers without experts, and of what all tokens share: PEFT takes modules of these names for experts."""
    model, base = load_model(str(checkpoint("glm4_moe_lite")))
    params = lora.add(base, "all", rank=4, names=file_names(model.config))
    mask, rng = adapter_mask(params), np.random.default_rng(6)
    moved = lambda x, trains: x + 0.05 * jnp.asarray(rng.standard_normal(x.shape), x.dtype) if trains else x
    params = jax.tree.map(moved, params, mask)
    save_adapter(params, mask, model.config, tmp_path, base="base")
    np.testing.assert_allclose(in_peft(tmp_path, "glm4_moe_lite"), logits(model, params), atol=1e-4)
    settings = SimpleNamespace(model=SimpleNamespace(hub={}, adapter_folder=None))
    again, _ = load_adapter(base, model.config, str(tmp_path))
    shapes, _ = adapter_shapes(base, model.config, str(tmp_path), settings)
    assert jax.tree.map(np.shape, again) == jax.tree.map(np.shape, shapes)


@pytest.mark.parametrize("form", ["dora", "pissa"])
def test_the_other_forms_act_the_same_in_peft(form, checkpoint, tmp_path):
    model, base = load_model(str(checkpoint("llama")))
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 5}}
    params = lora.add(base, "q_proj,v_proj,down_proj", rank=4, form=form, **patterns)
    mask, rng = adapter_mask(params), np.random.default_rng(6)
    moved = lambda x, trains: x + 0.05 * jnp.asarray(rng.standard_normal(x.shape), x.dtype) if trains else x
    params = jax.tree.map(moved, params, mask)
    save_adapter(params, mask, model.config, tmp_path, base="base")
    np.testing.assert_allclose(in_peft(tmp_path, "llama"), logits(model, params), atol=1e-4)
    again, _ = load_adapter(base, model.config, str(tmp_path))
    np.testing.assert_allclose(logits(model, again), logits(model, params), atol=1e-4)
    assert np.abs(logits(model, params) - logits(model, base)).max() > 0.1


def test_dropout_of_dora_is_that_of_peft(checkpoint, tmp_path):
    """Which inputs are dropped differs; what dropping them means does not: on average over masks both are the same."""
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, use_dora=True, target_modules=["q_proj"])
    linear = torch.nn.Linear(8, 6, bias=False)
    layer = peft.get_peft_model(torch.nn.ModuleDict({"q_proj": linear}), config).base_model.model["q_proj"]
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    a, b, magnitude, x = draw(8, 4), draw(4, 6), draw(6), draw(1, 8)
    w = linear.weight.detach().numpy().T.copy()
    node = lora.DoRA(jnp.asarray(w), jnp.asarray(a), jnp.asarray(b), 2.0, 0.5, jnp.asarray(magnitude))
    kept = np.asarray(jax.random.bernoulli(jax.random.key(1), 0.5, x.shape))
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.from_numpy(a.T))
        layer.lora_B["default"].weight.copy_(torch.from_numpy(b.T))
        layer.lora_magnitude_vector["default"].weight.copy_(torch.from_numpy(magnitude))
        layer.lora_dropout["default"] = type("Same", (torch.nn.Module,), {
            "forward": lambda _, x: x * torch.from_numpy(kept.astype(np.float32)) * 2})()  # fmt: skip
        expected = layer(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(node.project(jnp.asarray(x), jax.random.key(1), None), expected, rtol=1e-5, atol=1e-5)


def test_experts_adapters_of_before_are_read(checkpoint, tmp_path):
    """One pair for each expert's module, as PEFT wrote them for transformers 4."""
    model, base = load_model(str(checkpoint("mixtral")))
    rng = np.random.default_rng(7)
    tensors = {
        f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{e}.w2.lora_{x}.weight": rng.standard_normal(
            (4, 48) if x == "A" else (32, 4), dtype=np.float32
        )
        for layer in range(4) for e in range(4) for x in "AB"
    }  # fmt: skip
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    params, _ = load_adapter(base, model.config, str(tmp_path))
    node = params["layers"]["mlp"]["experts"]["down_proj"]["kernel"]
    name = "base_model.model.model.layers.2.block_sparse_moe.experts.3.w2.lora_{}.weight"
    np.testing.assert_array_equal(node.a[2, 3], tensors[name.format("A")].T)
    np.testing.assert_array_equal(node.b[2, 3], tensors[name.format("B")].T)


def test_what_is_not_an_adapter_for_this_model_is_refused(checkpoint, tmp_path):
    model, params = load_model(str(checkpoint("llama")))
    theirs(tmp_path, "llama")
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    options, tensors = json.loads(config.read_text()), load_file(weights)

    def refused(word, options=options, tensors=tensors):
        config.write_text(json.dumps(options))
        save_file(tensors, weights)
        with pytest.raises(DataError, match=word):
            load_adapter(params, model.config, str(tmp_path))

    refused(r"lora_magnitude_vector is missing \(use_dora\)", options | {"use_dora": True})
    refused("peft_type is 'LOHA'", options | {"peft_type": "LOHA"})
    refused("have no place", tensors=tensors | {"base_model.model.model.layers.0.mlp.other.lora_A.weight": np.ones(2)})
    some = {name: x for name, x in tensors.items() if "layers.1.self_attn.q_proj" not in name}
    refused("self_attn.q_proj has no adapter in layers 1", tensors=some)
    small = {name: x[:, :16].copy() if "q_proj.lora_A" in name else x for name, x in tensors.items()}
    refused("is it for another model", tensors=small)
    weights.unlink()
    with pytest.raises(DataError, match=r"adapter_model\.safetensors is not"):
        load_adapter(params, model.config, str(tmp_path))
    config.unlink()
    with pytest.raises(DataError, match=r"is .* a PEFT adapter"):
        load_adapter(params, model.config, str(tmp_path))


def test_what_trains_is_the_adapter(checkpoint, tmp_path):
    theirs(tmp_path, "llama")
    _, params = load_model(str(checkpoint("llama")), adapter=str(tmp_path))
    mask = trainable_mask(params)
    assert sum(jax.tree.leaves(mask)) == 2 * 7
