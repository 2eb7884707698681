"""`jtune export`: what is in the folder, what is told of it, and that half of it never looks like all of it."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import small
import yaml
from safetensors.numpy import load_file, save_file

from jtune.cli.main import main
from jtune.interop import hf, peft, serving
from jtune.loading.inference import load_model
from jtune.models.families import decoder_config
from jtune.tuning import adapter_mask, lora


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = small.write_model(tmp_path_factory.mktemp("base"), dtype="bfloat16")
    (folder / "generation_config.json").write_text('{"top_k": 7}')
    return folder


def write_adapter(folder, base, targets, seed):
    decoder = decoder_config(hf.read_config(base))
    params, rng = lora.add(hf.load_params(base, decoder), targets, rank=2), np.random.default_rng(seed)
    draw = lambda x, trains: rng.standard_normal(x.shape, np.float32) if trains else x
    params = jax.tree.map(draw, params, adapter_mask(params))
    peft.save_adapter(params, adapter_mask(params), decoder, folder, base=str(base))
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / "a", base, "q_proj,up_proj", 1), write_adapter(folder / "b", base, "q_proj", 2)]


def export(tmp_path, base, adapters=(), **options):
    asked = {"model_name_or_path": str(base), "finetuning_type": "lora", "export_dir": str(tmp_path / "out")}
    if adapters:
        asked["adapter_name_or_path"] = ",".join(map(str, adapters))
    (tmp_path / "case.yaml").write_text(yaml.safe_dump(asked | options))
    return main(["export", str(tmp_path / "case.yaml")])


def test_a_head_of_its_own_is_read_as_transformers_does_and_written(base, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    own = tmp_path / "own"
    shutil.copytree(base, own)
    tensors = load_file(own / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    ids = np.arange(8)[None]
    ask = lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
        torch.tensor(ids)
    )
    model, params = load_model(str(own))
    expected = model.apply({"params": params}, ids)
    np.testing.assert_allclose(expected, ask(own).logits.detach(), atol=1e-4)
    assert export(tmp_path, own, infer_dtype="float32") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_allclose(expected, ask(tmp_path / "out").logits.detach(), atol=1e-4)


def told(capsys):
    said = "".join(capsys.readouterr())
    found = re.search(r"differ by at most (\S+) from .*; the largest logit is (\S+)", said)
    assert found, said
    return float(found[1]), float(found[2])


def test_two_adapters_are_merged_and_the_difference_is_told(base, adapters, tmp_path, capsys):
    assert export(tmp_path, base, adapters) == 0
    difference, largest = told(capsys)
    decoder = decoder_config(hf.read_config(base))
    params = hf.load_params(base, decoder)
    for adapter in adapters:
        params, _ = peft.load_adapter(params, decoder, str(adapter))
    model, merged = load_model(str(tmp_path / "out"))
    ids = np.linspace(0, decoder.vocab_size - 1, 32).astype(np.int32)[None]
    before, after = (np.asarray(model.apply({"params": p}, ids)) for p in (params, merged))
    assert largest == pytest.approx(abs(before).max(), rel=1e-2)
    assert difference == pytest.approx(abs(after - before).max(), rel=1e-2)
    assert 0 < difference < 0.1 * largest  # of rounding to bfloat16; without the second adapter it is more
    one, _ = peft.load_adapter(hf.load_params(base, decoder), decoder, str(adapters[0]))
    assert abs(np.asarray(model.apply({"params": one}, ids)) - before).max() > 10 * difference
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "jtune.json"} <= names
    assert json.loads((tmp_path / "out" / "jtune.json").read_text())["adapters"] == list(map(str, adapters))
    assert {x.dtype.name for x in load_file(tmp_path / "out" / "model.safetensors").values()} == {"bfloat16"}


def test_in_float32_nothing_is_lost(base, adapters, tmp_path, capsys):
    assert export(tmp_path, base, adapters, infer_dtype="float32") == 0
    difference, largest = told(capsys)
    assert difference < 1e-4 * largest
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_without_adapters_the_base_is_written_as_it_is(base, tmp_path, capsys):
    assert export(tmp_path, base) == 0
    assert told(capsys)[0] == 0
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)


def test_an_export_that_is_cut_short_leaves_what_was_there(base, adapters, tmp_path, monkeypatch):
    in_file, calls = hf._in_file, []

    def cut(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return in_file(*args)

    with monkeypatch.context() as patched:
        patched.setattr(hf, "_in_file", cut)
        assert export(tmp_path, base, adapters) == 130
    assert list((tmp_path / "out").iterdir()) == []
    assert export(tmp_path, base) == 0
    calls.clear()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(hf, "_in_file", cut)
        assert export(tmp_path, base, adapters) == 130
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_tokenizer_keeps_its_chat_template(tmp_path):
    base = small.write_model(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert export(tmp_path, base) == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def test_the_folder_holds_what_servers_read_and_the_last_lines_say_what_to_type(base, adapters, tmp_path, capsys):
    """By what vLLM, SGLang and llama.cpp document: files, names and dtypes of tensors, one chat template."""
    assert export(tmp_path, base, adapters[:1], template="chatml") == 0
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "Modelfile"} <= names
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    written = "chat_template.jinja" in names, "chat_template" in json.loads((out / "tokenizer_config.json").read_text())
    assert sum(written) == 1
    tensors = load_file(out / "model.safetensors")
    assert {x.dtype.name for x in tensors.values()} == {"bfloat16"}
    assert {re.sub(r"layers\.\d+", "layers.N", name) for name in tensors} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(f"model.layers.N.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"model.layers.N.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        *(f"model.layers.N.{name}_layernorm.weight" for name in ("input", "post_attention")),
    }
    modelfile = (out / "Modelfile").read_text()
    assert modelfile.startswith('FROM .\nTEMPLATE """{{ if .System }}<|im_start|>system')
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    said = capsys.readouterr().out
    assert f"vllm serve {out}\n" in said
    assert f"ollama create out -f {out / 'Modelfile'}" in said


def test_weights_in_several_files_have_an_index_that_names_each_tensor_once(base, tmp_path):
    decoder, config = decoder_config(hf.read_config(base)), hf.read_config(base)
    hf.save_model(hf.load_params(base, decoder), decoder, config, tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    held = {name: file for file in files for name in load_file(tmp_path / file)}
    assert index["weight_map"] == held
    assert held.keys() == load_file(base / "model.safetensors").keys()


def test_an_adapter_has_the_keys_that_vllm_parses_and_the_rank_that_it_reads(base, adapters):
    """base_model.model.NAME.lora_A.weight [r, in] and lora_B [out, r], for modules of target_modules only."""
    options = json.loads((adapters[0] / "adapter_config.json").read_text())
    assert serving.adapter_faults(options) == []
    assert (options["r"], options["target_modules"], options["bias"]) == (2, ["q_proj", "up_proj"], "none")
    assert options["base_model_name_or_path"] == str(base)
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    for name, x in tensors.items():
        found = re.fullmatch(r"base_model\.model\.model\.layers\.\d+\.\w+\.(\w+)\.lora_(A|B)\.weight", name)
        assert found is not None, name
        assert found[1] in options["target_modules"]
        assert x.shape[0 if found[2] == "A" else 1] == 2
