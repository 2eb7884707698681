"""What is given is what arrives: files, overrides and flags, with their types and their lines."""

from itertools import pairwise

import pytest

from jtune.config import load_config
from jtune.errors import ConfigError

CLASSIC = (
    "--stage sft --do_train --model_name_or_path X --dataset a,b --template default --finetuning_type lora "
    "--lora_target q_proj,v_proj --output_dir O --overwrite_cache --per_device_train_batch_size 4 "
    "--gradient_accumulation_steps 4 --lr_scheduler_type cosine --logging_steps 10 --save_steps 1000 "
    "--learning_rate 5e-5 --num_train_epochs 3.0 --plot_loss --fp16"
)
CASE = "model_name_or_path: m\ndataset: a\ndo_train: true\n"


@pytest.fixture
def case(tmp_path, monkeypatch):
    """`case(text, *words)`: the configuration of a file `case.yaml` with that text, followed by those words."""
    monkeypatch.chdir(tmp_path)

    def load(text, *words, name="case.yaml", command="train"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return load_config([name, *words], command=command)

    return load


def refused(load, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as error:
        load(*args, **kwargs)
    return str(error.value)


def test_the_classic_line_of_flags_is_read():
    config = load_config(CLASSIC.split())
    assert config.data.dataset == ("a", "b")
    assert config.finetuning.lora_target == ("q_proj", "v_proj")
    assert config.training.learning_rate == 5e-5
    assert isinstance(config.training.num_train_epochs, float)
    assert (config.training.do_train, config.training.fp16, config.training.bf16) == (True, True, False)
    assert (config.finetuning.plot_loss, config.data.overwrite_cache) == (True, True)


def test_yaml_json_overrides_and_flags_give_the_same(case):
    text = "model_name_or_path: m\ndataset: [a, b]\ndo_train: true\nlearning_rate: 1e-5\n"
    json = '{"model_name_or_path": "m", "dataset": ["a", "b"],\n\t"do_train": true, "learning_rate": 1e-5}'
    wanted = case(text).to_dict()
    assert case(json, name="case.json").to_dict() == wanted
    words = ["model_name_or_path=m", "dataset=[a,b]", "do_train=yes", "learning_rate=1e-5"]
    assert load_config(words).to_dict() == wanted
    flags = ["--model-name-or-path=m", "--dataset", "a,b", "--do_train", "--learning-rate", "1e-5"]
    assert load_config(flags).to_dict() == wanted
    assert (
        case("model_name_or_path: m\ndataset: x", "dataset=a,b", "--do_train", "learning_rate=1e-5").to_dict() == wanted
    )


@pytest.mark.parametrize("words", [["do_train=1"], ["--do_train", "True"], ["--do_train"], ["--do-train=y"]])
def test_booleans_have_many_spellings(words):
    assert load_config(["model_name_or_path=m", "dataset=a", *words]).training.do_train is True


def test_a_bare_flag_does_not_swallow_the_next_word(case):
    assert "'junk' is neither an argument" in refused(case, CASE, "--bf16", "junk")
    assert "--lora_rank needs a value" in refused(case, CASE, "--lora_rank", "--bf16")
    assert case(CASE, "--no_do_train", "--do_eval", "--eval_dataset", "b").training.do_train is False


def test_text_survives_as_it_is_written(case):
    system = "You are: a 'helper' # not [a comment"
    assert case(CASE, f"default_system={system}").data.default_system == system
    assert case(CASE, "--default_system", system).data.default_system == system
    assert case(CASE, "run_name=007", "template=yes").training.run_name == "007"
    assert case(CASE, "default_system=").data.default_system == ""
    assert case(CASE, "default_system=null").data.default_system is None
    assert case(CASE + "run_name: 7").training.run_name == "7"
    assert "case.yaml:4: run_name must be text in quotes, not 1.1" in refused(case, CASE + "run_name: 1.10")


def test_numbers_are_what_they_look_like(case):
    config = case(CASE + "learning_rate: 1e-5\nlora_rank: 2.0\nlogging_steps: 0.1\nsave_steps: 20.0\nwarmup_steps: '3'")
    assert (config.training.learning_rate, config.finetuning.lora_rank) == (1e-5, 2)
    assert (config.training.logging_steps, config.training.save_steps, config.training.warmup_steps) == (0.1, 20, 3)
    assert isinstance(config.finetuning.lora_rank, int)
    assert "lora_rank must be a whole number, not 2.5" in refused(case, CASE + "lora_rank: 2.5")
    assert "lora_rank must be a whole number, not true" in refused(case, CASE + "lora_rank: true")
    assert "learning_rate must be a number, not inf" in refused(case, CASE + "learning_rate: .inf")


def test_lists_are_tuples_however_given(case):
    for words in (
        ["lora_target=q_proj, v_proj"],
        ["lora_target=[q_proj,v_proj]"],
        ["--lora_target", "q_proj", "v_proj"],
    ):
        assert case(CASE, *words).finetuning.lora_target == ("q_proj", "v_proj")
    assert case(CASE + "adapter_name_or_path: [x, y]").model.adapter_name_or_path == ("x", "y")
    assert case(CASE + "eval_dataset:\nreport_to: none").data.eval_dataset == ()
    assert case(CASE + "report_to: [none]").training.report_to == ()
    probs = case(CASE, "dataset=a,b", "mix_strategy=interleave_over", "interleave_probs=0.25,0.75")
    assert probs.data.interleave_probs == (0.25, 0.75)


def test_schedule_options_are_a_mapping_however_given(case):
    for words in (['lr_scheduler_kwargs={"num_cycles": 2}'], ["lr_scheduler_kwargs.num_cycles=2"]):
        assert case(CASE, *words).training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert case(CASE + "lr_scheduler_kwargs: '{\"power\": 2}'").training.lr_scheduler_kwargs == {"power": 2}
    merged = case(CASE + "lr_scheduler_kwargs:\n  power: 2", "lr_scheduler_kwargs.lr_end=0").training
    assert merged.lr_scheduler_kwargs == {"power": 2, "lr_end": 0}


def test_no_is_a_strategy_not_a_boolean(case):
    training = case(CASE + "eval_strategy: no\nsave_strategy: no\ninclude_num_input_tokens_seen: true").training
    assert (training.eval_strategy, training.save_strategy) == ("no", "no")
    assert training.include_num_input_tokens_seen == "all"


def test_arguments_may_refer_to_each_other_and_to_the_environment(case, monkeypatch):
    monkeypatch.setenv("WHERE", "/data")
    config = case(
        CASE + "output_dir: saves/${model_name_or_path}\ncache_dir: ${oc.env:WHERE}/hub", "model_name_or_path=q"
    )
    assert (config.training.output_dir, config.model.cache_dir) == ("saves/q", "/data/hub")
    assert "case.yaml:4: output_dir: Interpolation key 'nothing' not found" in refused(
        case, CASE + "output_dir: ${nothing}"
    )
    assert case(CASE, r"default_system=say \${name}").data.default_system == "say ${name}"


def test_resume_is_a_path_or_a_boolean(case):
    assert case(CASE, "--resume_from_checkpoint").training.resume_from_checkpoint is True
    assert case(CASE, "resume_from_checkpoint=false").training.resume_from_checkpoint is False
    assert (
        case(CASE, "--resume_from_checkpoint", "out/checkpoint-3").training.resume_from_checkpoint == "out/checkpoint-3"
    )


def test_an_open_value_must_be_filled_in(case):
    text = "model_name_or_path: ???\ndataset: a\ndo_train: true"
    assert refused(case, text).startswith("case.yaml:1: model_name_or_path is left open")
    assert case(text, "model_name_or_path=m").model.model_name_or_path == "m"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "case.yaml: the file is empty"),
        ("# only a comment\n", "case.yaml: the file is empty"),
        ("- a\n- b\n", "case.yaml:1: expected `key: value` lines"),
        ("a: 1\nb: [1\nc: 2\n", "case.yaml:3: this is not YAML"),
        ("a: b: c", "case.yaml:1: this is not YAML: mapping values are not allowed here"),
        ("a: 1\nb: !!python/object/apply:os.system [true]\n", "case.yaml:2: this is not YAML: could not determine"),
        ("a: " + "[" * 50_000, "case.yaml: nested too deeply"),
        ("a: &a [*a]", "case.yaml: its anchors expand to more than"),
        ("a: " + "x" * 1_000_001, "a case has at most 1000000"),
    ],
)
def test_a_file_that_is_no_case_is_named(case, text, complaint):
    assert complaint in refused(case, text)


def test_anchors_that_multiply_are_refused_at_once(case):
    levels = "abcdefghi"
    lines = ["a: &a [1]"] + [f"{new}: &{new} [{','.join(['*' + old] * 20)}]" for old, new in pairwise(levels)]
    assert "its anchors expand to more than" in refused(case, "\n".join(lines))
    assert case("model_name_or_path: m\ndo_train: true\ndataset: &a x\neval_dataset: *a").data.eval_dataset == ("x",)


def test_a_file_that_cannot_be_read_is_named(case, tmp_path):
    (tmp_path / "other.yaml").write_text("a: 1")
    assert refused(load_config, ["nope.yaml"]).startswith(
        "nope.yaml: there is no such file. In . there are: other.yaml"
    )
    assert "is a folder; expected" in refused(load_config, [str(tmp_path)])
    assert "a case is a .yaml, .yml or .json file" in refused(load_config, ["case.txt"])
    (tmp_path / "latin.yaml").write_bytes(b"run_name: \xe9")
    assert "not UTF-8" in refused(load_config, ["latin.yaml"])
    assert "case.json:1: this is not JSON" in refused(case, '{"a": 1,}', name="case.json")
    assert "no arguments are given" in refused(load_config, [])


def test_a_key_given_twice_names_both_lines(case):
    assert "case.yaml:5: dataset is given twice, first in line 2" in refused(case, CASE + "bf16: true\ndataset: b\n")
    json = '{"model_name_or_path": "m",\n"lora_rank": 1,\n"lora_rank": 2}'
    assert "case.json:3: lora_rank is given twice, first in line 2" in refused(case, json, name="case.json")


def test_a_merged_mapping_may_be_overridden(case):
    assert case("<<: {stage: sft, lora_rank: 4}\nlora_rank: 16\n" + CASE).finetuning.lora_rank == 16
    assert "case.yaml:1: stagee is not an argument" in refused(case, "<<: {stagee: sft}\n" + CASE)
