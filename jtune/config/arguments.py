"""The arguments that jtune honours: names and defaults of LLaMA-Factory and Hugging Face, then jtune's own.

Every field has a type (checked on every path), a meaning, and perhaps a range. A list in this file is a tuple of
strings: a YAML list, or one string with commas; empty by default.
"""

# ruff: noqa: RUF009  (`arg` returns a field, as dataclasses.field does)

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from jtune.config.fields import (
    BELOW_ONE,
    BITS,
    HELD_OUT,
    POSITIVE,
    ROPES,
    SEED,
    SHARE,
    SIZE_OR_REST,
    STEPS,
    UP_TO_HALF,
    UPDATES,
    arg,
    at_least,
)
from jtune.config.preference import LOSSES
from jtune.config.stages import RULES

Names = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """The model, how jtune reads it, and where it exports it."""

    model_name_or_path: str | None = arg(None, "the model: a folder in Hugging Face form, or a hub id")
    adapter_name_or_path: Names = arg((), "LoRA adapters, a list: merged in order; training continues the last one")
    adapter_folder: str | None = arg(None, "the folder inside the adapter's repository")
    cache_dir: str | None = arg(None, "folder for downloads; default: the hub's cache")
    model_revision: str = arg("main", "branch, tag or commit on the hub")
    hf_hub_token: str | None = arg(None, "token for gated models; better: the HF_TOKEN variable", secret=True)
    split_special_tokens: bool = arg(
        False, "read special tokens in the text of rows as plain text; the template's own stay special"
    )
    resize_vocab: bool = arg(False, "add rows to embeddings and head for tokens that have none")
    add_tokens: Names = arg(
        (), "tokens to add to the tokenizer, a list; the model gets rows for them, as with resize_vocab"
    )
    add_special_tokens: Names = arg((), "the same, for special tokens: answers are shown without them")
    new_special_tokens_config: str | None = arg(
        None, "a YAML file of `token: description`, instead of add_special_tokens"
    )
    init_special_tokens: Literal["noise_init", "desc_init", "desc_init_w_noise"] = arg(
        "noise_init",
        "new rows: the mean of the others plus noise; the mean of the description's tokens; the same plus noise",
    )
    train_from_scratch: bool = arg(False, "start from random weights in the shapes of the model's config.json")
    rope_scaling: str | None = arg(
        None,
        "rows of cutoff_len may be longer than the model knows: scale its rotations (chat: for twice as many)",
        ROPES,
    )
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "fa3"] = arg(
        "auto", "auto: the best attention kernel of the platform; disabled: plain XLA"
    )
    disable_gradient_checkpointing: bool = arg(False, "keep all activations: faster, more memory (see remat)")
    moe_aux_loss_coef: float | None = arg(None, "weight of the loss that spreads tokens over experts", at_least(0))
    quantization_bit: int | None = arg(None, "store the layers' kernels in 4 or 8 bits: QLoRA", BITS)
    quantization_type: Literal["nf4", "fp4"] = arg(
        "nf4", "the 16 values of 4 bits: quantiles of a normal distribution, or floats"
    )
    double_quantization: bool = arg(True, "store the scales of 4 bits in 8 bits")
    quantization_method: Literal["bnb", "hqq", "eetq"] = arg("bnb", "bnb: 4 or 8 bits; eetq: 8 bits, as bnb")
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = arg("auto", "dtype of chat and export")
    print_param_status: bool = arg(False, "list every parameter: dtype, shape, whether it trains")
    export_dir: str | None = arg(None, "folder in which `jtune export` writes the merged model")
    export_size: int = arg(5, "gigabytes per weight file of the export, at most", at_least(1))

    @property
    def hub(self) -> dict[str, Any]:
        """The arguments of a download besides the id."""
        return {"revision": self.model_revision, "cache_dir": self.cache_dir, "token": self.hf_hub_token}


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """The rows, and how they become tokens."""

    template: str | None = arg(None, "chat template by LLaMA-Factory's name; default: the tokenizer's own")
    dataset: Names = arg((), "training sets, a list of names in dataset_info.json")
    eval_dataset: Names = arg((), "evaluation sets, a list of names in dataset_info.json")
    dataset_dir: str = arg("data", "the folder that holds dataset_info.json")
    allow_outside_dataset_dir: bool = arg(
        False, "files that dataset_info.json names, and targets of links, may lie outside dataset_dir"
    )
    cutoff_len: int = arg(2048, "tokens per row, at most; a packed row has exactly as many", at_least(2))
    overlong: Literal["truncate", "drop", "split", "error"] = arg(
        "truncate",
        "rows longer than cutoff_len: cut, drop, split into several rows (stages sft, pt), or stop with an error",
    )
    max_dropped: int | float = arg(0.5, "stop if more rows than this are dropped: a share, or a number", at_least(0))
    train_on_prompt: bool = arg(False, "train on prompts too (stage sft)")
    mask_history: bool = arg(False, "train on the last answer of a conversation only (stage sft)")
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = arg(
        "concat",
        "concat: one set after the other; interleave_*: draw by interleave_probs until one set, or all, are used up",
    )
    interleave_probs: tuple[float, ...] = arg((), "a probability for each set, for mix_strategy interleave_*")
    tokenized_path: str | None = arg(None, "a folder for the encoded sets: written if it is empty, otherwise read")
    overwrite_cache: bool = arg(False, "encode again, even if the cache has the rows")
    tokenizer_backend: Literal["huggingface", "gigatoken"] = arg(
        "huggingface", "the tokenizer library; gigatoken gives the same ids, faster (pip install 'jtune-llm[fast]')"
    )
    preprocessing_batch_size: int = arg(1000, "rows per batch of encoding", at_least(1))
    preprocessing_num_workers: int | None = arg(None, "number of processes that encode", at_least(1))
    max_samples: int | None = arg(None, "use only the first rows of each set, as many as this", at_least(1))
    streaming: bool = arg(False, "read rows during training, not before it; needs max_steps")
    buffer_size: int = arg(16384, "streaming: number of rows that are shuffled and packed together", at_least(1))
    val_size: int | float = arg(0.0, "rows of `dataset` to hold out for evaluation: a share, or a number", HELD_OUT)
    eval_on_each_dataset: bool = arg(False, "one loss for each evaluation set: eval_<name>_loss")
    packing: bool | None = arg(
        None, "put several examples into a row; they do not see each other; default: only in stage pt"
    )
    neat_packing: bool = arg(False, "packing; in stage pt, documents in a row do not see each other")
    tool_format: str | None = arg(None, "the format of tools; default: the template's")
    default_system: str | None = arg(None, "system message for rows without one; default: the template's")
    enable_thinking: bool | None = arg(True, "thinking models: answers include their thoughts")
    preserve_thinking: bool = arg(False, "keep the thoughts of earlier turns")

    def __post_init__(self):
        if self.neat_packing:
            object.__setattr__(self, "packing", True)


@dataclass(frozen=True, kw_only=True)
class FinetuningArguments:
    """The parameters that train, and the loss."""

    stage: Literal[tuple(RULES)] = arg(  # type: ignore[valid-type]
        "sft", "pt: plain text; sft: prompts and answers; rm: a reward model; dpo: pairs; kto: feedback"
    )
    finetuning_type: Literal["lora", "freeze", "full", "oft"] = arg(
        "lora", "what trains: adapters, some layers, or all"
    )
    pure_bf16: bool = arg(
        False, "trainable parameters in bfloat16 too, with stochastic rounding so that small updates count"
    )
    freeze_trainable_layers: int = arg(
        2, "freeze: how many layers train, counted from the last; negative: from the first"
    )
    freeze_trainable_modules: Names = arg(("all",), "freeze: modules of these layers that train, a list, or all")
    freeze_extra_modules: Names = arg((), "freeze: modules outside the layers that train too, a list")
    use_llama_pro: bool = arg(
        False,
        "LLaMA Pro: only the freeze_trainable_layers that the expansion added train, or get adapters",
    )
    additional_target: Names = arg((), "lora: modules that train whole, saved with the adapter, a list")
    lora_rank: int = arg(8, "rank of the adapters", at_least(1))
    lora_alpha: int | None = arg(None, "adapters are scaled by alpha / rank; default: 2 * rank", at_least(0))
    lora_dropout: float = arg(0.0, "dropout on the input of adapters", BELOW_ONE)
    lora_target: Names = arg(("all",), "modules that get an adapter, a list, or all linear ones of the layers")
    use_rslora: bool = arg(False, "scale by alpha / sqrt(rank) (arXiv:2312.03732)")
    use_dora: bool = arg(False, "weight-decomposed adapters (arXiv:2402.09353): magnitudes train separately")
    pissa_init: bool = arg(False, "initialise adapters with the largest singular values (arXiv:2404.02948)")
    pissa_iter: int = arg(16, "pissa_init: iterations of the decomposition; -1: exact", SIZE_OR_REST)
    rank_pattern: dict[str, Any] | None = arg(None, "lora_rank of single modules: {down_proj: 16}")
    alpha_pattern: dict[str, Any] | None = arg(None, "lora_alpha of single modules: {down_proj: 32}")
    loraplus_lr_ratio: float | None = arg(
        None, "LoRA+ (arXiv:2402.12354): learning rate of adapters' b and of vectors, divided by that of a", POSITIVE
    )
    loraplus_lr_embedding: float = arg(1e-6, "LoRA+: learning rate of the b of an embedding's adapter", at_least(0))
    create_new_adapter: bool = arg(False, "merge the given adapters and train a new one")
    use_galore: bool = arg(
        False, "GaLore (arXiv:2403.03507): optimizer moments in a subspace of each matrix's gradient"
    )
    galore_target: Names = arg(("all",), "modules that GaLore projects, a list, or all linear ones of the layers")
    galore_rank: int = arg(16, "GaLore: dimensions of the subspace", at_least(1))
    galore_update_interval: int = arg(200, "GaLore: updates between subspaces", at_least(1))
    galore_scale: float = arg(2.0, "GaLore: factor of the projected update", POSITIVE)
    galore_proj_type: Literal["std", "reverse_std", "right", "left"] = arg(
        "std", "GaLore: std projects the smaller dimension, reverse_std the larger, right the input, left the output"
    )
    galore_layerwise: bool = arg(
        False, "GaLore: no max_grad_norm and no gradient_accumulation_steps, as if each layer were updated on its own"
    )
    use_apollo: bool = arg(
        False, "APOLLO (arXiv:2412.05270): scale gradients by channel, by moments in a random subspace"
    )
    apollo_target: Names = arg(("all",), "modules that APOLLO scales, a list, or all linear ones of the layers")
    apollo_rank: int = arg(16, "APOLLO: dimensions of the subspace", at_least(1))
    apollo_update_interval: int = arg(200, "APOLLO: updates between subspaces", at_least(1))
    apollo_scale: float = arg(32.0, "APOLLO: updates are multiplied by its square root", POSITIVE)
    apollo_scale_type: Literal["channel", "tensor"] = arg("channel", "APOLLO: one factor per channel, or per tensor")
    apollo_layerwise: bool = arg(False, "APOLLO: the same as galore_layerwise")
    use_adam_mini: bool = arg(False, "Adam-mini (arXiv:2406.16793): one second moment per head, neuron or token")
    use_muon: bool = arg(False, "Muon (arXiv:2502.16982) for matrices, AdamW for embeddings, heads and vectors")
    use_dft_loss: bool = arg(False, "weight each token's loss by its probability (DFT, arXiv:2508.05629)")
    use_eaft_loss: bool = arg(False, "weight each token's loss by the model's uncertainty (EAFT, arXiv:2601.02151)")
    eaft_alpha: float = arg(1.0, "use_eaft_loss: exponent of that weight; 0: plain cross-entropy", at_least(0))
    use_asft_loss: bool = arg(
        False, "DFT with a penalty on the divergence from the model at the start (ASFT, arXiv:2509.23753)"
    )
    asft_alpha: float = arg(0.1, "use_asft_loss: weight of that penalty", at_least(0))
    pref_loss: Names = arg(("sigmoid",), f"stage dpo: the loss, or a list of losses to add up: {', '.join(LOSSES)}")
    pref_loss_weights: tuple[float, ...] = arg((), "pref_loss: a weight for each loss; default: 1 each")
    pref_beta: float = arg(0.1, "stages dpo, kto: how strongly the loss holds to the reference", POSITIVE)
    pref_ftx: float = arg(0.0, "stages dpo, kto: weight of the cross-entropy of chosen answers, added", at_least(0))
    pref_bco_weight: float = arg(0.0, "stage dpo: weight of the BCO loss beside pref_loss (as in MPO)", at_least(0))
    dpo_label_smoothing: float = arg(
        0.0, "stage dpo: share of pairs whose labels are expected to be swapped", UP_TO_HALF
    )
    simpo_gamma: float = arg(0.5, "pref_loss: simpo: the margin between rewards that it asks for", at_least(0))
    discopop_tau: float = arg(0.05, "pref_loss: discopop: temperature of its blend of two losses", POSITIVE)
    ld_alpha: float | None = arg(
        None, "stage dpo: weight of an answer's tokens beyond the shorter answer's length (arXiv:2409.06411)", SHARE
    )
    kto_chosen_weight: float = arg(1.0, "stage kto: weight of good answers", at_least(0))
    kto_rejected_weight: float = arg(1.0, "stage kto: weight of bad answers", at_least(0))
    rm_center_coef: float = arg(
        0.0,
        "stage rm: weight of (sum of a pair's scores)^2, which centres scores (arXiv:2312.09244: 0.01)",
        at_least(0),
    )
    ref_model: str | None = arg(None, "stages dpo, kto: the reference model; default: the model at the start")
    ref_model_adapters: Names = arg((), "LoRA adapters of the reference, a list: merged in order")
    ref_model_quantization_bit: int | None = arg(None, "store the kernels of ref_model in 4 or 8 bits", BITS)
    ref_adapter: Literal["base", "start"] = arg(
        "base", "lora without ref_model: the reference is the base alone, or with the given adapter as it was (start)"
    )
    precompute_ref_log_probs: bool | None = arg(
        None, "compute the reference once, before the first update; default: where it gives the same loss"
    )
    teacher_model: str | None = arg(None, "stages sft, pt: learn the distributions of this model (distillation)")
    teacher_model_adapters: Names = arg((), "LoRA adapters of the teacher, a list: merged in order")
    teacher_model_quantization_bit: int | None = arg(None, "store the kernels of teacher_model in 4 or 8 bits", BITS)
    distill_loss: Literal["forward", "reverse", "js"] = arg(
        "forward", "divergence from the teacher: KL(teacher, model), KL(model, teacher), or Jensen-Shannon"
    )
    distill_beta: float = arg(0.5, "distill_loss: js: the teacher's share of the mixture", SHARE)
    distill_temperature: float = arg(1.0, "teacher_model: temperature of both distributions", POSITIVE)
    distill_weight: float = arg(1.0, "teacher_model: share of the distillation loss; the rest is cross-entropy", SHARE)
    compute_accuracy: bool = arg(False, "measure token accuracy at evaluation")
    disable_shuffling: bool = arg(False, "keep rows in the order of the file")
    early_stopping_steps: int | None = arg(None, "stop after this many evaluations without improvement", at_least(1))
    plot_loss: bool = arg(False, "draw training_loss.png; jtune always does")
    include_effective_tokens_per_second: bool = arg(
        False, "add effective_tokens_per_sec to the results: tokens per second without padding"
    )

    def __post_init__(self):
        if not self.lora_alpha:  # null and 0 alike, as in LLaMA-Factory
            object.__setattr__(self, "lora_alpha", 2 * self.lora_rank)


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """The run: batches, optimizer, schedule, logging, evaluation, checkpoints; then jtune's own arguments."""

    output_dir: str = arg("trainer_output", "folder for everything that the run writes")
    overwrite_output_dir: bool = arg(
        False,
        "replace the content of output_dir; but resume this run if it is there (unless resume_from_checkpoint: false)",
    )
    do_train: bool = arg(False, "train")
    do_eval: bool = arg(False, "evaluate at the end; implied by eval_strategy")
    do_predict: bool = arg(
        False, "at the end, answer the evaluation sets (stage rm: score them): generated_predictions.jsonl"
    )
    predict_with_generate: bool = arg(
        False, "evaluation also generates answers, and measures BLEU and ROUGE (stage sft)"
    )
    per_device_train_batch_size: int = arg(8, "examples per device and batch", at_least(1))
    per_device_eval_batch_size: int = arg(8, "the same at evaluation", at_least(1))
    gradient_accumulation_steps: int = arg(1, "batches per update", at_least(1))
    learning_rate: float = arg(5e-5, "the peak learning rate", at_least(0))
    weight_decay: float = arg(0.0, "weight decay, except on norms and biases (Muon: on all)", at_least(0))
    adam_beta1: float = arg(0.9, "decay rate of the first moment", BELOW_ONE)
    adam_beta2: float = arg(0.999, "decay rate of the second moment", BELOW_ONE)
    adam_epsilon: float = arg(1e-8, "added to the root of the second moment", at_least(0))
    max_grad_norm: float = arg(1.0, "scale gradients down to this norm; 0: never", at_least(0))
    label_smoothing_factor: float = arg(0.0, "probability of each label to spread over the vocabulary", BELOW_ONE)
    neftune_noise_alpha: float | None = arg(
        None, "noise on the embeddings in training: +-alpha / sqrt(length * width) (arXiv:2310.05914)", at_least(0)
    )
    num_train_epochs: float = arg(3.0, "passes over the rows", POSITIVE)
    max_steps: int = arg(
        -1, "number of updates, instead of num_train_epochs", SIZE_OR_REST._replace(text="at least 1, or -1")
    )
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ] = arg("linear", "learning-rate schedule")
    lr_scheduler_kwargs: dict[str, Any] | None = arg(None, "options of the schedule: num_cycles, min_lr, ...")
    warmup_ratio: float | None = arg(None, "warm-up, as a share of the updates", SHARE)
    warmup_steps: int | float = arg(0, "warm-up, as a number of updates; below 1 a share", STEPS)
    optim: str = arg("adamw_torch_fused", "the optimizer by Hugging Face's name: see docs/methods.md")
    optim_args: str | None = arg(None, "options of the optimizer: key=value,key=value")
    adafactor: bool = arg(False, "the same as optim: adafactor")
    logging_strategy: Literal["no", "steps", "epoch"] = arg("steps", "when to log")
    logging_steps: int | float = arg(500, "updates between logs; below 1 a share of the run", STEPS)
    logging_first_step: bool = arg(False, "log the first update too")
    logging_dir: str | None = arg(None, "TensorBoard's folder; default: output_dir/runs")
    eval_strategy: Literal["no", "steps", "epoch"] = arg("no", "when to evaluate")
    eval_steps: int | float | None = arg(None, "updates between evaluations; default: logging_steps", STEPS)
    eval_on_start: bool = arg(False, "evaluate before the first update")
    eval_delay: int | float = arg(0, "updates (or epochs, as eval_strategy) before the first evaluation", at_least(0))
    save_strategy: Literal["no", "steps", "epoch", "best"] = arg("steps", "when to save a checkpoint")
    save_steps: int | float = arg(500, "updates between checkpoints; below 1 a share of the run", STEPS)
    save_total_limit: int | None = arg(None, "number of checkpoints to keep; default: all", at_least(1))
    save_only_model: bool = arg(
        False, "save only the model, without the state to resume from, unless the run is told to stop"
    )
    load_best_model_at_end: bool = arg(False, "at the end, write the model of the best checkpoint, not of the last")
    metric_for_best_model: str | None = arg(None, "metric of the best checkpoint: loss (default), accuracy, <set>_loss")
    greater_is_better: bool | None = arg(None, "whether a greater metric is better; default: yes, except for a loss")
    resume_from_checkpoint: str | bool | None = arg(None, "a checkpoint folder; true: output_dir's last; false: none")
    seed: int = arg(42, "seed of every random choice", SEED)
    data_seed: int | None = arg(None, "seed of the order of rows; default: seed", SEED)
    bf16: bool = arg(False, "compute in bfloat16; trainable parameters stay float32")
    fp16: bool = arg(False, "compute in float16 with loss scaling")
    use_cpu: bool = arg(False, "do not use an accelerator")
    report_to: Names = arg(
        (), "trackers, a list: tensorboard, wandb, mlflow, swanlab, trackio, all that are installed (all), none"
    )
    run_name: str | None = arg(
        None, "name of the run in trackers and in training_loss.png; default: the tracker makes one up; output_dir"
    )
    project: str = arg("huggingface", "project in wandb (default: WANDB_PROJECT) and trackio, experiment in mlflow")
    trackio_space_id: str | None = arg(None, "trackio: the Space to report to; default: a folder on this machine")
    use_swanlab: bool = arg(False, "the same as report_to: swanlab")
    swanlab_project: str = arg("llamafactory", "SwanLab: the project")
    swanlab_workspace: str | None = arg(None, "SwanLab: the workspace; default: the user's")
    swanlab_run_name: str | None = arg(None, "SwanLab: name of the run; default: run_name")
    swanlab_mode: Literal["cloud", "local", "offline", "disabled"] = arg(
        "cloud", "SwanLab: where the run goes; default: SWANLAB_MODE, or cloud"
    )
    swanlab_api_key: str | None = arg(None, "SwanLab: the key; better: the SWANLAB_API_KEY variable", secret=True)
    swanlab_logdir: str | None = arg(None, "SwanLab: folder of its files; default: swanlog")
    disable_tqdm: bool | None = arg(None, "no progress bar; default: a bar only on a terminal")
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = arg(
        "random",
        "the order of rows: shuffled; as in the file, as with disable_shuffling; shuffled, but with rows of similar "
        "length together",
    )
    dataloader_drop_last: bool = arg(False, "drop the last batch of an epoch if it is not full")
    include_num_input_tokens_seen: Literal["no", "all", "non_padding"] = arg(
        "no", "log the number of tokens so far; true: all"
    )

    # jtune's own arguments.
    mesh_data: int = arg(1, "number of copies of the model; each takes other rows", SIZE_OR_REST)
    mesh_fsdp: int = arg(-1, "devices to split rows, parameters and optimizer state over", SIZE_OR_REST)
    mesh_tensor: int = arg(1, "devices to split each matrix product over", SIZE_OR_REST)
    mesh_context: int = arg(1, "devices to split the tokens of each row over", SIZE_OR_REST)
    mesh_expert: int = arg(1, "devices to split experts over; they take other rows", SIZE_OR_REST)
    eval_samples: int = arg(0, "at each evaluation, show answers to the first examples, as many as this", at_least(0))
    remat: Literal["auto", "none", "dots", "attention", "full", "offload"] = arg(
        "auto",
        "what the backward pass recomputes: nothing, all but matrix products (dots), all but attention, whole layers "
        "(full), or whole layers with their inputs in host memory (offload); auto: as little as memory allows",
    )
    profile_steps: str | None = arg(None, "updates to profile, for TensorBoard and Perfetto: first-last", UPDATES)
    compile_cache_dir: str | None = arg(None, "folder for compiled programs; default: ~/.cache/jtune/compiled")

    def __post_init__(self):
        if self.eval_strategy != "no":
            object.__setattr__(self, "do_eval", True)
        if not self.eval_steps:
            object.__setattr__(self, "eval_steps", self.logging_steps)


@dataclass(frozen=True, kw_only=True)
class GeneratingArguments:
    """How jtune samples answers."""

    do_sample: bool = arg(True, "sample; false: always take the likeliest token")
    temperature: float = arg(0.95, "below 1 sharpens the distribution", at_least(0))
    top_p: float = arg(0.7, "sample from the likeliest tokens that have this probability together", SHARE)
    top_k: int = arg(50, "sample from this many likeliest tokens; 0 or -1: from all", at_least(-1))
    num_beams: int = arg(1, "width of beam search; 1: no search", at_least(1))
    max_length: int = arg(
        1024, "tokens of prompt and answer together; used only if max_new_tokens is not above 0", at_least(1)
    )
    max_new_tokens: int = arg(1024, "tokens of the answer", at_least(-1))
    repetition_penalty: float = arg(1.0, "above 1 discourages repetition", POSITIVE)
    length_penalty: float = arg(1.0, "above 0 favours longer beams")
    skip_special_tokens: bool = arg(True, "leave special tokens out of the answer")


SECTIONS: dict[str, type] = {
    "model": ModelArguments,
    "data": DataArguments,
    "finetuning": FinetuningArguments,
    "training": TrainingArguments,
    "generating": GeneratingArguments,
}

# Name of every honoured argument -> its field. Names are unique over the sections.
FIELDS: dict[str, dataclasses.Field] = {
    field.name: field for section in SECTIONS.values() for field in dataclasses.fields(section)
}
