"""Arguments of LLaMA-Factory and Hugging Face's Trainer that jtune does not honour: a table, a group for each reason.

Each name has an inert value: the default, which asks for nothing and is always accepted silently. Any other value of an
`ignored` argument gives a note, any other value of a `refused` one an error. Some groups are refused only by the
commands that would use them: `jtune export` and `jtune chat` still accept a training file.
"""

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

from jtune.config.kinds import BOOLEANS

TRAINING = frozenset({"train", "data", "plan", "inspect"})
UPDATES = TRAINING - {"data"}  # what rows become does not depend on how a model is trained


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


def _refused_in_updates(why: str, **names: Any) -> Group:
    return Group(True, why, names, UPDATES)


def _refused_in(commands: Set[str], why: str, **names: Any) -> Group:
    return Group(True, why, names, frozenset(commands))


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
    _refused_in_updates(
        "deepspeed chooses the schedule: leave scheduler out of its file, and set lr_scheduler_type",
        **{"deepspeed.scheduler": None},
    ),
    _refused_in_updates(
        "deepspeed chooses another optimizer than AdamW: leave optimizer out of its file, and set optim",
        **{"deepspeed.optimizer": None},
    ),
    _ignored(
        "JAX connects devices and hosts itself, without torch.distributed",
        ddp_find_unused_parameters=None, ddp_bucket_cap_mb=None, ddp_broadcast_buffers=None, ddp_static_graph=None,
        ddp_backend=None, ddp_timeout=1800, local_rank=-1, master_addr=None, master_port=None, ray_num_workers=1,
        ray_init_kwargs=None, ray_scope="last", ray_run_name=None, ray_storage_path="./saves",
        ray_storage_filesystem=None, resources_per_worker={"GPU": 1}, placement_strategy="PACK",
        log_on_each_node=True, save_on_each_node=False, data_shared_file_system=False, tpu_num_cores=None,
        use_mps_device=False, mp_parameters="", xpu_backend=None, sharded_ddp="", use_ipex=False, ddp_bucket_size=None,
        ddp_average_in_collective=False, n_gpu=None, device_map=None,
        use_habana=False, use_lazy_mode=False, gaudi_config_name=None, throughput_warmup_steps=0,
        use_hpu_graphs_for_training=False, use_hpu_graphs_for_inference=False,
    ),
    _ignored(
        "remat sets what the backward pass recomputes (default: as little as memory allows)",
        gradient_checkpointing=False, gradient_checkpointing_kwargs=None, activation_checkpointing=None,
        activation_checkpointing_kwargs=None, use_reentrant_gc=True, use_unsloth_gc=False, recompute_granularity=None,
        recompute_method=None, recompute_num_layers=None, recompute_modules=None, moe_layer_recompute=False,
        enable_activation_checkpointing=True,
    ),
    _ignored(
        "jtune has one backend, whose devices mesh_data, mesh_fsdp, mesh_tensor, mesh_context and mesh_expert arrange",
        use_mca=False, use_megatron_bridge=False, megatron_bridge_args=None, use_hyper_parallel=False,
        hyper_parallel_args=None, sequence_parallel=False, sequence_parallel_mode=None, cp_mode=None,
        expert_tensor_parallel_size=None, virtual_pipeline_model_parallel_size=None,
        pipeline_model_parallel_layout=None, account_for_embedding_in_pipeline_split=None,
        account_for_loss_in_pipeline_split=None, overlap_p2p_comm=True, variable_seq_lengths=False,
        use_distributed_optimizer=True, distrib_optim_fully_reshardable=False,
        distrib_optim_fully_reshardable_mem_efficient=False, overlap_param_gather=True, overlap_grad_reduce=True,
        delay_grad_reduce=True, accumulate_allreduce_grads_in_fp32=False,
        sequence_packing=False, moe_grouped_gemm=None, moe_token_dispatcher_type=None, moe_shared_expert_overlap=False,
        moe_router_dtype=None, optimizer_cpu_offload=False, optimizer_offload_fraction=0.0,
        mixed_precision="bf16_mixed", export_hf_on_finish=False, save_hf_model=False, ckpt_format="legacy",
        ckpt_d2h_non_blocking=False, transformer_impl=None, cuda_graph_impl=None, cuda_graph_scope="full",
        compile_warmup=False, use_flash_attn=None, use_flash_attn_npu_batch_invariant=None,
        **{f"parallelism_config.{key}": None for key in ("cp_backend", "sp_backend", "tp_handler", "cp_handler",
                                                         "sp_handler")},
    ),
    _refused(
        "it must be a mapping, or a JSON file that holds one",
        accelerator_config=None, parallelism_config=None,
        **{"accelerator_config.gradient_accumulation_kwargs": None},
    ),
    _refused_in_updates(
        "per_device_train_batch_size is what each device gets: leave this out, and divide that by the devices",
        **{"accelerator_config.split_batches": False}, split_batches=None,
    ),
    _ignored(
        "jtune lays out batches itself: the order of rows follows from seed, and an epoch has each row once",
        dispatch_batches=None,
        **{f"accelerator_config.{key}": value for key, value in {
            "dispatch_batches": None, "even_batches": True, "use_seedable_sampler": True, "data_seed": None,
            "non_blocking": False, "use_configured_state": False,
            "gradient_accumulation_kwargs.adjust_scheduler": True,
            "gradient_accumulation_kwargs.sync_with_dataloader": True,
            "gradient_accumulation_kwargs.sync_each_batch": False}.items()},
    ),
    _refused(
        "jtune reads a model in Hugging Face form: convert it, and set model_name_or_path",
        megatron_pretrained_checkpoint=None,
    ),
    _refused(
        "jtune does not know Megatron's settings: leave it out, and set the arguments that `jtune help all` lists",
        extra_config=None, additional_configs=None,
    ),
    _refused_in_updates(
        "every token reaches its experts: leave it out", moe_expert_capacity_factor=None,
    ),
    _ignored(
        "the router alone chooses experts, and drops no token",
        moe_pad_expert_input_to_capacity=None, moe_token_drop_policy=None, moe_enable_routing_replay=False,
    ),
    _refused_in_updates("only the next token is predicted: leave it out", mtp_num_layers=0),
    _refused_in_updates("it is an argument of Megatron: set optim, as in optim: sgd", optimizer="adam"),
    _ignored("`jtune export` merges an adapter into its model", save_merged_model=False),
    _ignored(
        "experts are not kept in host memory: mesh_fsdp and mesh_expert split them over the devices", use_kt=False
    ),
    _refused_in_updates("experts beside the model's own are not built: leave it out", kt_use_lora_experts=False),
    _ignored(
        "it belongs to KTransformers",
        kt_weight_path=None, kt_expert_checkpoint_path=None, kt_non_expert_weight_path=None, kt_cpu_activation=None,
        kt_lora_expert_num=None, kt_lora_expert_intermediate_size=None,
        kt_optimize_rule=None, kt_maxlen=4096, kt_use_cuda_graph=True, kt_mode="normal", kt_force_think=False,
        cpu_infer=32, chunk_size=8192, mode="normal", kt_config=None,
    ),
    # ---------------------------------------------------------------- kernels and numbers
    _ignored(
        "XLA compiles and fuses the whole step; final norm, head and loss run in chunks",
        use_unsloth=False, enable_liger_kernel=False, use_liger_kernel=False, liger_kernel_config=None,
        use_v1_kernels=False, torch_compile=False, torch_compile_backend=None, torch_compile_mode=None,
        torchdynamo=None, jit_mode_eval=False, bias_activation_fusion=None, apply_rope_fusion=None,
        masked_softmax_fusion=None, cross_entropy_loss_fusion=None, torch_empty_cache_steps=None, kernel_config=None,
    ),
    _ignored("evaluation computes in the dtype of training (bf16, fp16)", bf16_full_eval=False, fp16_full_eval=False),
    _ignored(
        "jtune has one implementation of it", half_precision_backend="auto", fp16_backend="auto", fp16_opt_level="O1"
    ),
    _ignored("set JAX_DEFAULT_MATMUL_PRECISION in the environment instead", tf32=None),
    _ignored("the order of rows and every random choice follow from seed", full_determinism=False),
    _ignored(
        "it belongs to fp8",
        fp8_backend="auto", fp8_enable_fsdp_float8_all_gather=False, fp8_recipe=None, fp8_param=False,
    ),
    _ignored("it follows from other arguments and from the model", compute_dtype=None, model_max_length=None,
             block_diag_attn=False, num_hidden_layers=32, padding_side="left"),
    # ---------------------------------------------------------------- model
    _ignored(
        "jtune never runs code of model repositories; if a model or a tokenizer needs it, an error says so",
        trust_remote_code=False,
    ),
    _refused_in_updates(
        "all rows of a table train: leave it out; resize_vocab with finetuning_type: lora trains tables and adapters",
        freeze_original_embeddings=False,
    ),
    _refused_in_updates(
        "it approximates attention over long rows, which jtune computes exactly without storing all scores: leave it "
        "out; mesh_context splits rows that are too long for one device",
        shift_attn=False,
    ),
    _refused_in_updates(
        "layers that skip tokens make a model that transformers does not load: leave it out; "
        "finetuning_type: freeze needs less compute, and a model with experts computes less per token",
        mixture_of_depths=None,
    ),
    _ignored("mesh_fsdp and mesh_tensor place weights on all devices", quantization_device_map=None),
    _ignored(
        "jtune trains on text only",
        image_max_pixels=589824, image_min_pixels=1024, image_do_pan_and_scan=False, crop_to_patches=False,
        video_max_pixels=65536, video_min_pixels=256, video_fps=2.0, video_maxlen=128, use_audio_in_video=False,
        audio_sampling_rate=16000, media_dir=None, freeze_vision_tower=True, freeze_multi_modal_projector=True,
        freeze_language_model=False, image_resolution=None, video_resolution=None, image_dir=None, visual_inputs=False,
        train_mm_proj_only=False, use_fast_processor=True,
    ),
    _ignored("jtune reads models from folders and from the Hugging Face hub", ms_hub_token=None, om_hub_token=None),
    _ignored("set hf_hub_token, or log in with `hf auth login`", use_auth_token=False),
    _ignored("jtune checks no versions of torch's libraries", disable_version_checking=False),
    # ---------------------------------------------------------------- export and hub
    _ignored("jtune merges adapters in host memory", export_device="cpu"),
    _refused_in(
        {"export"}, "quantised export is not built: leave it out, then quantise the folder",
        export_quantization_bit=None,
    ),
    _ignored(
        "it belongs to export_quantization_bit",
        export_quantization_dataset=None, export_quantization_nsamples=128, export_quantization_maxlen=1024,
    ),
    _ignored(
        "jtune writes weights as safetensors, which every version of transformers reads",
        export_legacy_format=False, save_safetensors=True,
    ),
    _ignored(
        "jtune uploads nothing: run `hf upload REPOSITORY FOLDER` afterwards",
        push_to_hub=False, export_hub_model_id=None,
    ),
    _ignored(
        "jtune uploads nothing",
        hub_token=None, hub_private_repo=None, hub_model_id=None, hub_strategy="every_save", hub_always_push=False,
        hub_revision=None, push_to_hub_model_id=None, push_to_hub_organization=None, push_to_hub_token=None,
    ),
    # ---------------------------------------------------------------- data
    _refused_in_training("padding never counts: leave it out", ignore_pad_token_for_loss=True),
    _ignored("no trainer of transformers reads it; train_sampling_strategy sets the order", sortish_sampler=False),
    _ignored("a resumed run continues at its place in the data", ignore_data_skip=False),
    _refused_in_training(
        "jtune cuts the whole row: leave it out, and set cutoff_len to the sum of max_source_length and "
        "max_target_length",
        max_source_length=None, max_target_length=None,
    ),
    _refused_in_training(
        "write it into the rows, or set default_system", source_prefix=None,
    ),
    _refused_in_training("set split for each set in dataset_info.json: leave this out", split="train"),
    _refused_in_training("cutoff_len is divided as in LLaMA-Factory 0.9: leave it out", reserved_label_len=1),
    _ignored(
        "jtune prefetches batches itself",
        dataloader_num_workers=0, dataloader_pin_memory=True, dataloader_persistent_workers=False,
        dataloader_prefetch_factor=None, dataloader_in_order=True, dataloader_multiprocessing_context=None,
        remove_unused_columns=True, label_names=None, length_column_name="length",
    ),
    # ---------------------------------------------------------------- adapters and optimizers
    _ignored("with pissa_init, jtune always writes a plain LoRA adapter", pissa_convert=False),
    _ignored("it belongs to OFT", module_dropout=0.0, oft_rank=0, oft_block_size=32, oft_target="all"),
    _refused_in_updates(
        "training one block of layers at a time is not built: leave it out; finetuning_type: freeze trains some fixed "
        "layers, and use_galore or optim: adafactor train all layers with a small state",
        use_badam=False,
    ),
    _ignored(
        "only the values galore_* and apollo_* of optim read it: set use_galore with galore_target, or use_apollo with "
        "apollo_target",
        optim_target_modules=None,
    ),
    _refused_in_updates("APOLLO's projection is random, as in its paper: leave it out", apollo_proj="random"),
    _refused_in_updates("APOLLO projects the smaller dimension only: leave it out", apollo_proj_type="std"),
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
        "it belongs to stage ppo, which is not built",
        ppo_buffer_size=1, ppo_epochs=4, ppo_score_norm=False, ppo_target=6.0, ppo_whiten_rewards=False,
        reward_model=None, reward_model_adapters=None, reward_model_type="lora", ppo_logger=None,
        reward_model_quantization_bit=None,
    ),
    # ---------------------------------------------------------------- loop, logs, evaluation
    _ignored(
        "jtune does not shrink batches: if memory runs out, halve per_device_train_batch_size and double "
        "gradient_accumulation_steps",
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
    _ignored(
        "profile_steps writes profiles, as in profile_steps: 10-12",
        enable_torch_profiler=False, profile_modules=None,
    ),
    _ignored(
        "it belongs to enable_torch_profiler",
        profiler_output_dir=None, profiler_wait_steps=1, profiler_warmup_steps=1, profiler_active_steps=1,
        profiler_repeat=1, profiler_record_shapes=True, profiler_profile_memory=True, profiler_with_stack=True,
    ),
    _ignored("`jtune eval CASE.yaml --tasks NAME` runs benchmarks", task=None),
    _ignored(
        "it belongs to task",
        task_dir="evaluation", batch_size=4, lang="en", n_shot=5, save_dir=None,
        download_mode="reuse_dataset_if_exists",
    ),
    # ---------------------------------------------------------------- answers
    _refused_in(
        TRAINING | {"chat", "eval"},
        "answers are sampled by temperature, top_k, top_p and repetition_penalty, or searched with num_beams and "
        "length_penalty: leave it out",
        min_length=0, min_new_tokens=None, early_stopping=False, no_repeat_ngram_size=0, typical_p=1.0,
        epsilon_cutoff=0.0, eta_cutoff=0.0, top_h=None, penalty_alpha=None, diversity_penalty=0.0, num_beam_groups=1,
        num_return_sequences=1, guidance_scale=None, encoder_repetition_penalty=1.0, encoder_no_repeat_ngram_size=0,
        bad_words_ids=None, force_words_ids=None, constraints=None, sequence_bias=None, suppress_tokens=None,
        begin_suppress_tokens=None, forced_bos_token_id=None, forced_eos_token_id=None, forced_decoder_ids=None,
        exponential_decay_length_penalty=None, watermarking_config=None, dola_layers=None, token_healing=False,
        renormalize_logits=False, stop_strings=None, generation_kwargs=None,
    ),
    _refused_in(
        TRAINING | {"chat", "eval"}, "set it in the model's generation_config.json",
        min_p=None, eos_token_id=None, bos_token_id=None, pad_token_id=None, decoder_start_token_id=None,
    ),
    _ignored(
        "jtune generates answers itself",
        cache_implementation=None, cache_config=None, max_cache_len=None, low_memory=None, prefill_chunk_size=None,
        compile_config=None, disable_compile=False, continuous_batching_config=None, max_time=None, use_mtp=None,
        prompt_lookup_num_tokens=None, max_matching_ngram_size=None, is_assistant=False, num_assistant_tokens=None,
        num_assistant_tokens_schedule=None, assistant_confidence_threshold=None, assistant_early_exit=None,
        assistant_ensemble_weight=None, assistant_lookbehind=None, target_lookbehind=None, speculation_type=None,
        output_attentions=False, output_hidden_states=False, output_scores=False, output_logits=False,
        return_dict_in_generate=False, return_legacy_cache=None, remove_invalid_values=False,
    ),
    # ---------------------------------------------------------------- LLaMA-Factory's second engine
    _refused(
        "it belongs to LLaMA-Factory's v1 engine, whose arguments, data and batches are others: write the case with "
        "model_name_or_path, dataset, finetuning_type and so on",
        model=None, model_class=None, init_config=None, peft_config=None, quant_config=None, train_dataset=None,
        dist_config=None, optim_config=None, lr_scheduler_config=None, batching_strategy=None, global_batch_size=None,
        save_epochs=None, mtp_config=None,
    ),
    _ignored(
        "it belongs to LLaMA-Factory's v1 engine", sample_backend=None, batching_workers=16, save_ckpt_as_hf=False
    ),
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


def verdict(name: str, value: Any, command: str) -> Group | None:
    """The group that says why a foreign argument is ignored or refused; None if it is accepted silently."""
    group = FOREIGN[name]
    if is_inert(name, value):
        return None
    if group.refused and group.commands is not None and command not in group.commands:
        return None
    return group
