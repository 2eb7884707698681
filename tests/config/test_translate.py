"""An argument under another name means the same, keeps its line, and never silently contradicts itself."""

import json

import pytest

from jtune.config import explain, load_config
from jtune.config.arguments import FIELDS
from jtune.errors import ConfigError

TRAIN = ["model_name_or_path=m", "dataset=a", "do_train=true"]


def value(name, *words, command="train"):
    return load_config([*TRAIN, *words], command=command).to_dict()[name]


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        ("evaluation_strategy=steps do_train=true eval_dataset=b", "eval_strategy", "steps"),
        ("--no_cuda", "use_cpu", True),
        ("per_gpu_train_batch_size=3", "per_device_train_batch_size", 3),
        ("checkpoint_dir=x,y", "adapter_name_or_path", ["x", "y"]),
        ("--checkpoint_dir x y", "adapter_name_or_path", ["x", "y"]),
        ("sft_packing=true", "packing", True),
        ("dev_ratio=0.1", "val_size", 0.1),
        ("num_layer_trainable=3 finetuning_type=freeze", "freeze_trainable_layers", 3),
        ("name_module_trainable=mlp finetuning_type=freeze", "freeze_trainable_modules", ["mlp"]),
        ("resume_lora_training=false", "create_new_adapter", True),
        ("resume_lora_training=true", "create_new_adapter", False),
        ("lora_bf16_mode=true", "pure_bf16", True),
        ("stage=dpo dpo_beta=0.2", "pref_beta", 0.2),
        ("stage=kto kto_beta=0.2", "pref_beta", 0.2),
        ("stage=kto kto_ftx=0.2", "pref_ftx", 0.2),
        ("stage=orpo", "stage", "dpo"),
        ("stage=orpo orpo_beta=0.2", "pref_loss", ["orpo"]),
        ("stage=dpo beta=0.2", "pref_beta", 0.2),
        ("stage=dpo loss_type=hinge", "pref_loss", ["hinge"]),
        ("stage=dpo loss_type=aot_pair", "pref_loss", ["aot"]),
        ("stage=dpo loss_type=[sigmoid,sft] loss_weights=[1,0.5]", "pref_loss_weights", [1, 0.5]),
        ("stage=dpo rpo_alpha=1", "pref_ftx", 1),
        ("stage=dpo rpo_alpha=null", "pref_ftx", 0),
        ("stage=kto desirable_weight=2", "kto_chosen_weight", 2),
        ("stage=kto undesirable_weight=2", "kto_rejected_weight", 2),
        ("stage=rm center_rewards_coefficient=0.01", "rm_center_coef", 0.01),
        ("teacher_model_name_or_path=t", "teacher_model", "t"),
        ("--neft_alpha 5", "neftune_noise_alpha", 5),
        ("new_special_tokens=<a>,<b>", "add_special_tokens", ["<a>", "<b>"]),
        ("fp8=true", "bf16", True),
        ("fp8=e4m3", "bf16", True),
        ("fp8=false bf16=true", "bf16", True),
        ("tensor_model_parallel_size=2", "mesh_tensor", 2),
        ("pipeline_model_parallel_size=4", "mesh_tensor", 4),
        ("pipeline_model_parallel_size=4 tensor_model_parallel_size=2", "mesh_tensor", 8),
        ("pipeline_model_parallel_size=1 tensor_model_parallel_size=2", "mesh_tensor", 2),
        ("expert_model_parallel_size=2", "mesh_expert", 2),
        ("context_parallel_size=2", "mesh_context", 2),
        ("hyper_parallel_cp_size=2 context_parallel_size=2", "mesh_context", 2),
        ("tp_size=0", "mesh_tensor", 1),
        ("parallelism_config.tp_size=2 parallelism_config.cp_size=1", "mesh_tensor", 2),
        ('parallelism_config={"tp_size":2,"cp_size":2,"cp_backend":"torch"}', "mesh_context", 2),
        ("accelerator_config.gradient_accumulation_kwargs.num_steps=4", "gradient_accumulation_steps", 4),
        ("moe_aux_loss_coeff=0.01", "moe_aux_loss_coef", 0.01),
        ("flash_attn=true", "flash_attn", "auto"),
        ("flash_attn=off", "flash_attn", "disabled"),
        ("flash_attn=flash_attention_2", "flash_attn", "fa2"),
        ("--flash_attn --bf16", "flash_attn", "auto"),
        ("--flash_attn fa2 --bf16", "flash_attn", "fa2"),
        ("quantization_bit=4 quantization_method=bitsandbytes", "quantization_method", "bnb"),
        ("quantization_bit=8 quantization_method=EETQ", "quantization_method", "eetq"),
        ("init_special_tokens=vocab_mean_noise", "init_special_tokens", "noise_init"),
        ("max_steps=0", "max_steps", -1),
        ("save_total_limit=-1", "save_total_limit", None),
        ("max_grad_norm=null", "max_grad_norm", 0),
        ("optim=adamw_apex_fused", "optim", "adamw_apex_fused"),
    ],
)
def test_an_old_name_means_the_new_one(words, name, expected):
    assert value(name, *words.split()) == expected


def test_text_under_an_old_name_stays_as_it_is_written():
    assert value("default_system", "system_prompt=You are: 'x' # not a comment") == "You are: 'x' # not a comment"


def test_a_translated_argument_keeps_its_line_and_is_noted(tmp_path):
    case = tmp_path / "case.yaml"
    case.write_text(
        "model_name_or_path: m\ndataset: a\ndo_train: true\nno_cuda: true\nfp8: true\nflash_attn: true\n"
        "tensor_model_parallel_size: 1\naccelerator_config:\n  even_batches: false\n"
    )
    config = load_config([str(case)])
    assert config.origins["use_cpu"] == f"{case}:4"
    assert config.given()["use_cpu"] is True
    assert [note.removeprefix(f"{case}:") for note in config.notes] == [
        "6: flash_attn: true is read as auto",
        "4: no_cuda is read as use_cpu",
        "5: fp8 is read as bf16 (matrix products are in bfloat16 instead of float8, which is more precise)",
        "8: accelerator_config.even_batches is ignored: jtune lays out batches itself: the order of rows follows from "
        "seed, and an epoch has each row once",
    ]
    case.write_text("model_name_or_path: m\ndataset: a\ndo_train: true\nper_gpu_train_batch_size: 0\n")
    with pytest.raises(ConfigError, match=r"case\.yaml:4: per_device_train_batch_size must be at least 1"):
        load_config([str(case)])


def test_a_default_under_an_old_name_is_not_talked_about():
    assert load_config([*TRAIN, "stage=dpo", "dpo_loss=sigmoid", "dpo_beta=0.1", "orpo_beta='0.1'"]).notes == ()


def test_a_mapping_may_be_a_json_file(tmp_path):
    path = tmp_path / "accelerator.json"
    path.write_text(json.dumps({"gradient_accumulation_kwargs": {"num_steps": 8}, "dispatch_batches": None}))
    assert value("gradient_accumulation_steps", f"accelerator_config={path}") == 8
    path.write_text("[" * 100_000)
    for unread in (path, "/dev/zero", tmp_path, "{", "{}{}"):
        with pytest.raises(ConfigError, match="accelerator_config is not supported: it must be a mapping, or a JSON"):
            load_config([*TRAIN, "--accelerator_config", str(unread)])
        load_config([*TRAIN, "--deepspeed", str(unread)])
    with pytest.raises(ConfigError, match=r"accelerator_config\.evn_batches is not an argument"):
        load_config([*TRAIN, 'accelerator_config={"evn_batches": true}'])


def test_what_a_deepspeed_file_changes_is_honoured_or_refused(tmp_path):
    path = tmp_path / "ds.json"

    def load(**content):
        path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"} | content))
        return load_config([*TRAIN, f"deepspeed={path}"])

    assert [note.split(" is ")[0] for note in load().notes] == ["command line: deepspeed"]
    parallel = load(tensor_parallel={"autotp_size": 4}, sequence_parallel_size=2).training
    assert (parallel.mesh_tensor, parallel.mesh_context) == (4, 2)
    load(optimizer={"type": "AdamW", "params": {"lr": "auto"}})
    for content, complaint in (
        ({"optimizer": {"type": "Lamb"}}, "deepspeed.optimizer is not supported"),
        ({"scheduler": {"type": "WarmupLR"}}, "set lr_scheduler_type"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            load(**content)
    assert load_config([*TRAIN, "deepspeed=examples/deepspeed/ds_z3_config.json"]).notes


def test_two_names_of_one_argument_must_agree():
    assert value("mesh_context", "context_parallel_size=2", "mesh_context=2") == 2
    assert value("freeze_trainable_modules", "name_module_trainable=a,b", "freeze_trainable_modules=[a,b]",
                 "finetuning_type=freeze") == ["a", "b"]  # fmt: skip
    assert value("use_cpu", "no_cuda=true", "use_cpu='yes'") is True
    for words, complaint in (
        ("pipeline_model_parallel_size=some mesh_tensor=2", "mesh_tensor must be a whole number, not 'some'"),
        ("mesh_tensor=4 tensor_model_parallel_size=2", "tensor_model_parallel_size is another name of mesh_tensor, "
         "which has another value: leave one out"),
        ("cp_size=4 context_parallel_size=2", "has another value as cp_size: leave one out"),
        ("fp8=true bf16=false", "fp8 is another name of bf16"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            load_config([*TRAIN, *words.split()])
        assert complaint in str(error.value)
        assert "\n" not in str(error.value)


def test_a_token_under_an_old_name_is_not_shown():
    config = load_config([*TRAIN, "hf_auth_token=hf_sesame"])
    assert config.model.hf_hub_token == "hf_sesame"
    assert "sesame" not in repr(config) + str(config.to_dict()) + str(config.notes)
    with pytest.raises(ConfigError, match="hf_auth_token is another name of hf_hub_token") as error:
        load_config([*TRAIN, "hf_auth_token=hf_sesame", "hf_hub_token=hf_other_sesame"])
    assert "sesame" not in str(error.value)


def test_help_says_what_an_old_name_means_now():
    assert explain("no_cuda") == "no_cuda: another name of use_cpu. " + explain("use_cpu")
    assert all(name not in FIELDS for name in ("no_cuda", "fp8"))
