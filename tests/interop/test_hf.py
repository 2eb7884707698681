"""Checkpoints: what is read is what is written, and what does not fit is named."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import CORE, ids, logits_of

from jtune.errors import DataError
from jtune.interop import hf
from jtune.models import CausalLM, abstract_params, logical_axes
from jtune.models.families import decoder_config
from jtune.sharding import make_mesh, tree_shardings
from jtune.tuning.freeze import cut_layers

torch = pytest.importorskip("torch")


def read(folder, **options):
    config = decoder_config(hf.read_config(folder))
    return config, hf.load_params(folder, config, **options)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_what_is_written_is_read_back_and_transformers_reads_it(family, shard_bytes, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    source = hf.read_config(checkpoint(family))
    config, params = read(checkpoint(family))
    hf.save_model(params, config, source, tmp_path, max_shard_bytes=shard_bytes)
    assert (len(list(tmp_path.glob("model-*.safetensors"))) > 1) == (shard_bytes < 10**9)
    assert_same(read(tmp_path)[1], params)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ours = np.asarray(CausalLM(config).apply({"params": params}, ids()))
    np.testing.assert_allclose(logits_of(model, ids()), ours, atol=1e-4)


def test_bfloat16_survives(checkpoint, tmp_path):
    source = hf.read_config(checkpoint("llama")) | {"dtype": "bfloat16"}
    config, params = read(checkpoint("llama"), dtype="bfloat16")
    hf.save_model(params, config, source, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == "bfloat16"
    assert_same(read(tmp_path)[1], params)


def test_layers_in_several_stacks_are_written_as_one_model(checkpoint, tmp_path):
    source = hf.read_config(checkpoint("mixtral"))
    config, params = read(checkpoint("mixtral"))
    hf.save_model(cut_layers(params, (1, 3)), config, source, tmp_path)
    assert_same(read(tmp_path)[1], params)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_each_device_reads_its_part(sizes, checkpoint):
    mesh = make_mesh(**sizes)
    config, whole = read(checkpoint("llama"))
    shardings = tree_shardings(logical_axes(config), abstract_params(config), mesh)
    _, parts = read(checkpoint("llama"), shardings=shardings)
    assert_same(parts, whole)
    kernel = parts["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


@pytest.fixture
def damaged(checkpoint, tmp_path):
    return shutil.copytree(checkpoint("llama"), tmp_path / "damaged")


def refused(folder):
    with pytest.raises(DataError) as error:
        read(folder)
    return str(error.value)


def test_every_tensor_that_does_not_fit_is_named_at_once(damaged):
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].copy()
    tensors["model.visual.weight"] = np.zeros(3, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int32)
    save_file(tensors, damaged / "model.safetensors")
    said = refused(damaged)
    assert "model.layers.2.self_attn.k_proj.weight is missing (expected shape [16, 32])" in said
    assert "model.norm.weight has shape [5], config.json says [32]" in said
    assert "model.visual.weight has no place" in said
    assert "lm_head.weight is I32" in said


def test_files_that_are_not_whole_are_named(damaged):
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "model.safetensors: not a complete safetensors file" in refused(damaged)
    (damaged / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refused(damaged)
    (damaged / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is a pickle" in refused(damaged)
    index = damaged / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors: the index names this file" in refused(damaged)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    assert "not a file of this folder" in refused(damaged)
    index.write_text("{}")
    assert "not an index" in refused(damaged)
    (damaged / "config.json").write_text("{")
    assert "config.json" in refused(damaged)
    (damaged / "config.json").unlink()
    assert "there is no such file" in refused(damaged)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        hf.fetch(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="the hub does not give it"):
        hf.fetch("nobody/nothing")
