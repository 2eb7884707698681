"""A run with new tokens: what it trains, saves, resumes and plans; and that others load what it leaves."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import small
import yaml
from safetensors.numpy import load_file

import jtune
from jtune.commands import export
from jtune.commands.train import train
from jtune.config import load_config
from jtune.data import load_tokenizer
from jtune.errors import CheckpointError, ConfigError, DataError
from jtune.loading.inference import load
from jtune.loading.vocabulary import resolve_vocabulary
from jtune.models.families import decoder_config
from jtune.planning import plan
from jtune.train import program
from jtune.train.program import lower_step

NEW = {"<d>": "the date", "</d>": "end of the date"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model with two tables, data whose answers stand between new tokens, the tokens' descriptions)."""
    folder = tmp_path_factory.mktemp("made")
    rows = [{**row, "output": f"<d>{row['output']}</d>"} for row in small.rows()]
    tokens = folder / "tokens.yaml"
    tokens.write_text(yaml.safe_dump(NEW, sort_keys=False))
    model = small.write_model(folder / "model", num_hidden_layers=4, tie_word_embeddings=False)
    return model, small.write_data(folder / "data", tagged=rows), tokens


def configure(tmp_path: Path, made, command="train", **changes):
    model, data, tokens = made
    changes = {
        "dataset": "tagged",
        "finetuning_type": "lora",
        "new_special_tokens_config": str(tokens),
        "max_steps": 4,
        "save_steps": 2,
        "eval_strategy": "no",
        "val_size": 0,
        "mesh_fsdp": -1,
        "per_device_train_batch_size": 1,
    } | changes
    return load_config([str(small.case(tmp_path, model, data, **changes))], command=command)


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """The folder of a finished LoRA run of four updates."""
    folder = tmp_path_factory.mktemp("lora")
    train(configure(folder, made))
    return folder / "out"


def test_new_tokens_are_trained_and_saved_beside_the_adapter(made, trained):
    tokenizer = load_tokenizer(str(trained))
    before = load_tokenizer(str(made[0]))
    assert tokenizer.convert_tokens_to_ids(list(NEW)) == [len(before), len(before) + 1]
    options = json.loads((trained / "adapter_config.json").read_text())
    assert options["modules_to_save"] == ["embed_tokens", "lm_head"]
    saved, base = load_file(trained / "adapter_model.safetensors"), load_file(made[0] / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table, was = saved[f"base_model.model.{name}"], base[name]
        assert table.shape == (384, 32)
        assert len(was) < 384
        assert not np.array_equal(table[: len(was)], was)  # trained, too


def test_peft_gives_our_logits_for_it(made, trained):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(made[0])
    base.resize_token_embeddings(384)
    there = peft.PeftModel.from_pretrained(base, trained).eval()
    ids = np.random.default_rng(0).integers(0, 384, (2, 20)).astype(np.int32)
    model, params = jtune.load_model(str(made[0]), adapter=str(trained))
    with torch.no_grad():
        expected = there(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(np.asarray(model.apply({"params": params}, ids)), expected, atol=1e-4)


def test_resumed_is_uninterrupted(made, trained, tmp_path):
    again = tmp_path / "again"
    train(configure(tmp_path, made, output_dir=str(again), resume_from_checkpoint=str(trained / "checkpoint-2")))
    assert small.curve(again) == small.curve(trained)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (trained, again))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_another_vocabulary_does_not_go_on_from_its_checkpoint(made, trained, tmp_path):
    changes = {"output_dir": str(tmp_path), "resume_from_checkpoint": str(trained / "checkpoint-2")}
    with pytest.raises(CheckpointError, match=r"new_special_tokens_config: .*tokens.yaml then, None now"):
        train(configure(tmp_path, made, new_special_tokens_config=None, **changes))


def test_chat_export_and_python_take_the_adapters_vocabulary(made, trained, tmp_path):
    """Without being told of the tokens again; and the same with them."""
    path = tmp_path / "export.yaml"
    content = {"model_name_or_path": str(made[0]), "adapter_name_or_path": str(trained), "template": "chatml"}
    path.write_text(yaml.safe_dump(content | {"export_dir": str(tmp_path / "whole")}))
    export.export(load_config([str(path)], command="export"))
    source = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert source["vocab_size"] == 384
    asked = load(load_config([str(path)], command="chat"))
    told = load(configure(tmp_path, made, "chat", output_dir=str(trained), num_train_epochs=1.0))
    for loaded in (asked, told):
        assert loaded.tokenizer.convert_tokens_to_ids("</d>") == len(loaded.tokenizer) - 1
    ids = np.arange(330, 370, dtype=np.int32)[None]
    model, params = jtune.load_model(str(tmp_path / "whole"))
    expected = np.asarray(model.apply({"params": params}, ids))
    for loaded in (asked, told):
        apply = jax.jit(loaded.model.apply)
        np.testing.assert_allclose(np.asarray(apply({"params": loaded.params}, ids)), expected, atol=1e-5)


def test_training_goes_on_from_it(made, trained, tmp_path):
    config = configure(tmp_path, made, adapter_name_or_path=str(trained), new_special_tokens_config=None, max_steps=1)
    train(config)
    options = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert options["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert small.state(tmp_path / "out")["log_history"][0]["loss"] < small.state(trained)["log_history"][0]["loss"]
    more = configure(tmp_path, made, adapter_name_or_path=str(trained), add_tokens=[f"t{i}" for i in range(40)],
                     new_special_tokens_config=None, overwrite_output_dir=True)  # fmt: skip
    with pytest.raises(ConfigError, match=r"holds 384 rows.*export"):
        train(more)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"finetuning_type": "full", "init_special_tokens": "desc_init"}, marks=pytest.mark.slow),
        {"finetuning_type": "freeze", "freeze_trainable_layers": 2, "use_llama_pro": True},
        pytest.param({"freeze_trainable_layers": 2, "use_llama_pro": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_planned_is_what_is_trained(changes, made, tmp_path, monkeypatch):
    seen = []
    lower = lower_step

    def record(program, batch, label_capacity):
        leaves = jax.tree_util.tree_leaves_with_path((program.state, program.constants))
        seen.append([(jax.tree_util.keystr(path), x.shape, x.dtype, x.sharding) for path, x in leaves])
        return lower(program, batch, label_capacity)

    monkeypatch.setattr(program, "lower_step", record)
    plan.plan(configure(tmp_path, made, "plan", **changes))
    train(configure(tmp_path, made, max_steps=1, save_strategy="no", **changes))
    assert seen[0] == seen[1]
    assert any("384" in str(shape) for _, shape, _, _ in seen[0])
    out = tmp_path / "out"
    if changes.get("finetuning_type"):
        pytest.importorskip("torch")
        from transformers import AutoModelForCausalLM

        there = AutoModelForCausalLM.from_pretrained(out)
        assert there.get_input_embeddings().weight.shape == (384, 32)
        assert there.config.vocab_size == 384
    else:
        targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
        assert {name.split(".")[2] for name in targets} == {"1", "3"}


def test_tokens_without_rows_are_refused_with_what_to_set(made, tmp_path):
    """Stop words of another model's template, for instance."""
    config = configure(tmp_path, made, new_special_tokens_config=None, template="llama3")
    with pytest.raises(DataError, match="resize_vocab: true gives the model rows"):
        train(config)
    source = json.loads((made[0] / "config.json").read_text())
    wide = configure(tmp_path, made, new_special_tokens_config=None, template="llama3", resize_vocab=True)
    found = resolve_vocabulary(wide, made[0], decoder_config(source))
    assert found.decoder.vocab_size == 384
    assert found.config.finetuning.additional_target == ("embed_tokens", "lm_head")
    assert "<|eom_id|>" in found.tokenizer.get_vocab()
