"""What cannot be meant is refused, all of it at once, where it was said, with the nearest thing that works."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from jtune.config import explain, load_config
from jtune.config.arguments import FIELDS
from jtune.config.foreign import FOREIGN, GROUPS, is_inert
from jtune.config.renamed import NESTED, RENAMED, SPELLINGS
from jtune.errors import ConfigError
from jtune.train.schedule import SCHEDULES

# Names (and for the first group defaults), read from the dataclasses of these releases.
ELSEWHERE = json.loads((Path(__file__).parent / "foreign_arguments.json").read_text())
LLAMAFACTORY = ELSEWHERE["llamafactory 0.9.5"]

TRAIN = ["model_name_or_path=m", "dataset=a", "do_train=true"]


def complaint(*words: str, command: str = "train") -> str:
    with pytest.raises(ConfigError) as error:
        load_config([*TRAIN, *words], command=command)
    return str(error.value)


# ------------------------------------------------------------------ LLaMA-Factory's arguments


def test_every_argument_of_llamafactory_is_known():
    names = [name for group in ELSEWHERE.values() for name in group]
    assert len(names) > 400
    assert [name for name in names if name not in FIELDS and name not in FOREIGN and name not in RENAMED] == []


def test_no_argument_has_two_answers():
    assert len({*FIELDS, *FOREIGN, *RENAMED}) == len(FIELDS) + len(FOREIGN) + len(RENAMED)
    assert {renamed.name for renamed in RENAMED.values()} <= {*FIELDS, *FOREIGN}
    assert set(SPELLINGS) <= set(FIELDS)
    assert {name.rpartition(".")[0] for name in (*FOREIGN, *RENAMED) if "." in name} == {*NESTED, "deepspeed"}


def test_what_is_refused_says_what_to_do_instead():
    advice = re.compile(r"\b(set|leave|write|run|convert|must be)\b")
    assert [why for refused, why, *_ in GROUPS if refused and not advice.search(why)] == []


def test_defaults_are_llamafactorys():
    def ours(name):
        value = FIELDS[name].default
        return (",".join(map(str, value)) or None) if isinstance(value, tuple) else value

    # Hugging Face fills these two in afterwards, as we do.
    theirs = LLAMAFACTORY | {"output_dir": "trainer_output", "report_to": None}
    assert [name for name in theirs if name in FOREIGN and not is_inert(name, theirs[name])] == []
    assert {name: ours(name) for name in theirs if name in FIELDS} == {n: d for n, d in theirs.items() if n in FIELDS}


def test_every_default_can_be_given_without_a_word():
    given = {name: value for name, value in LLAMAFACTORY.items() if value is not None}
    words = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items()]
    words = [word for word in words if word.split("=")[0] not in ("do_train", "warmup_steps")]
    config = load_config([*words, *TRAIN])
    assert config.notes == ()
    assert config.to_dict() == load_config(TRAIN).to_dict()


def test_arguments_are_noted_or_refused_in_one_line_for_each_reason():
    config = load_config([*TRAIN, "deepspeed=ds_z3.json", "ddp_timeout=180000000", "dataloader_num_workers=4"])
    assert [note.split(" is ignored: ")[0] for note in config.notes] == [
        "command line: deepspeed",
        "command line: ddp_timeout",
        "command line: dataloader_num_workers",
    ]
    assert "mesh_fsdp" in config.notes[0]
    together = load_config([*TRAIN, "fsdp=full_shard", "deepspeed=ds_z3.json"]).notes
    assert [note.split(": ")[1] for note in together] == ["fsdp, deepspeed are ignored"]
    message = complaint("max_source_length=512", "max_target_length=512")
    assert message.startswith("command line: max_source_length, max_target_length are not supported: ")
    assert "\n" not in message
    assert "fa2 is for torch" in load_config([*TRAIN, "flash_attn=fa2"]).notes[0]
    assert "never runs code" in load_config([*TRAIN, "trust_remote_code=true"]).notes[0]


def test_trackers_are_named_once_and_what_no_tracker_reads_is_noted():
    config = load_config([*TRAIN, "report_to=[wandb,comet_ml,none]", "use_swanlab=true", "trackio_space_id=me/runs"])
    assert config.training.report_to == ("wandb", "swanlab")
    assert config.notes == (
        "command line: report_to: jtune does not report to comet_ml; it does to tensorboard, wandb, mlflow, swanlab, "
        "trackio",
        "command line: trackio_space_id is ignored without report_to: trackio",
    )
    assert load_config([*TRAIN, "report_to=all", "swanlab_mode=local", "project=p"]).notes == ()
    assert load_config([*TRAIN, "report_to=none"]).training.report_to == ()


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("finetuning_type=oft", "use_dora: true"),
        ("use_badam=true", "finetuning_type: freeze"),
        ("apollo_proj=svd", "leave it out"),
        ("rope_scaling=ntk", "must be linear, dynamic, yarn or llama3"),
        ("shift_attn=true", "mesh_context"),
        ("mixture_of_depths=convert", "finetuning_type: freeze"),
        ("ignore_pad_token_for_loss=false", "leave it out"),
        ("reserved_label_len=16", "leave it out"),
        ("max_source_length=512", "set cutoff_len"),
        ("moe_expert_capacity_factor=1.5", "leave it out"),
        ("accelerator_config.split_batches=true", "divide that by the devices"),
        ("accelerator_config=missing.json", "a mapping, or a JSON file"),
        ("train_dataset=rows.yaml", "model_name_or_path, dataset"),
        ("no_repeat_ngram_size=3", "leave it out"),
        ("report_to=wandbb", "Did you mean wandb?"),
        ("finetuning_type=oft", "lora"),
        ("stage=ppo", "it is not built; jtune trains stages pt, sft, rm, dpo, kto"),
        ("lr_scheduler_type=reduce_lr_on_plateau", "one of linear, cosine"),
        ("optim=galore_adamw_8bit", "adamw_8bit with use_galore: true"),
        ("optim=lomo", "adafactor"),
        ("optim=adamw_torsh", "did you mean adamw_torch?"),
    ],
)
def test_what_is_not_built_is_refused_with_what_is_nearest(word, nearest):
    message = complaint(word)
    assert message.startswith(f"command line: {word.split('=')[0]}")
    assert nearest in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["use_dft_loss=true", "use_eaft_loss=true"], "use_dft_loss and use_eaft_loss: each is a loss of its own"),
        (["use_asft_loss=true", "label_smoothing_factor=0.1"], "choose one"),
        (["use_eaft_loss=true", "stage=pt"], "use_eaft_loss is only for stage sft, not pt"),
        (
            ["use_asft_loss=true", "ref_model=other"],
            "the reference of use_asft_loss is the model at the start",
        ),
        (["use_asft_loss=true", "pissa_init=true"], "leave pissa_init out"),
        (["label_smoothing_factor=1"], "at least 0 and below 1"),
        (["neftune_noise_alpha=-5"], "at least 0"),
        (["eaft_alpha=-1"], "at least 0"),
    ],
)
def test_losses_that_contradict_the_rest_are_refused(words, expected):
    assert expected in complaint(*words)


def test_what_a_loss_does_not_use_is_noted():
    assert "asft_alpha is ignored" in load_config([*TRAIN, "use_dft_loss=true", "asft_alpha=0.5"]).notes[0]
    best = ["eval_dataset=b", "eval_strategy=steps", "early_stopping_steps=3"]
    assert "metric_for_best_model: accuracy" in load_config([*TRAIN, *best, "use_dft_loss=true"]).notes[0]
    assert load_config([*TRAIN, *best, "label_smoothing_factor=0.1", "neftune_noise_alpha=5"]).notes == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim=sgd", "optim_args=momentum=0.9,nesterov=true"], None),
        (["optim=sgd", "optim_args=nesterov=true"], "needs momentum"),
        (["optim=sgd", "optim_args=momentun=0.9"], "sgd has no momentun: it takes momentum, nesterov, dampening"),
        (["optim=sgd", "optim_args=momentum=high"], "momentum is 'high', expected a number"),
        (["optim=sgd", "optim_args=weight_decay=0.1"], "an argument of its own"),
        (["optim_args=beta1=0.8"], "adamw has no beta1: it takes none; set adam_beta1"),
        (["optim=adafactor", "optim_args=relative_step=true"], "relative_step=true is not built"),
        (["adafactor=true", "optim=sgd"], "adafactor: true contradicts optim: sgd"),
        (["use_muon=true"], None),
        (["use_muon=true", "optim=lion_32bit"], "use_muon is not built for optim: lion_32bit"),
        (["use_muon=true", "loraplus_lr_ratio=16"], "use_muon and loraplus_lr_ratio are different optimizers"),
        (["use_galore=true"], "use_galore is not for finetuning_type: lora"),
        (["use_galore=true", "finetuning_type=full", "optim=adamw_8bit"], None),
        (
            ["use_apollo=true", "finetuning_type=full", "optim=adafactor"],
            "use_apollo is not built for optim: adafactor",
        ),
        (["use_adam_mini=true", "use_muon=true"], "use_adam_mini and use_muon are different optimizers"),
        (["loraplus_lr_ratio=16"], None),
        (["loraplus_lr_ratio=16", "finetuning_type=full"], "only for finetuning_type: lora"),
        (["loraplus_lr_ratio=16", "learning_rate=0"], "multiplies learning_rate"),
        (
            ["use_galore=true", "finetuning_type=full", "galore_layerwise=true", "gradient_accumulation_steps=2"],
            "galore_layerwise updates after each batch: set gradient_accumulation_steps: 1",
        ),
    ],
)
def test_choices_of_an_optimizer_that_contradict_themselves_are_refused(words, said):
    if said is None:
        load_config([*TRAIN, *words])
    else:
        assert said in complaint(*words)


def test_a_paged_optimizer_is_noted():
    assert "no state is paged" in load_config([*TRAIN, "optim=paged_adamw_8bit"]).notes[0]


def test_layerwise_updates_are_not_scaled():
    words = ["use_galore=true", "finetuning_type=full", "max_grad_norm=0.5"]
    config = load_config([*TRAIN, *words, "galore_layerwise=true"])
    assert config.training.max_grad_norm == 0
    assert "not scaled to max_grad_norm" in config.notes[0]
    unused = load_config([*TRAIN, *words, "apollo_layerwise=true"])
    assert unused.training.max_grad_norm == 0.5
    assert "ignored without use_apollo" in unused.notes[0]


def test_the_order_of_rows_has_one_meaning_under_all_its_names():
    def order(*words):
        config = load_config([*TRAIN, *words])
        return config.finetuning.disable_shuffling, config.training.train_sampling_strategy, len(config.notes)

    assert order() == order("group_by_length=false") == (False, "random", 0)
    assert order("disable_shuffling=true") == order("train_sampling_strategy=sequential") == (True, "sequential", 0)
    assert order("train_sampling_strategy=group_by_length") == (False, "group_by_length", 0)
    assert order("group_by_length=true") == (False, "group_by_length", 1)
    assert order("train_sampling_strategy=group_by_length", "disable_shuffling=true") == (True, "sequential", 1)


def test_a_training_file_serves_the_other_commands():
    words = [*TRAIN, "stage=dpo", "use_badam=true", "learning_rate=1e-4", "export_dir=out"]
    for command in ("export", "chat"):
        assert load_config(words, command=command).model.export_dir == "out"
    assert load_config([*TRAIN, "stage=dpo"], command="data").finetuning.stage == "dpo"
    for word in ("use_badam=true", "shift_attn=true", "finetuning_type=oft"):
        load_config([*TRAIN, word], command="data")
    quantized = load_config([*words, "quantization_bit=4"], command="export")
    assert "merges adapters into the stored model" in quantized.notes[0]
    assert quantized.model.quantization_bit is None


# ------------------------------------------------------------------ all faults, with their lines


def test_all_faults_are_reported_each_with_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "case.yaml").write_text(
        "### model\nmodel_name_or_path: m\nlerning_rate: 1e-5\ncutoff_len: long\n"
        "dataset: a\nuse_badam: true\nbf16: true\nfp16: true\n"
    )
    with pytest.raises(ConfigError) as error:
        load_config(["case.yaml", "lora_rank=0", "--flash_attn", "FA2", "--do_train"])
    assert str(error.value).splitlines() == [
        "6 errors in the configuration",
        "  case.yaml:3: lerning_rate is not an argument of jtune. Did you mean learning_rate?",
        "  case.yaml:4: cutoff_len must be a whole number, not 'long'",
        "  case.yaml:6: use_badam is not supported: training one block of layers at a time is not built: "
        "leave it out; finetuning_type: freeze trains some fixed layers, and use_galore or optim: adafactor train all "
        "layers with a small state",
        "  case.yaml:8: fp16 and bf16 are both true: choose one (bf16 where the device has it)",
        "  command line: lora_rank must be at least 1, not 0",
        "  command line: flash_attn must be one of auto, disabled, sdpa, fa2, fa3, not 'FA2'",
    ]


def test_one_fault_is_complained_of_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "case.yaml").write_text("model_name_or_path: m\ndatset: a\ndo_train: true\n")
    with pytest.raises(ConfigError) as error:
        load_config(["case.yaml"])
    assert str(error.value) == "case.yaml:2: datset is not an argument of jtune. Did you mean dataset?"


def test_an_ignored_argument_hides_no_rule_of_one_with_a_similar_name():
    words = ["eval_dataset=b", "predict_with_generate=true", "num_beams=4"]
    assert complaint(*words) == complaint(*words, "eval_num_beams=4")


def test_unknown_names_get_the_nearest_one():
    assert "Did you mean lora_rank?" in complaint("lora_rnak=4")
    assert "`jtune help all` lists them" in complaint("zzz=4")
    assert "Arguments are not grouped" in complaint("training={learning_rate: 1}")


@pytest.mark.parametrize(
    "word",
    [
        "lora_rank=0",
        "lora_alpha=-1",
        "lora_dropout=1",
        "learning_rate=-1e-5",
        "learning_rate=nan",
        "num_train_epochs=0",
        "val_size=1.5",
        "val_size=-0.1",
        "cutoff_len=1",
        "per_device_train_batch_size=0",
        "gradient_accumulation_steps=0",
        "adam_beta2=1.0",
        "warmup_ratio=1.5",
        "warmup_steps=2.5",
        "save_total_limit=-2",
        "early_stopping_steps=0",
        "max_samples=0",
        "seed=-1",
        "mesh_fsdp=0",
        "remat=some",
        "top_p=2",
        "logging_steps=0",
        "bf16=maybe",
        "stage=SFT",
        "output_dir=null",
    ],
)
def test_values_out_of_range_are_refused(word):
    assert word.split("=")[0] in complaint(word)


# ------------------------------------------------------------------ what goes with what


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("dataset=", "do_train needs a dataset"),
        ("do_train=false", "there is nothing to do"),
        ("model_name_or_path=", "model_name_or_path is missing"),
        ("do_eval=true", "do_eval needs something to evaluate on"),
        ("eval_strategy=steps", "eval_strategy: steps needs something to evaluate on"),
        ("val_size=0.1 eval_dataset=b", "val_size holds rows out of dataset, but eval_dataset is given too"),
        ("mask_history=true train_on_prompt=true", "contradict each other"),
        ("stage=pt mask_history=true", "mask_history is only for stage sft"),
        ("packing=false neat_packing=true", "packing: false contradicts neat_packing"),
        ("finetuning_type=full adapter_name_or_path=x", "only for finetuning_type: lora, not full"),
        ("finetuning_type=freeze use_rslora=true", "only for finetuning_type: lora, not freeze"),
        ("interleave_probs=0.5,0.5", "interleave_probs needs mix_strategy"),
        ("dataset=a,b mix_strategy=interleave_over interleave_probs=1.0", "1 probabilities for the 2 sets"),
        ("dataset=a,b mix_strategy=interleave_over interleave_probs=0.5,0.6", "add up to 1, not to 1.1"),
        ("bf16=true fp16=true", "choose one"),
        ("warmup_ratio=0.1 warmup_steps=10", "choose one"),
        ("mesh_data=-1", "only one of them"),
        ("mesh_context=-1", "only one of them"),
        ("early_stopping_steps=2", "eval_strategy is no"),
        ("load_best_model_at_end=true", "eval_strategy is no"),
        (
            "val_size=0.1 eval_strategy=epoch load_best_model_at_end=true",
            "save_strategy is steps, eval_strategy is epoch",
        ),
        (
            "val_size=0.1 eval_strategy=steps eval_steps=30 save_steps=100 load_best_model_at_end=true",
            "save_steps (100) to be a multiple of eval_steps (30)",
        ),
        (
            "val_size=0.1 eval_strategy=steps metric_for_best_model=accuracy save_strategy=best",
            "there is no accuracy (with compute_accuracy: true)",
        ),
        (
            "eval_dataset=b,c eval_on_each_dataset=true eval_strategy=steps early_stopping_steps=2",
            "there is no loss, which early_stopping_steps compares: b_loss, c_loss",
        ),
    ],
)
def test_contradictions_are_refused(words, message):
    assert message in complaint(*words.split())


@pytest.mark.parametrize(
    "words",
    [
        "stage=pt neat_packing=true",
        "val_size=0.1 eval_strategy=steps eval_steps=0.1 save_steps=0.3 load_best_model_at_end=true",
        "val_size=100 eval_strategy=epoch save_strategy=epoch load_best_model_at_end=true early_stopping_steps=3",
        "val_size=0.1 eval_strategy=steps save_strategy=best metric_for_best_model=eval_loss",
        "eval_dataset=c eval_on_each_dataset=1 eval_strategy=epoch early_stopping_steps=1 metric_for_best_model=c_loss",
        "dataset=a,b mix_strategy=interleave_once interleave_probs=0.5,0.5",
        "warmup_ratio=0 warmup_steps=10",
        "finetuning_type=freeze freeze_trainable_layers=-2",
        "mesh_data=2 mesh_fsdp=2 mesh_tensor=2",
    ],
)
def test_what_goes_together_is_accepted(words):
    load_config([*TRAIN, *words.split()])


def test_each_command_requires_its_own():
    with pytest.raises(ConfigError, match="export_dir is missing"):
        load_config(["model_name_or_path=m"], command="export")
    with pytest.raises(ConfigError, match="dataset is missing"):
        load_config(["model_name_or_path=m"], command="data")
    assert load_config(["model_name_or_path=m"], command="inspect").model.model_name_or_path == "m"
    assert load_config(["model_name_or_path=m", "eval_dataset=b", "do_eval=true"]).training.do_eval


# ------------------------------------------------------------------ what is filled in


def test_derived_defaults():
    def load(*words):
        return load_config([*TRAIN, *words])

    assert load("lora_rank=4").finetuning.lora_alpha == 8
    assert load("lora_rank=4", "lora_alpha=0").finetuning.lora_alpha == 8
    assert load().data.packing is False
    assert load("stage=pt").data.packing is None
    assert load("stage=pt", "packing=false").data.packing is False
    assert load("neat_packing=true", "cutoff_len=64").data.packing is True
    assert load("packing=true", "cutoff_len=64").data.cutoff_len == 64
    evaluated = load("val_size=0.1", "eval_strategy=steps", "logging_steps=7").training
    assert (evaluated.do_eval, evaluated.eval_steps) == (True, 7)


def test_secrets_are_never_shown():
    config = load_config([*TRAIN, "hf_hub_token=hf_sesame"])
    assert config.model.hf_hub_token == "hf_sesame"
    assert "sesame" not in repr(config) + str(config.to_dict()) + str(config.given())
    message = complaint("hf_hub_token={hf: sesame}", "swanlab_api_key=sesame", "use_swanlab=true", "lora_rank=0")
    assert "sesame" not in message


def test_given_are_the_values_that_differ_from_the_defaults():
    config = load_config([*TRAIN, "learning_rate=5e-5", "lora_rank=4"])
    assert config.given() == {"model_name_or_path": "m", "dataset": ["a"], "do_train": True, "lora_rank": 4}
    assert config.origins["lora_rank"] == "command line"
    json.dumps(config.to_dict())


def test_explain_says_what_an_argument_means():
    assert explain("--lora-rank") == "lora_rank: rank of the adapters (a whole number, at least 1; default: 8)"
    assert "not supported" in explain("use_badam")
    assert "Did you mean lora_rank?" in explain("lora_rnk")
    assert all(f"  {name}: " in explain("all") for name in FIELDS)


def test_schedules_are_those_of_the_trainer():
    assert set(get_args(FIELDS["lr_scheduler_type"].type)) == set(SCHEDULES)


@pytest.mark.parametrize("name", ["full_sft", "freeze_sft", "lora_sft", "toolcall_sft", "pt_packed"])
def test_cases_of_llamafactory_load_unchanged(reference, name):
    config = load_config([str(reference / "cases" / f"{name}.yaml")])
    assert config.notes == ()
    assert config.finetuning.disable_shuffling
    assert config.training.learning_rate == 1e-3
    assert config.data.packing is (None if name == "pt_packed" else False)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].joinpath("configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_cases_load(path):
    load_config([str(path)], command="export" if "export" in path.stem else "train")
