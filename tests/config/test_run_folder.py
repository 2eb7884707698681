"""A folder in the place of a case: which model it holds, and what is known of how it was trained."""

import json

import pytest

from jtune.config import load_config
from jtune.config.run_folder import trained_folder
from jtune.errors import ConfigError

ADAPTER, MODEL = "adapter_config.json", "config.json"


def write(folder, name, **content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def manifest(folder, **arguments):
    return write(folder, "jtune.json", arguments=load_config(["model_name_or_path=b"], "chat").to_dict() | arguments)


def test_a_run_with_an_adapter_gives_its_base_and_its_template(tmp_path):
    run = write(tmp_path / "run", ADAPTER, base_model_name_or_path="other")
    manifest(
        run, template="llama3", finetuning_type="lora", do_train=True, lora_rank=4, default_system="${x} a: b",
        hf_hub_token="<HF_HUB_TOKEN>", quantization_bit=4, temperature=0.1, pissa_init=True,
    )  # fmt: skip
    config = load_config([str(run), "top_p=0.5"], "chat")
    assert config.model.model_name_or_path == "b"
    assert config.model.adapter_name_or_path == (str(run),)
    assert config.model.hf_hub_token is None
    assert (config.data.template, config.data.default_system) == ("llama3", "${x} a: b")
    assert (config.generating.temperature, config.generating.top_p) == (0.1, 0.5)
    assert config.model.quantization_bit == 4
    assert not config.training.do_train
    assert config.notes == ()
    assert config.origins["template"] == str(run)
    exported = load_config([str(run), "export_dir=e"], "export")
    assert (exported.model.export_dir, exported.model.quantization_bit) == ("e", None)


@pytest.mark.parametrize(("create_new", "kept"), [(False, ["a"]), (True, ["a", "b"])])
def test_adapters_that_were_merged_before_training_are_merged_again(create_new, kept, tmp_path):
    run = write(tmp_path, ADAPTER)
    manifest(run, adapter_name_or_path=["a", "b"], create_new_adapter=create_new)
    assert load_config([str(run)], "chat").model.adapter_name_or_path == (*kept, str(run))


def test_a_model_is_its_own_base(tmp_path):
    run = write(tmp_path, MODEL)
    manifest(run, finetuning_type="full", train_from_scratch=True, model_name_or_path="b")
    config = load_config([str(run)], "chat")
    assert (config.model.model_name_or_path, config.model.adapter_name_or_path) == (str(run), ())
    assert (config.finetuning.finetuning_type, config.model.train_from_scratch) == ("full", False)


def test_what_another_program_has_written_is_read_too(tmp_path):
    model, adapter = write(tmp_path / "m", MODEL), write(tmp_path / "a", ADAPTER, base_model_name_or_path="hub/base")
    assert load_config([str(model)], "chat").model.model_name_or_path == str(model)
    config = load_config([str(adapter)], "eval")
    assert (config.model.model_name_or_path, config.model.adapter_name_or_path) == ("hub/base", (str(adapter),))
    with pytest.raises(ConfigError, match="names no base model"):
        load_config([str(write(tmp_path / "n", ADAPTER))], "chat")


def test_a_run_that_was_cut_short_gives_its_newest_checkpoint(tmp_path):
    for step in (2, 10, 9):
        manifest(write(tmp_path / f"checkpoint-{step}", ADAPTER), template="qwen")
    write(tmp_path / "checkpoint-11.tmp", ADAPTER)
    write(tmp_path / "checkpoint-12", "resume.json")
    newest = tmp_path / "checkpoint-10"
    config = load_config([str(tmp_path)], "chat")
    assert config.model.adapter_name_or_path == (str(newest),)
    assert config.data.template == "qwen"
    assert config.notes == (f"{tmp_path} holds a run that has not finished: this is its checkpoint-10",)
    write(tmp_path, ADAPTER)  # of an earlier run, while run.json says that this one goes on
    write(tmp_path, "run.json", finished=False)
    assert trained_folder(tmp_path, ADAPTER) == newest
    write(tmp_path, "run.json", finished=True)
    assert trained_folder(tmp_path, ADAPTER) == tmp_path
    (tmp_path / "run.json").write_text("[")
    assert trained_folder(tmp_path, ADAPTER) == tmp_path


@pytest.mark.parametrize("text", ["[]", "{", '{"arguments": {"template": 3}}', '{"arguments": []}'])
def test_a_damaged_manifest_is_named(text, tmp_path):
    write(tmp_path, MODEL)
    (tmp_path / "jtune.json").write_text(text)
    if text == '{"arguments": []}':
        assert load_config([str(tmp_path)], "chat").data.template is None
        return
    if "template" in text:
        assert load_config([str(tmp_path)], "chat").data.template == "3"  # as in a case: a number is read as text
        return
    with pytest.raises(ConfigError, match=r"jtune\.json"):
        load_config([str(tmp_path)], "chat")


def test_an_empty_folder_and_a_command_that_takes_none_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no model"):
        load_config([str(tmp_path)], "chat")
    with pytest.raises(ConfigError, match=r"is a folder; expected a \.yaml"):
        load_config([str(write(tmp_path, MODEL))], "train")
