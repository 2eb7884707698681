"""Image-text models: their text stack computes what transformers computes, and all else comes through unchanged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import ids, logits_of, make_model
from wrapped import WRAPPED, make_wrapped, read_back

from jtune.errors import ConfigError, DataError
from jtune.interop import hf
from jtune.interop.peft import load_adapter, save_adapter
from jtune.loading.inference import load_model
from jtune.models.families.wrapped import WRAPPERS
from jtune.tuning import adapter_mask, lora

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")
# Those that transformers has no class for, or writes under names that it does not read: see their own test.
ELSEWHERE = {"kimi_k25", "kimi_vl", "internvl_chat"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    def of(kind):
        folder = tmp_path_factory.getbasetemp() / f"wrapped-{kind}"
        if not folder.exists():
            make_wrapped(kind).save_pretrained(folder)
            (folder / "preprocessor_config.json").write_text("{}")
        return folder

    return of


def logits(model, params):
    tokens = ids() % 100 + 7  # none stands for an image
    return np.asarray(jax.jit(lambda params: model.apply({"params": params}, tokens))(params))


def theirs(model):
    # transformers' Llama 4 gives no logits without an image: its text model does.
    model = model.language_model if model.config.model_type == "llama4" else model
    return logits_of(model, ids() % 100 + 7)


def close(ours, expected, atol=1e-4):
    assert np.abs(ours - expected).max() < atol * expected.std()


def test_every_wrapper_is_tested():
    assert set(WRAPPED) | ELSEWHERE == set(WRAPPERS)


# One of each place and kind of text model; the others are tested when there is time.
QUICK = ("gemma3", "gemma4", "llama4", "mistral3", "qwen2_vl", "qwen3_5_moe", "qwen3_vl_moe", "smolvlm")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in WRAPPED]
)
def test_its_text_stack_is_what_transformers_has(kind, checkpoint, tmp_path):
    folder = checkpoint(kind)
    model, params = load_model(str(folder))
    expected = theirs(make_wrapped(kind))
    close(logits(model, params), expected)
    hf.save_model(params, model.config, hf.read_config(folder), tmp_path, base=folder)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    assert (tmp_path / "preprocessor_config.json").exists()
    close(theirs(read_back(tmp_path)), expected)


def test_what_changes_is_written_and_the_towers_are_not_touched(checkpoint, tmp_path):
    """In another dtype, too, and in several files."""
    folder = checkpoint("gemma3")
    model, params = load_model(str(folder))
    moved = jax.tree.map(lambda x: x + 0.1, params)
    source = hf.read_config(folder)
    hf.save_model(moved, model.config, source, tmp_path, base=folder, dtype="bfloat16", max_shard_bytes=50_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    before = load_file(folder / "model.safetensors")
    after = {name: x for path in tmp_path.glob("model-*") for name, x in load_file(path).items()}
    assert before.keys() == after.keys()
    for name, x in before.items():
        if name.startswith("language_model."):
            np.testing.assert_array_equal(after[name], (x + np.float32(0.1)).astype(jnp.bfloat16), err_msg=name)
        else:
            assert after[name].dtype == x.dtype
            np.testing.assert_array_equal(after[name], x, err_msg=name)


@pytest.mark.parametrize("prefix", ["language_model.model", "model.language_model", "model"])
def test_files_of_every_age_are_read_and_keep_their_names(prefix, checkpoint, tmp_path):
    """transformers has put the text stack at three places."""
    folder = checkpoint("qwen2_vl")
    expected = theirs(make_wrapped("qwen2_vl"))
    head = "language_model.lm_head" if prefix == "language_model.model" else "lm_head"
    tensors = {}
    for name, x in load_file(folder / "model.safetensors").items():
        new = f"{prefix}.{name.removeprefix('model.')}" if name.startswith("model.") else name
        tensors[new.replace("lm_head", head)] = x
    old = tmp_path / "old"
    old.mkdir()
    save_file(tensors, old / "model.safetensors")
    source = hf.read_config(folder)
    if prefix == "model":  # the first of them had the text's options beside the others
        source = {**source.pop("text_config"), **source, "model_type": "qwen2_vl"}
    (old / "config.json").write_text(json.dumps(source))
    model, params = load_model(str(old))
    close(logits(model, params), expected)
    hf.save_model(params, model.config, source, tmp_path / "again", base=old)
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize(
    ("kind", "key", "family"),
    [
        ("kimi_k25", "text_config", "deepseek_v3"),
        ("kimi_vl", "text_config", "deepseek_v3"),
        ("internvl_chat", "llm_config", "qwen2"),
    ],
)
def test_a_wrapper_as_it_is_published(kind, key, family, tmp_path):
    inner = make_model(family)
    inner.save_pretrained(tmp_path / "inner")
    config = json.loads((tmp_path / "inner" / "config.json").read_text())
    tensors = {f"language_model.{name}": x for name, x in load_file(tmp_path / "inner" / "model.safetensors").items()}
    tensors["vision_tower.patch_embed.proj.weight"] = np.ones((3, 2), np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, key: config, "dtype": "float32", **tied}))
    model, params = load_model(str(tmp_path))
    close(logits(model, params), theirs(inner))
    hf.save_model(params, model.config, hf.read_config(tmp_path), tmp_path / "again", base=tmp_path)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all((again[name] == x).all() and again[name].dtype == x.dtype for name, x in tensors.items())


def test_experts_in_one_tensor_are_read_where_the_family_has_one_each(checkpoint, tmp_path):
    folder = checkpoint("qwen3_5_moe")
    stored = load_file(folder / "model.safetensors")
    tensors = {name: x for name, x in stored.items() if ".experts." not in name}
    for layer in range(4):
        of = lambda part, layer=layer: np.stack(
            [stored[f"model.language_model.layers.{layer}.mlp.experts.{i}.{part}.weight"] for i in range(4)]
        )
        block = f"model.language_model.layers.{layer}.mlp.experts"
        tensors[f"{block}.gate_up_proj"] = np.concatenate([of("gate_proj"), of("up_proj")], axis=1)
        tensors[f"{block}.down_proj"] = of("down_proj")
    tensors["mtp.fc.weight"] = np.ones((2, 2), np.float32)  # guesses the next but one
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    ours, same = load_model(str(tmp_path)), load_model(str(folder))
    jax.tree.map(np.testing.assert_array_equal, ours[1], same[1])
    hf.save_model(ours[1], ours[0].config, hf.read_config(folder), tmp_path / "again", base=tmp_path)
    assert load_file(tmp_path / "again" / "model.safetensors")["mtp.fc.weight"].shape == (2, 2)


def test_towers_in_float8_are_not_written_beside_other_weights(checkpoint, tmp_path):
    folder = checkpoint("gemma3")
    tensors = load_file(folder / "model.safetensors")
    tower = "vision_tower.encoder.layers.0.mlp.fc1.weight"
    tensors[tower] = tensors[tower].astype(jnp.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model, params = load_model(str(tmp_path))
    with pytest.raises(ConfigError, match=rf"{tower} is float8"):
        hf.check_writable(params, model.config, tmp_path)


def test_a_tensor_without_a_place_is_still_an_error(checkpoint, tmp_path):
    folder = checkpoint("gemma3")
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.layers.0.self_attn.strange.weight"] = np.ones(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(DataError, match=r"self_attn\.strange\.weight has no place"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl_moe"])
def test_our_adapter_acts_the_same_in_peft(kind, checkpoint, tmp_path):
    """Its towers have modules of the same names, which get none."""
    peft = pytest.importorskip("peft")
    folder = checkpoint(kind)
    model, base = load_model(str(folder))
    targets = ["q_proj", "v_proj"] + (["down_proj"] if kind == "gemma3" else [])
    params = lora.add(base, targets, rank=4)
    mask, rng = adapter_mask(params), np.random.default_rng(6)
    moved = lambda x, trains: x + 0.05 * jnp.asarray(rng.standard_normal(x.shape), x.dtype) if trains else x
    params = jax.tree.map(moved, params, mask)
    save_adapter(params, mask, model.config, tmp_path, base=str(folder))
    adapted = peft.PeftModel.from_pretrained(make_wrapped(kind), tmp_path).eval()
    close(logits(model, params), theirs(adapted))
    names = {name for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert len(names) == 4 * len(targets)
    again, _ = load_adapter(base, model.config, str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_an_adapter_of_older_names_is_read(checkpoint, tmp_path):
    folder = checkpoint("gemma3")
    model, base = load_model(str(folder))
    params = lora.add(base, ["q_proj"], rank=4)
    mask = adapter_mask(params)
    params = jax.tree.map(lambda x, trains: x + 0.05 if trains else x, params, mask)
    save_adapter(params, mask, model.config, tmp_path, base=str(folder))
    path = tmp_path / "adapter_model.safetensors"
    old = {n.replace("model.language_model.", "language_model.model."): x for n, x in load_file(path).items()}
    save_file(old, path)
    again, _ = load_adapter(base, model.config, str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, again, params)
