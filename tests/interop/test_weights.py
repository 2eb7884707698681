"""Checkpoints without torch: how they are read in pieces, float8, what is wrong with files, how they are written."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small
from safetensors.numpy import load_file, save_file

from jtune.errors import DataError
from jtune.interop import hf, weights
from jtune.models import abstract_params, logical_axes
from jtune.models.families import decoder_config
from jtune.sharding import make_mesh, tree_shardings
from jtune.tuning import adapter_mask, lora

CONFIG = {**small.CONFIG, "vocab_size": 64, "tie_word_embeddings": False}
MIXTURE = {**CONFIG, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def random_params(config=CONFIG, dtype="float32"):
    decoder, rng = decoder_config(config), np.random.default_rng(0)
    draw = lambda x: rng.standard_normal(x.shape, np.float32).astype(jnp.dtype(dtype))
    return decoder, jax.tree.map(draw, abstract_params(decoder))


@pytest.fixture
def written(tmp_path):
    decoder, params = random_params()
    hf.save_model(params, decoder, CONFIG, tmp_path)
    return tmp_path


def read(folder, shardings=None, **options):
    decoder = decoder_config(hf.read_config(folder))
    return hf.load_params(folder, decoder, shardings=shardings, **options)


def split(decoder, **sizes):
    return tree_shardings(logical_axes(decoder), abstract_params(decoder), make_mesh(**sizes))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def refused(folder):
    with pytest.raises(DataError) as error:
        read(folder)
    return str(error.value)


# ---------------------------------------------------------------------- in pieces

MESHES = [{"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 4}]


@pytest.mark.parametrize(("sizes", "config"), [(None, CONFIG), (MESHES[0], CONFIG), (MESHES[1], MIXTURE)])
def test_read_in_pieces_of_any_size_it_is_the_same(sizes, config, tmp_path, monkeypatch):
    decoder, params = random_params(config)
    hf.save_model(params, decoder, config, tmp_path, max_shard_bytes=30_000)
    shardings = sizes and split(decoder, **sizes)
    made, seen = jax.make_array_from_callback, []
    spy = lambda shape, *rest: seen.append(math.prod(shape) * 4) or made(shape, *rest)
    for size in (9000, 10**9):  # a layer or two, or some rows; all
        seen.clear()
        monkeypatch.setattr(hf, "PIECE_BYTES", size)
        with monkeypatch.context() as patched:
            patched.setattr(jax, "make_array_from_callback", spy)
            loaded = read(tmp_path, shardings)
        assert_same(loaded, params)
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, loaded, shardings or loaded_on_first(params)))
        largest = max(x.nbytes // (len(x) if x.ndim > 2 else 1) for x in jax.tree.leaves(params["layers"]))
        if not (sizes and "tensor" in sizes):  # else the tables' rows are split already, and are not cut once more
            assert max(seen) <= max(size, largest) or size == 10**9


def loaded_on_first(params):
    return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), params)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("size", [9000, 10**9])
def test_nothing_is_read_twice_replicas_or_not(sizes, size, written, monkeypatch):
    taken = []
    monkeypatch.setattr(hf, "read_part", lambda *args: taken.append(x := weights.read_part(*args)) or x)
    monkeypatch.setattr(hf, "PIECE_BYTES", size)
    params = read(written, split(decoder_config(CONFIG), **sizes))
    assert sum(x.nbytes for x in taken) == sum(x.nbytes for x in jax.tree.leaves(params))


# ---------------------------------------------------------------------- float8


def block_scales(kernel, rng):
    return rng.uniform(0.01, 0.1, [-(-n // 128) for n in kernel.shape]).astype(np.float32)


def times_scales(kernel, scale):
    whole = np.kron(scale, np.ones((128, 128), np.float32)) if scale.size > 1 else scale
    return kernel.astype(np.float32) * (whole[: kernel.shape[0], : kernel.shape[1]] if scale.size > 1 else whole)


WIDE = {**CONFIG, "hidden_size": 192, "intermediate_size": 320, "head_dim": 72, "dtype": "bfloat16"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}


@pytest.fixture(params=["blocks", "tensors"])
def float8(request, tmp_path):
    """(folder, parameters in float32): kernels of layers in float8, the rest in bfloat16."""
    decoder, params = random_params(WIDE, "bfloat16")
    hf.save_model(params, decoder, WIDE, tmp_path / "plain")
    rng, tensors, expected = np.random.default_rng(1), load_file(tmp_path / "plain" / "model.safetensors"), {}
    for name, x in list(tensors.items()):
        expected[name] = x.astype(np.float32)
        if name.endswith("proj.weight"):
            tensors[name] = (x.astype(np.float32) * 20).astype(ml_dtypes.float8_e4m3fn)
            if request.param == "blocks":
                tensors[name + "_scale_inv"] = scale = block_scales(x, rng)
            else:
                tensors[name + "_scale"] = scale = np.array(rng.uniform(0.01, 0.1), np.float32)
                tensors[name.replace("weight", "input_scale")] = np.ones((), np.float32)
            expected[name] = times_scales(tensors[name], scale)
    folder = tmp_path / "float8"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    options = FP8 if request.param == "blocks" else {"quant_method": "fp8", "activation_scheme": "static"}
    (folder / "config.json").write_text(json.dumps(WIDE | {"quantization_config": options}))
    save_file(expected, tmp_path / "plain" / "model.safetensors")
    return folder, read(tmp_path / "plain", dtype="float32")


@pytest.mark.parametrize("sizes", [None, MESHES[0]])
def test_float8_is_read_as_the_numbers_it_stands_for(float8, sizes):
    folder, expected = float8
    shardings = sizes and split(decoder_config(WIDE), **sizes)  # whose borders are not those of the blocks
    assert_same(read(folder, shardings, dtype="float32"), expected)
    loaded = read(folder, shardings)
    assert {x.dtype.name for x in jax.tree.leaves(loaded)} == {"bfloat16"}
    assert_same(loaded, jax.tree.map(lambda x: x.astype("bfloat16"), expected))


def test_what_was_float8_is_written_as_it_was_read(float8, tmp_path):
    folder, _ = float8
    loaded, source = read(folder), hf.read_config(folder)
    hf.save_model(loaded, decoder_config(source), source, tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert_same(read(tmp_path / "again"), loaded)


def test_scales_that_do_not_fit_are_named(tmp_path, written):
    tensors = load_file(written / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        if "k_proj" in name:
            tensors[name + "_scale_inv"] = np.ones((3, 2), np.float32)
        if "v_proj" in name:
            tensors[name + "_scale"] = np.ones((), np.int32)
    save_file(tensors, written / "model.safetensors")
    said = refused(written)
    assert "model.layers.{0-2}.self_attn.q_proj.weight (3 of them) is float8 and has no weight_scale_inv" in said
    assert "k_proj.weight (3 of them) is float8, its scale has shape [3, 2]; expected one for each 128x128" in said
    assert "v_proj.weight (3 of them) is float8, its scale is I32" in said


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        (FP8 | {"weight_block_size": [64, 128]}, "64, 128"),
        (FP8 | {"fmt": "e5m2"}, "e5m2"),
    ],
)
def test_quantisation_that_is_not_read_is_refused_by_name(options, word, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": options}))
    with pytest.raises(DataError, match=rf"config\.json: .*{word}.*; jtune reads bfloat16"):
        hf.read_config(tmp_path)


# ---------------------------------------------------------------------- what is wrong with files


def test_all_faults_are_named_at_once_those_of_many_layers_in_one_line(written):
    tensors = load_file(written / "model.safetensors")
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
        tensors[f"model.visual.{layer}.norm"] = np.zeros(3, np.float32)
    for kind in ("input", "post_attention"):
        name = f"model.layers.1.{kind}_layernorm.weight"
        tensors[name] = tensors[name][:5].copy()
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    save_file(tensors, written / "model.safetensors")
    assert sorted(line.strip() for line in refused(written).splitlines()[1:]) == [
        "lm_head.weight is missing (expected shape [64, 32])",
        "model.layers.1.input_layernorm.weight has shape [5], config.json says [32]",
        "model.layers.1.post_attention_layernorm.weight has shape [5], config.json says [32]",
        "model.layers.{0-2}.mlp.up_proj.weight (3 of them) is missing (expected shape [64, 32])",
        "model.layers.{0-2}.self_attn.q_proj.bias (3 of them) has no place in this model (model_type llama)",
        "model.norm.weight is missing (expected shape [32])",
        "model.visual.{0-2}.norm (3 of them) has no place in this model (model_type llama)",
    ]


def test_names_are_joined_by_their_numbers():
    assert weights.grouped(["a.0.b", "c", "a.1.b", "a.2.b", "a.5.b"]) == ["a.{0-2,5}.b (4 of them)", "c"]
    assert weights.grouped(f"l.{i}.e.{j}.w" for i in range(2) for j in range(4)) == ["l.{0-1}.e.{0-3}.w (8 of them)"]
    assert weights.grouped(["l.1.e.7.w", "l.2.e.7.w"]) == ["l.{1-2}.e.7.w (2 of them)"]


@pytest.fixture
def sharded(tmp_path):
    decoder, params = random_params()
    hf.save_model(params, decoder, CONFIG, tmp_path, max_shard_bytes=30_000)
    return tmp_path, params


def test_an_index_that_says_what_files_do_not_hold(sharded):
    folder, _ = sharded
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = [name for name, file in index["weight_map"].items() if "-00001-of" in file]
    first, last = names[0], sorted(folder.glob("*.safetensors"))[-1]
    index["weight_map"] |= {first: last.name, "model.more.weight": last.name}
    path.write_text(json.dumps(index))
    said = refused(folder)
    assert f"{last}: {first} is not in it" in said
    assert f"{last}: model.more.weight is not in it" in said


def test_of_two_tensors_with_one_name_the_index_says_which(sharded):
    folder, params = sharded
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name, file in index.items() if "-00001-of" in file)
    last = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(last)
    right = load_file(folder / index[name])[name]
    save_file(tensors | {name: right + 1}, last)
    assert_same(read(folder), params)


def test_all_files_that_are_missing_or_cut_short_are_named(sharded):
    folder, _ = sharded
    first, second, third = sorted(folder.glob("*.safetensors"))[:3]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    third.write_bytes(b"")
    said = refused(folder)
    assert f"{first}: the index names this file, but it is not there" in said
    assert f"{second}: not a complete safetensors file" in said
    assert f"{third}: not a complete safetensors file" in said


def test_pickles_are_refused_with_the_way_out(written):
    weight = written / "model.safetensors"
    weight.rename(written / "pytorch_model-00001-of-00001.bin")
    (written / "pytorch_model.bin.index.json").write_text("{}")
    said = refused(written)
    assert "neither model.safetensors nor" in said
    assert "pytorch_model-00001-of-00001.bin is a pickle" in said
    assert f"from_pretrained('{written}', dtype='auto', trust_remote_code=False).save_" in said
    assert f".save_pretrained('{written}-safetensors')" in said
    index = {"weight_map": {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}}
    (written / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names pytorch_model-00001-of-00001.bin; expected safetensors. pytorch_model" in refused(written)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({}, "not an index"),
        ({"weight_map": []}, "not an index"),
        ({"weight_map": {"a": 1}}, "not an index"),
        ({"weight_map": {}}, "names no files"),
        (
            {"weight_map": {"a": "../x.safetensors", "b": "/y.safetensors"}},
            "names '../x.safetensors', '/y.safetensors'",
        ),
    ],
)
def test_what_is_no_index_is_refused(content, word, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    assert word in refused(tmp_path)


# ---------------------------------------------------------------------- written


@pytest.mark.parametrize(
    ("config", "dtype", "shard_bytes"),
    [(CONFIG, "float32", 20_000), (CONFIG, "float16", 1), (MIXTURE, "bfloat16", 10**9)],
)
def test_what_is_written_in_shards_is_read_back(config, dtype, shard_bytes, tmp_path):
    decoder, params = random_params(config, dtype)
    params = jax.tree.map(jax.device_put, params, split(decoder, fsdp=8))
    hf.save_model(params, decoder, config, tmp_path, max_shard_bytes=shard_bytes, dtype=dtype)
    assert_same(read(tmp_path), params)
    files = sorted(tmp_path.glob("*.safetensors"))
    held = {name: x for file in files for name, x in load_file(file).items()}  # by the library
    assert all(x.dtype == dtype for x in held.values())
    assert sum(x.nbytes for x in held.values()) == sum(x.nbytes for x in jax.tree.leaves(params))
    if shard_bytes == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in held.values())
    for file in files:
        assert len(load_file(file)) == 1 or sum(x.nbytes for x in load_file(file).values()) <= shard_bytes


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    decoder, params = random_params()
    made, written = [], []
    in_file = hf._in_file
    monkeypatch.setattr(hf, "_in_file", lambda *args: made.append(1) or in_file(*args))
    contiguous = np.ascontiguousarray
    monkeypatch.setattr(np, "ascontiguousarray", lambda *a: written.append(len(made)) or contiguous(*a))
    hf.save_model(params, decoder, CONFIG, tmp_path)
    assert written == list(range(1, len(written) + 1))


def test_adapters_are_merged_in_float32_and_rounded_once(tmp_path):
    decoder, params = random_params(dtype="bfloat16")
    rng = np.random.default_rng(3)

    def adapted(params, scale):
        nodes = lora.add(params, "q_proj,up_proj", rank=2, alpha=scale)
        fill = lambda x, trains: jnp.asarray(rng.standard_normal(x.shape), x.dtype) if trains else x
        return jax.tree.map(fill, nodes, adapter_mask(nodes))

    one = adapted(params, 0.01)
    kernel = one["layers"]["mlp"]["up_proj"]["kernel"]
    more = lora.LoRA(kernel, kernel.a * 2, kernel.b, 0.5)  # an adapter on an adapter
    one["layers"]["mlp"]["up_proj"]["kernel"] = more
    base, a, b = (np.asarray(x, np.float64) for x in (kernel.base, kernel.a, kernel.b))
    expected = base + a @ b * (0.005 + 1.0)
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 2**-8)):
        hf.save_model(one, decoder, CONFIG, tmp_path, dtype=dtype)
        found = np.asarray(read(tmp_path)["layers"]["mlp"]["up_proj"]["kernel"], np.float64)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance / 8)


def test_a_save_that_fails_leaves_what_was_there(sharded, monkeypatch):
    folder, params = sharded
    decoder, other = decoder_config(CONFIG), jax.tree.map(lambda x: x + 1, params)
    before = sorted(path.name for path in folder.iterdir())
    calls, in_file = [], hf._in_file

    def breaks(*args):
        calls.append(1)
        if len(calls) > 5:
            raise OSError("No space left on device")
        return in_file(*args)

    monkeypatch.setattr(hf, "_in_file", breaks)
    with pytest.raises(OSError, match="No space"):
        hf.save_model(other, decoder, CONFIG, folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert_same(read(folder), params)


def test_a_save_that_is_killed_while_names_change_does_not_look_complete(sharded, monkeypatch):
    folder, params = sharded
    replace, done = Path.replace, []

    def killed(self, target):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(target)
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            hf.save_model(params, decoder_config(CONFIG), CONFIG, folder, max_shard_bytes=30_000)
    assert not (folder / "config.json").exists()
    hf.save_model(params, decoder_config(CONFIG), CONFIG, folder, max_shard_bytes=50_000)
    assert_same(read(folder), params)
