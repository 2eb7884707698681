"""Arguments of LLaMA-Factory and Hugging Face's Trainer that jtune does not honour: a table, a group for each reason.

Each name has an inert value: the default, which asks for nothing and is always accepted silently. Any other value of an
`ignored` argument gives a note, any other value of a `refused` one an error. Some groups are refused only by the
commands of `TRAINING`: `jtune export` and `jtune chat` still accept a training file.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jtune.config.kinds import BOOLEANS

TRAINING = frozenset({"train", "data", "plan", "inspect"})


class Group(NamedTuple):
    """Arguments that are ignored or refused for the same reason."""

    refused: bool
    why: str  # completes "ignored: ..." or "is not supported: ..."
    names: Mapping[str, Any]  # name -> inert value
    commands: frozenset[str] | None = None  # None: all


def _ignored(why: str, **names: Any) -> Group:
    return Group(False, why, names)


def _refused(why: str, **names: Any) -> Group:
    return Group(True, why, names)


def _refused_in_training(why: str, **names: Any) -> Group:
    return Group(True, why, names, TRAINING)


GROUPS: tuple[Group, ...] = (
    # ---------------------------------------------------------------- memory and devices
    _ignored(
        "norms, softmax and the loss are always computed in float32",
        upcast_layernorm=False, upcast_lmhead_output=False,
    ),
    _ignored(
        "transformers now has only one kind of tokenizer, which tokenizer.json defines",
        use_fast_tokenizer=True,
    ),
    _ignored(
        "weights are always read in pieces, directly to the devices",
        low_cpu_mem_usage=True, offload_folder="offload",
    ),
    _ignored(
        "parameters, gradients and optimizer state are already split over all devices, by mesh_data, mesh_fsdp, "
        "mesh_tensor, mesh_context and mesh_expert",
        deepspeed=None, fsdp=None, fsdp_config=None, fsdp_min_num_params=0, fsdp_transformer_layer_cls_to_wrap=None,
    ),
    _ignored(
        "JAX connects devices and hosts itself, without torch.distributed",
        ddp_find_unused_parameters=None, ddp_bucket_cap_mb=None, ddp_broadcast_buffers=None, ddp_static_graph=None,
        ddp_backend=None, ddp_timeout=1800, local_rank=-1, master_addr=None, master_port=None, ray_num_workers=1,
        ray_init_kwargs=None, ray_scope="last", log_on_each_node=True, save_on_each_node=False,
        data_shared_file_system=False, tpu_num_cores=None, use_mps_device=False, mp_parameters="",
    ),
    _ignored(
        "remat sets what the backward pass recomputes (default: as little as memory allows)",
        gradient_checkpointing=False, gradient_checkpointing_kwargs=None, activation_checkpointing=None,
        activation_checkpointing_kwargs=None, use_reentrant_gc=True, use_unsloth_gc=False, recompute_granularity=None,
        recompute_method=None, recompute_num_layers=None,
    ),
    _refused(
        "mesh_data, mesh_fsdp, mesh_tensor, mesh_context and mesh_expert arrange the devices",
        accelerator_config=None, parallelism_config=None,
    ),
    _refused(
        "jtune has no second backend: set mesh_tensor, mesh_context or mesh_expert, and leave this out",
        use_mca=False, use_megatron_bridge=False, megatron_bridge_args=None, use_hyper_parallel=False,
        megatron_pretrained_checkpoint=None, extra_config=None,
    ),
    _refused("jtune calls it mesh_tensor: set that, and leave this out", tensor_model_parallel_size=1),
    _refused(
        "mesh_context splits the tokens of a row: set that, and leave this out",
        context_parallel_size=1, hyper_parallel_cp_size=1, sequence_parallel=False,
    ),
    _refused("jtune calls it mesh_expert: set that, and leave this out", expert_model_parallel_size=1),
    _refused(
        "pipeline parallelism is not built: split the model with mesh_fsdp and mesh_tensor",
        pipeline_model_parallel_size=1, virtual_pipeline_model_parallel_size=None,
    ),
    _ignored(
        "it belongs to another training backend",
        hyper_parallel_args=None, account_for_embedding_in_pipeline_split=None, account_for_loss_in_pipeline_split=None,
        use_distributed_optimizer=True, overlap_param_gather=True, overlap_grad_reduce=True, use_packed_sequences=False,
        moe_grouped_gemm=None, moe_token_dispatcher_type=None, mixed_precision="bf16_mixed", export_hf_on_finish=False,
    ),
    _refused("experts in host memory need KTransformers: split the model with mesh_fsdp", use_kt=False),
    _ignored(
        "it belongs to KTransformers",
        kt_weight_path=None, kt_expert_checkpoint_path=None, kt_non_expert_weight_path=None, kt_cpu_activation=None,
        kt_use_lora_experts=None, kt_lora_expert_num=None, kt_lora_expert_intermediate_size=None,
    ),
    # ---------------------------------------------------------------- kernels and numbers
    _ignored(
        "XLA compiles and fuses the whole step; final norm, head and loss run in chunks",
        use_unsloth=False, enable_liger_kernel=False, use_liger_kernel=False, liger_kernel_config=None,
        use_v1_kernels=False, torch_compile=False, torch_compile_backend=None, torch_compile_mode=None,
        torchdynamo=None, jit_mode_eval=False, bias_activation_fusion=None, apply_rope_fusion=None,
        masked_softmax_fusion=None, cross_entropy_loss_fusion=None, torch_empty_cache_steps=None,
    ),
    _ignored("evaluation computes in the dtype of training (bf16, fp16)", bf16_full_eval=False, fp16_full_eval=False),
    _ignored(
        "jtune has one implementation of it", half_precision_backend="auto", fp16_backend="auto", fp16_opt_level="O1"
    ),
    _ignored("set JAX_DEFAULT_MATMUL_PRECISION in the environment instead", tf32=None),
    _ignored("the order of rows and every random choice follow from seed", full_determinism=False),
    _refused_in_training("fp8 is not built: set bf16: true", fp8=False, fp8_enable_fsdp_float8_all_gather=False),
    _ignored("it belongs to fp8", fp8_backend="auto"),
    # ---------------------------------------------------------------- model
    _refused(
        "jtune never runs code of model repositories: leave it out; tokenizers load without it",
        trust_remote_code=False,
    ),
    _refused("set rope_scaling (rope_parameters) in the model's config.json", rope_scaling=None),
    _refused_in_training(
        "it approximates attention over long rows, which jtune computes exactly without storing all scores: leave it "
        "out; mesh_context splits rows that are too long for one device",
        shift_attn=False,
    ),
    _refused_in_training(
        "layers that skip tokens make a model that transformers does not load: leave it out; "
        "finetuning_type: freeze needs less compute, and a model with experts computes less per token",
        mixture_of_depths=None,
    ),
    _ignored("mesh_fsdp and mesh_tensor place weights on all devices", quantization_device_map=None),
    _refused(
        "only the model that trains can be quantised, by quantization_bit: leave it out",
        ref_model_quantization_bit=None, reward_model_quantization_bit=None,
    ),
    _ignored(
        "jtune trains on text only",
        image_max_pixels=589824, image_min_pixels=1024, image_do_pan_and_scan=False, crop_to_patches=False,
        video_max_pixels=65536, video_min_pixels=256, video_fps=2.0, video_maxlen=128, use_audio_in_video=False,
        audio_sampling_rate=16000, media_dir=None, freeze_vision_tower=True, freeze_multi_modal_projector=True,
        freeze_language_model=False,
    ),
    _ignored("jtune reads models from folders and from the Hugging Face hub", ms_hub_token=None, om_hub_token=None),
    # ---------------------------------------------------------------- export and hub
    _ignored("jtune merges adapters in host memory", export_device="cpu"),
    _refused("quantised export is not built: export, then quantise the folder", export_quantization_bit=None),
    _ignored(
        "it belongs to export_quantization_bit",
        export_quantization_dataset=None, export_quantization_nsamples=128, export_quantization_maxlen=1024,
    ),
    _refused(
        "jtune writes weights as safetensors only: leave it out",
        export_legacy_format=False, save_safetensors=True,
    ),
    _refused("jtune uploads nothing: use `hf upload REPO FOLDER`", push_to_hub=False, export_hub_model_id=None),
    _ignored(
        "jtune uploads nothing",
        hub_token=None, hub_private_repo=None, hub_model_id=None, hub_strategy="every_save", hub_always_push=False,
        hub_revision=None, push_to_hub_model_id=None, push_to_hub_organization=None, push_to_hub_token=None,
    ),
    # ---------------------------------------------------------------- data
    _refused_in_training("padding never counts: leave it out", ignore_pad_token_for_loss=True),
    _refused_in_training(
        "jtune always lays out rows with little padding (packing: true leaves almost none): leave it out",
        group_by_length=False, sortish_sampler=False,
    ),
    _refused_in_training(
        "jtune shuffles rows, or keeps their order with disable_shuffling: true", train_sampling_strategy="random"
    ),
    _refused_in_training(
        "a resumed run always continues at its place in the data: leave it out",
        ignore_data_skip=False,
    ),
    _ignored(
        "jtune prefetches batches itself",
        dataloader_num_workers=0, dataloader_pin_memory=True, dataloader_persistent_workers=False,
        dataloader_prefetch_factor=None, dataloader_in_order=True, dataloader_multiprocessing_context=None,
        remove_unused_columns=True, label_names=None, length_column_name="length",
    ),
    # ---------------------------------------------------------------- adapters and optimizers
    _ignored("with pissa_init, jtune always writes a plain LoRA adapter", pissa_convert=False),
    _ignored("it belongs to OFT", module_dropout=0.0, oft_rank=0, oft_block_size=32, oft_target="all"),
    _refused_in_training(
        "training one block of layers at a time is not built: finetuning_type: freeze trains some fixed layers, and "
        "use_galore or optim: adafactor train all layers with a small state",
        use_badam=False,
    ),
    _refused_in_training(
        "set use_galore with galore_target, or use_apollo with apollo_target", optim_target_modules=None
    ),
    _refused_in_training(
        "the update is one program, which needs the gradients of all layers: leave it out",
        galore_layerwise=False, apollo_layerwise=False,
    ),
    _refused_in_training("APOLLO's projection is random, as in its paper: leave it out", apollo_proj="random"),
    _refused_in_training("APOLLO projects the smaller dimension only: leave it out", apollo_proj_type="std"),
    _ignored(
        "the limiter compares norms, so scaling before or after it gives the same update",
        apollo_scale_front=False,
    ),
    _ignored(
        "it belongs to BAdam",
        badam_mode="layer", badam_start_block=None, badam_switch_mode="ascending", badam_switch_interval=50,
        badam_update_ratio=0.05, badam_mask_mode="adjacent", badam_verbose=0,
    ),
    # ---------------------------------------------------------------- loss
    _ignored(
        "the loss is always the mean over all tokens of an update, over all devices",
        average_tokens_across_devices=True, calculate_per_token_loss=None,
    ),
    _ignored(
        "it belongs to preference training, which is not built yet",
        pref_beta=0.1, pref_ftx=0.0, pref_bco_weight=0.0, pref_loss="sigmoid", dpo_label_smoothing=0.0,
        kto_chosen_weight=1.0, kto_rejected_weight=1.0, simpo_gamma=0.5, ppo_buffer_size=1, ppo_epochs=4,
        ppo_score_norm=False, ppo_target=6.0, ppo_whiten_rewards=False, ref_model=None, ref_model_adapters=None,
        reward_model=None, reward_model_adapters=None, reward_model_type="lora", ld_alpha=None,
    ),
    # ---------------------------------------------------------------- loop, logs, evaluation
    _refused_in_training(
        "jtune does not shrink batches: lower per_device_train_batch_size",
        auto_find_batch_size=False,
    ),
    _ignored(
        "num_beams and max_new_tokens (or max_length) also apply to evaluation",
        generation_max_length=None, generation_num_beams=None, eval_num_beams=None,
    ),
    _ignored("jtune reads the generation_config.json of the model", generation_config=None),
    _ignored(
        "jtune generates answers itself",
        infer_backend="huggingface", use_kv_cache=True, use_cache=False, past_index=-1,
    ),
    _ignored(
        "jtune generates answers itself",
        vllm_maxlen=4096, vllm_gpu_util=0.7, vllm_enforce_eager=False, vllm_max_lora_rank=32, vllm_config=None,
        sglang_maxlen=4096, sglang_mem_fraction=0.7, sglang_tp_size=-1, sglang_config=None,
        sglang_lora_backend="triton",
    ),
    _ignored(
        "evaluation sums losses on the devices and stores no predictions",
        prediction_loss_only=False, eval_do_concat_batches=True, eval_use_gather_object=False,
        eval_accumulation_steps=None, include_for_metrics=(), include_inputs_for_metrics=False,
        batch_eval_metrics=False, use_legacy_prediction_loop=False,
    ),
    _ignored("values that are not finite stop the run", logging_nan_inf_filter=True, debug=""),
    _ignored("SIGTERM always saves a checkpoint, and the same command resumes from it", enable_jit_checkpoint=False),
    _ignored("early stopping always resumes with its counter", restore_callback_states_from_checkpoint=False),
    _ignored(
        "jtune prints a few lines and logs the rest to trainer_log.jsonl",
        log_level="passive", log_level_replica="warning",
    ),
    _ignored("jtune always reports tokens per second", include_tokens_per_second=False),
    _ignored("jtune does not report it", skip_memory_metrics=True, tpu_metrics_debug=False),
    _ignored(
        "jtune reports to a Space of trackio (trackio_space_id) and leaves it as it is",
        trackio_bucket_id=None, trackio_static_space_id=None,
    ),
    _ignored("jtune sends no messages to Lark", swanlab_lark_webhook_url=None, swanlab_lark_secret=None),
    _refused_in_training(
        "profile_steps writes profiles, as in profile_steps: 10-12: leave it out",
        enable_torch_profiler=False, profile_modules=None,
    ),
    _ignored(
        "it belongs to enable_torch_profiler",
        profiler_output_dir=None, profiler_wait_steps=1, profiler_warmup_steps=1, profiler_active_steps=1,
        profiler_repeat=1, profiler_record_shapes=True, profiler_profile_memory=True, profiler_with_stack=True,
    ),
    _refused("`jtune eval CASE.yaml --tasks NAME` runs benchmarks: leave it out", task=None),
    _ignored(
        "it belongs to task",
        task_dir="evaluation", batch_size=4, lang="en", n_shot=5, save_dir=None,
        download_mode="reuse_dataset_if_exists",
    ),
    # ---------------------------------------------------------------- old names
    _refused("it is now eval_strategy", evaluation_strategy="no"),
    _refused("it is now use_cpu", no_cuda=False),
    _refused("it is now per_device_train_batch_size", per_gpu_train_batch_size=None),
    _refused("it is now per_device_eval_batch_size", per_gpu_eval_batch_size=None),
)  # fmt: skip

FOREIGN: dict[str, Group] = {name: group for group in GROUPS for name in group.names}


def is_inert(name: str, value: Any) -> bool:
    """Whether a foreign argument has the value that asks for nothing.

    >>> is_inert("deepspeed", None), is_inert("use_badam", False), is_inert("use_badam", True)
    (True, True, False)
    """
    inert = FOREIGN[name].names[name]
    if isinstance(inert, bool) and isinstance(value, str):
        value = BOOLEANS.get(value.lower(), value)
    empty = (None, "", (), [], {})
    return value == inert or value is None or (value in empty and inert in empty)


def verdict(name: str, value: Any, command: str) -> tuple[str | None, str | None]:
    """The answer to a foreign argument: an error, a note, or nothing.

    Returns:
      `(error, note)`, at most one of them not None. Neither contains the value, which may be a token.
    """
    group = FOREIGN[name]
    if is_inert(name, value):
        return None, None
    if not group.refused:
        return None, f"{name} is ignored: {group.why}"
    if group.commands is not None and command not in group.commands:
        return None, None
    return f"{name} is not supported: {group.why}", None
