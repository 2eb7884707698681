"""Reward models in files: torch scores what we write as we do, we read it back, and what does not fit is named."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from safetensors.numpy import load_file, save_file

from jtune.config import load_config
from jtune.errors import DataError, NonFiniteError
from jtune.interop.endings import Endings
from jtune.interop.value_head import FILE, read_value_head, save_value_head
from jtune.loading.model import load_model
from jtune.loading.source import read_source
from jtune.models.decoder import hidden_states
from jtune.models.value_head import draw_value_head, score, split_head
from jtune.sharding import make_mesh
from jtune.train.output import ModelFiles, check_writable, save_model
from jtune.tuning.show import tensor

IDS = np.arange(3, 19).reshape(2, 8)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A model whose embedding is its head, and one with a head of its own; neither has a value head."""
    folder = tmp_path_factory.mktemp("bases")
    return {tied: small.write_model(folder / str(tied), tie_word_embeddings=tied) for tied in (True, False)}


def arguments(base, **options):
    """The arguments of a run in stage rm."""
    given = {"model_name_or_path": base, "export_dir": "none", "template": "chatml", "do_train": True} | options
    config = load_config([f"{name}={value}" for name, value in given.items()], command="export")
    return replace(config, finetuning=replace(config.finetuning, stage="rm"))


def load(base, **options):
    """(source, model) of a run in stage rm."""
    source = read_source(arguments(base, **options))
    return source, load_model(source.config, source, make_mesh())


def moved(model, amount=0.05):
    """The parameters as if they had been trained: what trains is somewhere else."""
    leaves, structure = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    shift = lambda x, key, trains: x + amount * jax.random.normal(key, x.shape, x.dtype) if trains else x
    return jax.tree.unflatten(structure, map(shift, leaves, keys, jax.tree.leaves(model.mask)))


def write(folder, source, model, params):
    files = ModelFiles(source.config, source, model.mask, Endings(source.config_json, {}, ()))
    check_writable(params, files)
    save_model(folder, params, files)


def scores(model, params):
    hidden = hidden_states(model.module, params, jnp.asarray(IDS)).x
    return np.asarray(score(model.module, params, hidden))


def scores_in_torch(model, head):
    """As trl's model with a value head: the last hidden states, after the final norm, through a linear layer."""
    import torch
    from safetensors.torch import load_file

    found = load_file(head)
    linear = torch.nn.Linear(found["v_head.summary.weight"].shape[1], 1)
    linear.load_state_dict({name.removeprefix("v_head.summary."): x for name, x in found.items()})
    with torch.no_grad():
        hidden = model(torch.from_numpy(IDS), output_hidden_states=True).hidden_states[-1]
        return linear(hidden.float())[..., 0].numpy()


@pytest.mark.parametrize(("method", "tied"), [("full", True), ("freeze", False), ("lora", False)])
def test_torch_scores_what_is_written_as_we_do_and_it_is_read_back(method, tied, bases, tmp_path):
    pytest.importorskip("torch")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source, model = load(bases[tied], finetuning_type=method, freeze_trainable_layers=1)
    params = moved(model)
    write(tmp_path, source, model, params)
    theirs = AutoModelForCausalLM.from_pretrained(bases[tied] if method == "lora" else tmp_path)
    if method == "lora":
        theirs = PeftModel.from_pretrained(theirs, tmp_path)
    ours = scores(model, params)
    np.testing.assert_allclose(scores_in_torch(theirs, tmp_path / FILE), ours, atol=1e-5)
    if method == "lora":
        source, again = load(bases[tied], finetuning_type="lora", adapter_name_or_path=tmp_path)
    else:
        source, again = load(tmp_path, finetuning_type=method, freeze_trainable_layers=1)
    assert source.value_head == tmp_path
    jax.tree.map(np.testing.assert_array_equal, again.params["v_head"], params["v_head"])
    np.testing.assert_allclose(scores(again, again.params), ours, atol=1e-6)


def test_the_file_is_that_of_llama_factory(tmp_path):
    head = draw_value_head(8, jax.random.key(0))
    save_value_head(head, tmp_path)
    size = int.from_bytes((tmp_path / FILE).read_bytes()[:8], "little")
    header = json.loads((tmp_path / FILE).read_bytes()[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}
    found = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    assert found == {"v_head.summary.weight": ("F32", [1, 8]), "v_head.summary.bias": ("F32", [1])}
    jax.tree.map(np.testing.assert_array_equal, read_value_head(tmp_path, 8), head)
    with pytest.raises(NonFiniteError, match=r"v_head\.summary\.bias"):
        save_value_head({**head, "bias": np.full(1, np.nan, np.float32)}, tmp_path)


def test_the_head_of_the_last_adapter_counts_then_that_of_the_model_else_it_is_drawn(bases, tmp_path):
    names = ("model", "first", "last")
    heads = {name: draw_value_head(32, jax.random.key(i)) for i, name in enumerate(names)}
    small.write_model(tmp_path / "model")
    for name in ("first", "last"):
        source, model = load(bases[True], lora_target="q_proj")
        write(tmp_path / name, source, model, {**model.params, "v_head": heads[name]})
    save_value_head(heads["model"], tmp_path / "model")
    both = f"{tmp_path / 'first'},{tmp_path / 'last'}"

    def kernel(**options):
        return np.asarray(load(tmp_path / "model", **options)[1].params["v_head"]["kernel"])

    np.testing.assert_array_equal(kernel(adapter_name_or_path=both), heads["last"]["kernel"])
    (tmp_path / "last" / FILE).unlink()
    np.testing.assert_array_equal(kernel(adapter_name_or_path=both), heads["model"]["kernel"])
    np.testing.assert_array_equal(kernel(), heads["model"]["kernel"])
    (tmp_path / "model" / FILE).unlink()
    drawn = kernel(seed=3)
    np.testing.assert_array_equal(drawn, draw_value_head(32, jax.random.key(3))["kernel"])
    with pytest.raises(DataError, match=r"there is no value_head\.safetensors in .*model: its scores would be random"):
        load(tmp_path / "model", do_train=False)


@pytest.mark.slow
def test_no_value_head_is_left_where_another_model_takes_the_place_of_a_reward_model(bases, tmp_path):
    source, model = load(bases[True], lora_target="q_proj")
    write(tmp_path, source, model, model.params)
    assert (tmp_path / FILE).exists()
    (params, _), (mask, _) = split_head(model.params), split_head(model.mask)
    write(tmp_path, source, model._replace(mask=mask), params)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v_head.summary.weight": np.zeros((1, 16), np.float32)}, r"weight has shape \[1, 16\], expected \[1, 32\]"),
        ({"v_head.summary.bias": np.zeros(2, np.float32)}, r"bias has shape \[2\], expected \[1\]"),
        ({"v_head.summary.bias": np.zeros(1, np.int32)}, r"bias is I32; expected F32, BF16 or F16"),
        ({"v_head.summary.bias": np.full(1, np.inf, np.float32)}, r"bias is not finite"),
        ({"v_head.summary.bias": None}, r"bias is missing; it holds v_head\.summary\.weight"),
    ],
)
def test_a_file_that_is_not_of_this_model_is_refused(changes, message, tmp_path):
    save_value_head(draw_value_head(32, jax.random.key(0)), tmp_path)
    tensors = {**load_file(tmp_path / FILE), **changes}
    save_file({name: x for name, x in tensors.items() if x is not None}, tmp_path / FILE)
    with pytest.raises(DataError, match=message):
        read_value_head(tmp_path, 32)


def test_a_pickle_is_refused_with_the_way_to_convert_it_which_works(bases, tmp_path):
    torch = pytest.importorskip("torch")
    head = draw_value_head(32, jax.random.key(5))
    save_value_head(head, tmp_path)
    tensors = {name: torch.tensor(x) for name, x in load_file(tmp_path / FILE).items()}
    torch.save(tensors, tmp_path / "value_head.bin")
    (tmp_path / FILE).unlink()
    with pytest.raises(DataError, match="a pickle can run any code") as refused:
        read_value_head(tmp_path, 32)
    exec(str(refused.value).split('python -c "')[1].removesuffix('"'))
    jax.tree.map(np.testing.assert_array_equal, read_value_head(tmp_path, 32), head)


def test_only_what_a_score_depends_on_trains_and_the_head_is_float32(bases):
    for method in ("full", "lora"):
        _, model = load(bases[False], finetuning_type=method, pure_bf16=True)
        assert not any(jax.tree.leaves(model.mask["lm_head"]))
        assert all(jax.tree.leaves(model.mask["v_head"]))
        assert {x.dtype for x in jax.tree.leaves(model.params["v_head"])} == {jnp.dtype("float32")}
    _, quantized = load(bases[False], quantization_bit=8)
    assert quantized.params["v_head"]["kernel"].dtype == jnp.float32


def test_a_tensor_of_the_head_has_the_name_of_its_file(bases, tmp_path):
    _, model = load(bases[True])
    save_value_head(model.params["v_head"], tmp_path)
    for name, x in load_file(tmp_path / FILE).items():
        np.testing.assert_array_equal(tensor(model.module, model.params, name), x)


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_of_one_label_is_a_reward_model(tied, bases, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    theirs = AutoModelForSequenceClassification.from_pretrained(bases[tied], num_labels=1)
    theirs.save_pretrained(tmp_path)
    for path in bases[tied].glob("token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    source, model = load(tmp_path, finetuning_type="full", do_train=False)
    with torch.no_grad():
        expected = theirs.score(theirs.model(torch.from_numpy(IDS)).last_hidden_state)[..., 0].numpy()
    np.testing.assert_allclose(scores(model, model.params), expected, atol=1e-5)
    assert "lm_head" not in model.params
    # What is written of it is a causal model with a value head, which LLaMA-Factory and trl read.
    write(tmp_path / "written", source, model, model.params)
    written = json.loads((tmp_path / "written" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["tie_word_embeddings"]
    assert "id2label" not in written
    _, again = load(tmp_path / "written", finetuning_type="full", do_train=False)
    np.testing.assert_allclose(scores(again, again.params), expected, atol=1e-5)


def test_a_value_head_among_the_tensors_of_a_model_is_read_as_trl_saves_it(bases, tmp_path):
    head = draw_value_head(32, jax.random.key(4))
    save_value_head(head, shutil.copytree(bases[False], tmp_path / "trl"))
    tensors = load_file(tmp_path / "trl" / "model.safetensors") | load_file(tmp_path / "trl" / FILE)
    save_file(tensors, tmp_path / "trl" / "model.safetensors", {"format": "pt"})
    (tmp_path / "trl" / FILE).unlink()
    source, model = load(tmp_path / "trl", finetuning_type="full", do_train=False)
    jax.tree.map(np.testing.assert_array_equal, model.params["v_head"], head)
    write(tmp_path / "written", source, model, model.params)
    assert (
        load_file(tmp_path / "written" / "model.safetensors").keys()
        == load_file(bases[False] / "model.safetensors").keys()
    )


def test_a_classifier_of_two_labels_is_none(bases, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(bases[True], num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"score\.weight has shape \[2, 32\], expected \[1, 32\]\. A reward model has"):
        read_value_head(tmp_path, 32)
