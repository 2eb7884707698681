"""The arguments that jtune honours: names and defaults of LLaMA-Factory and Hugging Face, then our own.

Every field says its type (checked on every path), what it means, and the range it must lie in. `A list` in this file is
a tuple of strings: a YAML list, or one string with commas; empty when nothing is given.
"""

# ruff: noqa: RUF009  (`arg` returns a field, as dataclasses.field does)

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jtune.config.stages import RULES


class Range(NamedTuple):
    """A condition on a value that is not null, and how an error message says it."""

    text: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Range:
    return Range(f"at least {low}", lambda x: x >= low)


POSITIVE = Range("above 0", lambda x: x > 0)
SHARE = Range("between 0 and 1", lambda x: 0 <= x <= 1)
BELOW_ONE = Range("at least 0 and below 1", lambda x: 0 <= x < 1)
SEED = Range("a whole number from 0 to 4294967295", lambda x: 0 <= x < 2**32)
STEPS = Range("a whole number of steps, or below 1 a share of the run", lambda x: x >= 0 and (x < 1 or x == int(x)))
HELD_OUT = Range("a share below 1, or a whole number of rows", lambda x: 0 <= x < 1 or x == int(x) >= 1)


def is_range(text: str) -> bool:
    """
    >>> is_range("10-12"), is_range("12-10"), is_range("10"), is_range("0-3")
    (True, False, False, False)
    """
    match = re.fullmatch(r"([1-9]\d*)-([1-9]\d*)", text)
    return match is not None and int(match[1]) <= int(match[2])


UPDATES = Range("first-last, as in 10-12", is_range)
BITS = Range("4 or 8", lambda x: x in (4, 8))
SIZE_OR_REST = Range("at least 1, or -1 for what is left", lambda x: x == -1 or x >= 1)


def arg(default: Any, doc: str, within: Range | None = None, *, secret: bool = False) -> Any:
    """A dataclass field with its meaning; `secret` values are never printed."""
    metadata = {"doc": doc, "within": within, "secret": secret}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


Names = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Which model, how it is read, and where it is exported to."""

    model_name_or_path: str | None = arg(None, "the model: a folder in Hugging Face form, or a hub id")
    adapter_name_or_path: Names = arg((), "LoRA adapters, a list: merged in order, the last goes on being trained")
    adapter_folder: str | None = arg(None, "the folder inside the adapter's repository")
    cache_dir: str | None = arg(None, "where downloads are kept; default: the hub's cache")
    model_revision: str = arg("main", "branch, tag or commit on the hub")
    hf_hub_token: str | None = arg(None, "token for gated models; better: the HF_TOKEN variable", secret=True)
    split_special_tokens: bool = arg(False, "special tokens in the text of rows are text; the template's own are not")
    resize_vocab: bool = arg(False, "give embeddings and head rows for tokens that the model has none for")
    add_tokens: Names = arg((), "tokens added to the tokenizer, a list; with rows for them, as with resize_vocab")
    add_special_tokens: Names = arg((), "the same, for special tokens: left out when an answer is shown")
    new_special_tokens_config: str | None = arg(
        None, "a YAML file, token: description, in the place of add_special_tokens"
    )
    init_special_tokens: Literal["noise_init", "desc_init", "desc_init_w_noise"] = arg(
        "noise_init",
        "new rows: mean of the others and noise; mean of the description's tokens; the same and noise",
    )
    train_from_scratch: bool = arg(False, "random weights in the shape of the model's config.json")
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "fa3"] = arg(
        "auto", "auto: the best attention kernel of the platform; disabled: plain XLA"
    )
    disable_gradient_checkpointing: bool = arg(False, "keep all activations: faster, more memory (see remat)")
    moe_aux_loss_coef: float | None = arg(None, "weight of the loss that spreads tokens over experts", at_least(0))
    quantization_bit: int | None = arg(None, "keep the layers' kernels in 4 or 8 bits: QLoRA", BITS)
    quantization_type: Literal["nf4", "fp4"] = arg("nf4", "the 16 values of 4 bits: a normal distribution's, or floats")
    double_quantization: bool = arg(True, "keep the scales of 4 bits in 8 bits, too")
    quantization_method: Literal["bnb", "hqq", "eetq"] = arg("bnb", "bnb: 4 or 8 bits; eetq: the same 8 bits")
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = arg("auto", "dtype of chat and export")
    print_param_status: bool = arg(False, "list every parameter: dtype, shape, whether it trains")
    export_dir: str | None = arg(None, "where `jtune export` writes the merged model")
    export_size: int = arg(5, "gigabytes in one weight file of the export", at_least(1))

    @property
    def hub(self) -> dict[str, Any]:
        """What a download needs besides the id."""
        return {"revision": self.model_revision, "cache_dir": self.cache_dir, "token": self.hf_hub_token}


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Which rows, and how they become tokens."""

    template: str | None = arg(None, "chat template by LLaMA-Factory's name; default: the tokenizer's own")
    dataset: Names = arg((), "training sets, a list of names in dataset_info.json")
    eval_dataset: Names = arg((), "evaluation sets, a list of names in dataset_info.json")
    dataset_dir: str = arg("data", "the folder that holds dataset_info.json")
    allow_outside_dataset_dir: bool = arg(
        False, "what dataset_info.json names, and where links lead, may lie outside dataset_dir"
    )
    cutoff_len: int = arg(2048, "tokens in a row at most; a packed row has exactly as many", at_least(2))
    overlong: Literal["truncate", "drop", "split", "error"] = arg(
        "truncate", "rows longer than cutoff_len: cut, left out, made several rows (stages sft, pt), or an error"
    )
    max_dropped: int | float = arg(0.5, "the run stops if more rows are left out: a share, or a number", at_least(0))
    train_on_prompt: bool = arg(False, "count the loss on prompts too (stage sft)")
    mask_history: bool = arg(False, "count the loss on the last answer of a conversation only (stage sft)")
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = arg(
        "concat",
        "concat: one set after the other; interleave_*: drawn by interleave_probs until one, or all, are used up",
    )
    interleave_probs: tuple[float, ...] = arg((), "one probability for each set, with mix_strategy interleave_*")
    tokenized_path: str | None = arg(None, "a folder for the encoded sets: written if it is empty, else read")
    overwrite_cache: bool = arg(False, "encode again even if it was done before")
    tokenizer_backend: Literal["huggingface", "gigatoken"] = arg(
        "huggingface", "what tokenises; gigatoken gives the same ids, sooner (pip install 'jtune[fast]')"
    )
    preprocessing_batch_size: int = arg(1000, "rows encoded at a time", at_least(1))
    preprocessing_num_workers: int | None = arg(None, "processes that encode", at_least(1))
    max_samples: int | None = arg(None, "the first so many rows of each set", at_least(1))
    streaming: bool = arg(False, "read rows while training, not all of them before; needs max_steps")
    buffer_size: int = arg(16384, "streaming: rows that are shuffled and packed together", at_least(1))
    val_size: int | float = arg(0.0, "rows of `dataset` held out for evaluation: a share, or a number", HELD_OUT)
    eval_on_each_dataset: bool = arg(False, "one loss for each evaluation set: eval_<name>_loss")
    packing: bool | None = arg(None, "several examples in a row, which do not see each other; default: only stage pt")
    neat_packing: bool = arg(False, "packing; in stage pt each document is a segment of its own")
    tool_format: str | None = arg(None, "how tools are written, if not as the template does")
    default_system: str | None = arg(None, "system message where a row has none, if not the template's")
    enable_thinking: bool | None = arg(True, "thinking models: answers come with their thoughts")
    preserve_thinking: bool = arg(False, "keep the thoughts of earlier turns")

    def __post_init__(self):
        if self.neat_packing:
            object.__setattr__(self, "packing", True)


@dataclass(frozen=True, kw_only=True)
class FinetuningArguments:
    """What is trained, and towards what."""

    stage: Literal[tuple(RULES)] = arg("sft", "pt: plain text; sft: prompts and answers")  # type: ignore[valid-type]
    finetuning_type: Literal["lora", "freeze", "full", "oft"] = arg("lora", "what trains: adapters, some layers, all")
    pure_bf16: bool = arg(False, "trainable parameters in bfloat16 too, rounded at random so that they do not stall")
    freeze_trainable_layers: int = arg(2, "freeze: how many layers train, the last ones; negative: the first ones")
    freeze_trainable_modules: Names = arg(("all",), "freeze: which modules of these layers, a list, or all")
    freeze_extra_modules: Names = arg((), "freeze: modules outside the layers that train too, a list")
    use_llama_pro: bool = arg(
        False,
        "LLaMA Pro: of an expanded model, only the freeze_trainable_layers that were added train, or get adapters",
    )
    additional_target: Names = arg((), "lora: modules that train whole and are saved with the adapter, a list")
    lora_rank: int = arg(8, "rank of the adapters", at_least(1))
    lora_alpha: int | None = arg(None, "adapters are scaled by alpha / rank; default: twice the rank", at_least(0))
    lora_dropout: float = arg(0.0, "dropout on the adapters' input", BELOW_ONE)
    lora_target: Names = arg(("all",), "modules that get an adapter, a list, or all linear ones of the layers")
    use_rslora: bool = arg(False, "scale by alpha / sqrt(rank) (arXiv:2312.03732)")
    use_dora: bool = arg(False, "weight-decomposed adapters (arXiv:2402.09353): directions and magnitudes apart")
    pissa_init: bool = arg(False, "adapters start from the largest singular values (arXiv:2404.02948)")
    pissa_iter: int = arg(16, "pissa_init: iterations of the decomposition; -1: an exact one", SIZE_OR_REST)
    rank_pattern: dict[str, Any] | None = arg(None, "modules with a lora_rank of their own: {down_proj: 16}")
    alpha_pattern: dict[str, Any] | None = arg(None, "modules with a lora_alpha of their own: {down_proj: 32}")
    loraplus_lr_ratio: float | None = arg(
        None, "LoRA+ (arXiv:2402.12354): the learning rate of adapters' b, and of vectors, over that of a", POSITIVE
    )
    loraplus_lr_embedding: float = arg(1e-6, "LoRA+: the learning rate of an embedding adapter's b", at_least(0))
    create_new_adapter: bool = arg(False, "merge the given adapters and train a new one")
    use_galore: bool = arg(False, "GaLore (arXiv:2403.03507): moments in a subspace of each matrix's gradient")
    galore_target: Names = arg(("all",), "modules that GaLore projects, a list, or all linear ones of the layers")
    galore_rank: int = arg(16, "GaLore: dimensions of the subspace", at_least(1))
    galore_update_interval: int = arg(200, "GaLore: updates from one subspace to the next", at_least(1))
    galore_scale: float = arg(2.0, "GaLore: factor of what is projected back", POSITIVE)
    galore_proj_type: Literal["std", "reverse_std", "right", "left"] = arg(
        "std", "GaLore: std projects the smaller dimension, reverse_std the larger, right the input, left the output"
    )
    use_apollo: bool = arg(False, "APOLLO (arXiv:2412.05270): gradients scaled by channel, from a random subspace")
    apollo_target: Names = arg(("all",), "modules that APOLLO scales, a list, or all linear ones of the layers")
    apollo_rank: int = arg(16, "APOLLO: dimensions of the subspace", at_least(1))
    apollo_update_interval: int = arg(200, "APOLLO: updates from one subspace to the next", at_least(1))
    apollo_scale: float = arg(32.0, "APOLLO: updates are multiplied by its root", POSITIVE)
    apollo_scale_type: Literal["channel", "tensor"] = arg("channel", "APOLLO: a factor for each channel, or one")
    use_adam_mini: bool = arg(False, "Adam-mini (arXiv:2406.16793): one second moment for each head, neuron, token")
    use_muon: bool = arg(False, "Muon (arXiv:2502.16982) for matrices, but AdamW for embeddings, heads and vectors")
    use_dft_loss: bool = arg(False, "weight each token's loss by its probability (DFT, arXiv:2508.05629)")
    use_eaft_loss: bool = arg(False, "weight each token's loss by the model's uncertainty (EAFT, arXiv:2601.02151)")
    eaft_alpha: float = arg(1.0, "use_eaft_loss: the power of that weight; 0: plain cross-entropy", at_least(0))
    use_asft_loss: bool = arg(False, "DFT, held near the model as it was at the start (ASFT, arXiv:2509.23753)")
    asft_alpha: float = arg(0.1, "use_asft_loss: weight of the divergence from that model", at_least(0))
    compute_accuracy: bool = arg(False, "token accuracy at evaluation")
    disable_shuffling: bool = arg(False, "rows in the order of the file")
    early_stopping_steps: int | None = arg(None, "stop after so many evaluations without improvement", at_least(1))
    plot_loss: bool = arg(False, "draw training_loss.png; jtune always does")
    include_effective_tokens_per_second: bool = arg(
        False, "effective_tokens_per_sec among the results: tokens per second, padding not counted"
    )

    def __post_init__(self):
        if not self.lora_alpha:  # null and 0 alike, as in LLaMA-Factory
            object.__setattr__(self, "lora_alpha", 2 * self.lora_rank)


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """The run: batches, optimizer, schedule, when to log, evaluate and save; then jtune's own about devices."""

    output_dir: str = arg("trainer_output", "where everything is written")
    overwrite_output_dir: bool = arg(
        False, "replace what output_dir holds; but this run, cut short, goes on (unless resume_from_checkpoint: false)"
    )
    do_train: bool = arg(False, "train")
    do_eval: bool = arg(False, "evaluate at the end; implied by eval_strategy")
    do_predict: bool = arg(False, "answer the evaluation sets at the end: generated_predictions.jsonl")
    predict_with_generate: bool = arg(False, "evaluation answers, too, and tells BLEU and ROUGE (stage sft)")
    per_device_train_batch_size: int = arg(8, "examples a device takes at a time", at_least(1))
    per_device_eval_batch_size: int = arg(8, "the same at evaluation", at_least(1))
    gradient_accumulation_steps: int = arg(1, "batches summed for one update", at_least(1))
    learning_rate: float = arg(5e-5, "the highest learning rate", at_least(0))
    weight_decay: float = arg(0.0, "weight decay; not of norms and biases (Muon: of all)", at_least(0))
    adam_beta1: float = arg(0.9, "decay of the mean of gradients", BELOW_ONE)
    adam_beta2: float = arg(0.999, "decay of the mean of their squares", BELOW_ONE)
    adam_epsilon: float = arg(1e-8, "added to the root", at_least(0))
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm; 0: never", at_least(0))
    label_smoothing_factor: float = arg(0.0, "share of each label that is spread over the vocabulary", BELOW_ONE)
    neftune_noise_alpha: float | None = arg(
        None, "noise on the embeddings in training, +-alpha / sqrt(length * width) (arXiv:2310.05914)", at_least(0)
    )
    num_train_epochs: float = arg(3.0, "passes over the rows", POSITIVE)
    max_steps: int = arg(-1, "updates, in place of num_train_epochs", SIZE_OR_REST._replace(text="at least 1, or -1"))
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
    ] = arg("linear", "how the learning rate goes down")
    lr_scheduler_kwargs: dict[str, Any] | None = arg(None, "options of the schedule: num_cycles, min_lr, ...")
    warmup_ratio: float | None = arg(None, "share of the updates in which the learning rate goes up", SHARE)
    warmup_steps: int | float = arg(0, "updates in which the learning rate goes up; below 1 a share", STEPS)
    optim: str = arg("adamw_torch_fused", "the optimizer by Hugging Face's name: see docs/methods.md")
    optim_args: str | None = arg(None, "its options: key=value,key=value")
    adafactor: bool = arg(False, "the same as optim: adafactor")
    logging_strategy: Literal["no", "steps", "epoch"] = arg("steps", "when to log the loss")
    logging_steps: int | float = arg(500, "log every so many updates; below 1 a share of the run", STEPS)
    logging_first_step: bool = arg(False, "log the first update too")
    logging_dir: str | None = arg(None, "TensorBoard's folder; default: output_dir/runs")
    eval_strategy: Literal["no", "steps", "epoch"] = arg("no", "when to evaluate")
    eval_steps: int | float | None = arg(None, "evaluate every so many updates; default: logging_steps", STEPS)
    eval_on_start: bool = arg(False, "evaluate before the first update")
    eval_delay: int | float = arg(0, "no evaluation before so many updates (or epochs, as eval_strategy)", at_least(0))
    save_strategy: Literal["no", "steps", "epoch", "best"] = arg("steps", "when to save a checkpoint")
    save_steps: int | float = arg(500, "save every so many updates; below 1 a share of the run", STEPS)
    save_total_limit: int | None = arg(None, "checkpoints that are kept; default: all", at_least(1))
    save_only_model: bool = arg(False, "checkpoints without what resuming needs, but when told to stop")
    load_best_model_at_end: bool = arg(False, "write the best checkpoint's model at the end, not the last one's")
    metric_for_best_model: str | None = arg(None, "what best means: loss (default), accuracy, <set>_loss")
    greater_is_better: bool | None = arg(None, "direction of that metric; default: only a loss is better when smaller")
    resume_from_checkpoint: str | bool | None = arg(None, "a checkpoint folder; true: output_dir's last; false: none")
    seed: int = arg(42, "what every random choice follows from", SEED)
    data_seed: int | None = arg(None, "the seed of the order of rows; default: seed", SEED)
    bf16: bool = arg(False, "compute in bfloat16; trained parameters stay float32")
    fp16: bool = arg(False, "compute in float16 with loss scaling")
    use_cpu: bool = arg(False, "do not use an accelerator")
    report_to: Names = arg((), "none or tensorboard; the loss is in trainer_log.jsonl anyway")
    run_name: str | None = arg(None, "a name for the run, over the plot of its loss; default: output_dir")
    disable_tqdm: bool | None = arg(None, "no progress bar; default: a bar on terminals only")
    dataloader_drop_last: bool = arg(False, "leave out the last batch of an epoch if it is not full")
    include_num_input_tokens_seen: Literal["no", "all", "non_padding"] = arg(
        "no", "log the number of tokens so far; true means all"
    )

    # jtune's own.
    mesh_data: int = arg(1, "devices that each hold the whole model and take other rows", SIZE_OR_REST)
    mesh_fsdp: int = arg(-1, "devices over which rows, parameters and optimizer state are split", SIZE_OR_REST)
    mesh_tensor: int = arg(1, "devices over which each matrix product is split", SIZE_OR_REST)
    mesh_context: int = arg(1, "devices over which the tokens of each row are split", SIZE_OR_REST)
    mesh_expert: int = arg(1, "devices over which a mixture's experts are split; they take other rows", SIZE_OR_REST)
    eval_samples: int = arg(0, "at each evaluation, show the answers to the first so many examples", at_least(0))
    remat: Literal["auto", "none", "dots", "attention", "full", "offload"] = arg(
        "auto",
        "what the backward pass computes again: nothing, all but matrix products, all but attention, whole layers, "
        "or whole layers with their inputs kept in the memory of the host",
    )
    profile_steps: str | None = arg(None, "updates to trace, for TensorBoard and Perfetto: first-last", UPDATES)
    compile_cache_dir: str | None = arg(None, "where compiled programs are kept; default: ~/.cache/jtune/compiled")

    def __post_init__(self):
        if self.eval_strategy != "no":
            object.__setattr__(self, "do_eval", True)
        if not self.eval_steps:
            object.__setattr__(self, "eval_steps", self.logging_steps)


@dataclass(frozen=True, kw_only=True)
class GeneratingArguments:
    """How answers are sampled."""

    do_sample: bool = arg(True, "sample; false: always the likeliest token")
    temperature: float = arg(0.95, "below 1 sharpens the distribution", at_least(0))
    top_p: float = arg(0.7, "sample from the likeliest tokens that make up this probability", SHARE)
    top_k: int = arg(50, "sample from so many likeliest tokens; 0 or -1: from all", at_least(-1))
    num_beams: int = arg(1, "width of beam search; 1: none", at_least(1))
    max_length: int = arg(1024, "tokens of prompt and answer, unless max_new_tokens is above 0", at_least(1))
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
