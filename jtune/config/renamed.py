"""Other names of arguments: old ones of LLaMA-Factory and transformers, and those of other training backends.

An argument in `RENAMED` is read as the one that it names; a value in `SPELLINGS` as its current spelling. A key of a
mapping in `NESTED` counts as an argument of its own: `accelerator_config.split_batches`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jtune.config.kinds import BOOLEANS


class Renamed(NamedTuple):
    """What an argument is called here."""

    name: str
    change: Callable[[Any], Any] = lambda value: value  # from the given value to ours; None: as if it were not given
    times: bool = False  # the value multiplies what other arguments say, instead of having to agree with them
    why: str = ""  # completes "read as NAME: ..."


def is_true(value: Any) -> bool:
    """
    >>> is_true(True), is_true("off"), is_true("e4m3")
    (True, False, True)
    """
    return BOOLEANS.get(value.lower(), True) if isinstance(value, str) else bool(value)


def _opposite(value: Any) -> bool:
    return not is_true(value)


def _only_true(value: Any) -> bool | None:
    return True if is_true(value) else None


def _above_one(value: Any) -> Any:
    return None if value in (0, 1) else value


def _by_length(value: Any) -> str | None:
    return "group_by_length" if is_true(value) else None


_PIPELINE = "layers are split by mesh_tensor instead of in stages, so an update has as many examples"
_FLOAT8 = "matrix products are in bfloat16 instead of float8, which is more precise"

RENAMED: dict[str, Renamed] = {
    # ---------------------------------------------------------------- LLaMA-Factory's own
    "checkpoint_dir": Renamed("adapter_name_or_path"),
    "hf_auth_token": Renamed("hf_hub_token"),
    "new_special_tokens": Renamed("add_special_tokens"),
    "vllm_dtype": Renamed("infer_dtype"),
    "prompt_template": Renamed("template"),
    "system_prompt": Renamed("default_system"),
    "cache_path": Renamed("tokenized_path"),
    "dev_ratio": Renamed("val_size"),
    "sft_packing": Renamed("packing"),
    "num_layer_trainable": Renamed("freeze_trainable_layers"),
    "name_module_trainable": Renamed("freeze_trainable_modules"),
    "resume_lora_training": Renamed("create_new_adapter", _opposite),
    "lora_bf16_mode": Renamed("pure_bf16"),
    "neft_alpha": Renamed("neftune_noise_alpha"),
    "dpo_beta": Renamed("pref_beta"),
    "kto_beta": Renamed("pref_beta"),
    "orpo_beta": Renamed("pref_beta"),
    "dpo_ftx": Renamed("pref_ftx"),
    "kto_ftx": Renamed("pref_ftx"),
    "dpo_loss": Renamed("pref_loss"),
    "dpo_ref_model": Renamed("ref_model"),
    "dpo_ref_model_checkpoint": Renamed("ref_model_adapters"),
    "ref_model_checkpoint": Renamed("ref_model_adapters"),
    "reward_model_checkpoint": Renamed("reward_model_adapters"),
    "fp8": Renamed("bf16", _only_true, why=_FLOAT8),
    # ---------------------------------------------------------------- transformers
    "evaluation_strategy": Renamed("eval_strategy"),
    "no_cuda": Renamed("use_cpu"),
    "per_gpu_train_batch_size": Renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Renamed("per_device_eval_batch_size"),
    "tp_size": Renamed("mesh_tensor", _above_one),
    "group_by_length": Renamed("train_sampling_strategy", _by_length),
    "parallelism_config.dp_replicate_size": Renamed("mesh_data"),
    "parallelism_config.dp_shard_size": Renamed("mesh_fsdp"),
    "parallelism_config.tp_size": Renamed("mesh_tensor"),
    "parallelism_config.cp_size": Renamed("mesh_context", _above_one),
    "parallelism_config.sp_size": Renamed("mesh_context", _above_one),
    "accelerator_config.gradient_accumulation_kwargs.num_steps": Renamed("gradient_accumulation_steps"),
    # ---------------------------------------------------------------- TRL and axolotl
    "beta": Renamed("pref_beta"),
    "rl_beta": Renamed("pref_beta"),
    "orpo_alpha": Renamed("pref_beta"),
    "rpo_alpha": Renamed("pref_ftx"),
    "loss_type": Renamed("pref_loss"),
    "loss_weights": Renamed("pref_loss_weights"),
    "desirable_weight": Renamed("kto_chosen_weight"),
    "undesirable_weight": Renamed("kto_rejected_weight"),
    "kto_desirable_weight": Renamed("kto_chosen_weight"),
    "kto_undesirable_weight": Renamed("kto_rejected_weight"),
    "center_rewards_coefficient": Renamed("rm_center_coef"),
    "teacher_model_name_or_path": Renamed("teacher_model"),
    # ---------------------------------------------------------------- other backends
    "deepspeed.tensor_parallel": Renamed("mesh_tensor"),
    "deepspeed.sequence_parallel": Renamed("mesh_context"),
    "tensor_model_parallel_size": Renamed("mesh_tensor"),
    "pipeline_model_parallel_size": Renamed("mesh_tensor", _above_one, times=True, why=_PIPELINE),
    "expert_model_parallel_size": Renamed("mesh_expert"),
    "context_parallel_size": Renamed("mesh_context"),
    "hyper_parallel_cp_size": Renamed("mesh_context"),
    "sequence_parallel_size": Renamed("mesh_context"),
    "cp_size": Renamed("mesh_context"),
    "use_packed_sequences": Renamed("packing", _only_true),
    "micro_batch_size": Renamed("per_device_train_batch_size"),
    "moe_aux_loss_coeff": Renamed("moe_aux_loss_coef"),
    "fp8_format": Renamed("bf16", _only_true, why=_FLOAT8),
}  # fmt: skip

# Argument -> other spellings of its values: older ones, and those by which the Trainer says "never" or "all".
SPELLINGS: dict[str, Mapping[Any, Any]] = {
    "init_special_tokens": {
        "vocab_mean_noise": "noise_init",
        "description": "desc_init",
        "description_noise": "desc_init_w_noise",
    },
    "max_steps": {0: -1},
    "save_total_limit": {0: None, -1: None},
    "max_grad_norm": {None: 0.0},
    "quantization_method": {"bitsandbytes": "bnb", "BNB": "bnb", "BITS_AND_BYTES": "bnb", "HQQ": "hqq", "EETQ": "eetq"},
    "pref_loss": {"aot_pair": "aot"},
    "flash_attn": {
        True: "auto",
        False: "disabled",
        "off": "disabled",
        "eager": "disabled",
        "flash_attention_2": "fa2",
        "flash_attention_3": "fa3",
    },
}

# Argument -> value -> other arguments that it stands for.
IMPLIED: dict[str, Mapping[Any, Mapping[str, Any]]] = {"stage": {"orpo": {"stage": "dpo", "pref_loss": "orpo"}}}

NESTED = ("accelerator_config", "accelerator_config.gradient_accumulation_kwargs", "parallelism_config")


def current(name: str) -> str:
    """The name of an argument here.

    >>> current("evaluation_strategy"), current("eval_strategy")
    ('eval_strategy', 'eval_strategy')
    """
    return RENAMED[name].name if name in RENAMED else name
