"""Which run a checkpoint belongs to: what may not change from one start to the next, and what may.

Every argument is in one group of `GROUPS`:

- "identity" decides what the saved arrays mean, or which rows come when. Another value is another run: refused.
- "course" decides where training goes from here. Another value holds from the next update on, and is named.
- "free" changes neither, or is compared by what comes of it: the rows, the number of updates, the frozen weights.

The number of updates is of the course, too: a batch follows from the number of its update, however many there are, and
the schedule is computed again, as in Hugging Face's Trainer.

An argument that has no effect (a rank without adapters) is not compared.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import xxhash
from jax.sharding import Mesh

from jtune import tuning
from jtune.config import Config, optimizers, trackers
from jtune.config.stages import rules_of
from jtune.data import Plan, Splits, length_seed, order_seed, rows_are_packed
from jtune.loading.source import Source
from jtune.losses.reference import frozen_of
from jtune.models import DecoderConfig
from jtune.models.config import Layer
from jtune.models.value_head import split_head
from jtune.sharding import batch_shards
from jtune.train.digest import data_fingerprint, frozen_fingerprint, tree_fingerprint
from jtune.train.program import Program

# Entries of an identity that checkpoints of older code lack: compared where both have them.
LATER = ("base weights", "adapters", "model")
UPDATES = "updates"  # the entry of an identity that is of the course
LONGEST = 100  # characters of a value that are shown


class Run(NamedTuple):
    """Which run this is, as JSON gives it back."""

    identity: Mapping[str, Any]  # what its data, batches, model and updates are
    arguments: Mapping[str, Any]  # see `arguments_of`


class Group(NamedTuple):
    kind: Literal["identity", "course", "free"]
    names: tuple[str, ...]
    matters: Callable[[SimpleNamespace], Any] = lambda v: True  # of all arguments: whether these have an effect


def _lora(v: SimpleNamespace) -> bool:
    return v.finetuning_type == "lora"


def _new_adapter(v: SimpleNamespace) -> bool:
    """Otherwise rank, alpha and targets are the given adapter's own (see "adapters" of the identity)."""
    return _lora(v) and (v.create_new_adapter or not v.adapter_name_or_path)


def _referred(v: SimpleNamespace) -> bool:
    return rules_of(v.stage).has_reference


def _compared(v: SimpleNamespace) -> bool:
    """Evaluations decide which model is written, or when the run ends."""
    return v.load_best_model_at_end or v.early_stopping_steps or v.save_strategy == "best"


GROUPS: tuple[Group, ...] = (
    # ---------------------------------------------------------------- what is trained
    Group("identity", ("stage", "finetuning_type", "pure_bf16", "train_from_scratch")),
    Group("identity", ("adapter_name_or_path", "create_new_adapter", "adapter_folder"), _lora),
    Group("identity", ("lora_rank", "lora_alpha", "use_rslora", "use_dora", "pissa_init"), _new_adapter),
    Group("identity", ("lora_target", "additional_target", "rank_pattern", "alpha_pattern"), _new_adapter),
    Group("identity", ("pissa_iter",), lambda v: _new_adapter(v) and v.pissa_init),
    Group("identity", ("use_llama_pro",), lambda v: v.finetuning_type != "full"),
    Group("identity", ("freeze_trainable_layers",), lambda v: v.finetuning_type == "freeze" or v.use_llama_pro),
    Group("identity", ("freeze_trainable_modules", "freeze_extra_modules"), lambda v: v.finetuning_type == "freeze"),
    Group("identity", ("quantization_bit",)),
    Group("identity", ("quantization_type", "double_quantization"), lambda v: v.quantization_bit == 4),
    Group("identity", ("quantization_method",), lambda v: v.quantization_bit),
    Group("identity", ("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config")),
    # ---------------------------------------------------------------- on what, and towards what
    Group("identity", ("template", "tool_format", "default_system", "enable_thinking", "preserve_thinking")),
    Group("identity", ("train_on_prompt", "mask_history", "split_special_tokens", "neat_packing")),
    Group("identity", ("dataloader_drop_last",)),
    Group("identity", ("use_dft_loss", "use_eaft_loss", "use_asft_loss")),
    # pref_bco_weight brings the running moments of BCO into the state.
    Group("identity", ("pref_loss", "pref_bco_weight"), lambda v: rules_of(v.stage).compares_answers),
    Group("identity", ("ref_adapter",), lambda v: _referred(v) and _lora(v) and v.adapter_name_or_path),
    # ---------------------------------------------------------------- what the optimizer's state means
    Group("identity", ("optim", "use_galore", "use_apollo", "use_adam_mini", "use_muon")),
    Group("identity", ("galore_target", "galore_rank", "galore_proj_type"), lambda v: v.use_galore),
    Group("identity", ("apollo_target", "apollo_rank", "apollo_scale_type"), lambda v: v.use_apollo),
    # ---------------------------------------------------------------- the course
    Group("course", ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps")),
    Group("course", ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "max_grad_norm")),
    Group("course", ("label_smoothing_factor", "neftune_noise_alpha", "moe_aux_loss_coef", "seed", "bf16", "fp16")),
    Group("course", ("lora_dropout",), _new_adapter),
    Group("course", ("loraplus_lr_ratio",), _lora),
    Group("course", ("loraplus_lr_embedding",), lambda v: _lora(v) and v.loraplus_lr_ratio),
    Group("course", ("galore_update_interval", "galore_scale"), lambda v: v.use_galore),
    Group("course", ("apollo_update_interval", "apollo_scale"), lambda v: v.use_apollo),
    Group("course", ("eaft_alpha",), lambda v: v.use_eaft_loss),
    Group("course", ("asft_alpha",), lambda v: v.use_asft_loss),
    Group("course", ("pref_beta", "pref_ftx"), _referred),
    Group("course", ("pref_loss_weights", "ld_alpha"), lambda v: rules_of(v.stage).compares_answers),
    Group("course", ("dpo_label_smoothing",), lambda v: rules_of(v.stage).compares_answers),
    Group("course", ("simpo_gamma",), lambda v: "simpo" in v.pref_loss and rules_of(v.stage).compares_answers),
    Group("course", ("discopop_tau",), lambda v: "discopop" in v.pref_loss and rules_of(v.stage).compares_answers),
    Group("course", ("kto_chosen_weight", "kto_rejected_weight"), lambda v: rules_of(v.stage).rows == "feedback"),
    Group("course", ("rm_center_coef",), lambda v: rules_of(v.stage).scores),
    Group("course", ("distill_loss", "distill_temperature", "distill_weight"), lambda v: v.teacher_model),
    Group("course", ("distill_beta",), lambda v: v.teacher_model and v.distill_loss == "js"),
    Group("course", ("load_best_model_at_end", "early_stopping_steps")),
    Group("course", ("metric_for_best_model", "greater_is_better")),
    Group("course", ("eval_strategy", "eval_delay", "eval_dataset", "eval_on_each_dataset"), _compared),
    Group("course", ("eval_steps",), lambda v: _compared(v) and v.eval_strategy == "steps"),
    # ---------------------------------------------------------------- compared by what comes of them
    Group("free", ("model_name_or_path", "model_revision", "rope_scaling")),  # frozen weights, base weights, model
    Group("free", ("dataset", "dataset_dir", "max_samples", "val_size", "overlong", "tokenized_path")),  # data
    Group("free", ("mix_strategy", "interleave_probs", "streaming", "buffer_size", "disable_shuffling")),  # data, order
    Group("free", ("data_seed", "packing", "cutoff_len", "num_train_epochs", "max_steps")),  # order, rows, updates
    Group("free", ("per_device_train_batch_size", "gradient_accumulation_steps")),  # examples per update
    # teacher or reference
    Group("free", ("teacher_model", "teacher_model_adapters", "teacher_model_quantization_bit")),
    Group("free", ("ref_model", "ref_model_adapters", "ref_model_quantization_bit", "precompute_ref_log_probs")),
    Group("free", ("init_special_tokens", "adafactor")),  # frozen weights; optim
    Group("free", ("train_sampling_strategy", "galore_layerwise", "apollo_layerwise")),  # order; max_grad_norm
    # ---------------------------------------------------------------- how it is read, computed, shown and written
    Group("free", ("cache_dir", "hf_hub_token", "flash_attn", "disable_gradient_checkpointing", "remat", "use_cpu")),
    Group("free", ("infer_dtype", "print_param_status", "export_dir", "export_size", "allow_outside_dataset_dir")),
    Group("free", ("max_dropped", "overwrite_cache", "tokenizer_backend", "preprocessing_batch_size")),
    Group("free", ("preprocessing_num_workers", "compute_accuracy", "plot_loss")),
    Group("free", ("include_effective_tokens_per_second", "include_num_input_tokens_seen")),
    Group(
        "free", ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict")
    ),
    Group("free", ("predict_with_generate", "per_device_eval_batch_size", "eval_on_start", "eval_samples")),
    Group("free", ("logging_strategy", "logging_steps", "logging_first_step", "logging_dir", "report_to")),
    Group("free", ("run_name", "use_swanlab", *trackers.OWNERS)),
    Group("free", ("save_strategy", "save_steps", "save_total_limit", "save_only_model")),
    Group("free", ("disable_tqdm", "profile_steps", "compile_cache_dir")),
    Group("free", ("mesh_data", "mesh_fsdp", "mesh_tensor", "mesh_context", "mesh_expert")),
    Group("free", ("do_sample", "temperature", "top_p", "top_k", "num_beams", "max_length", "max_new_tokens")),
    Group("free", ("repetition_penalty", "length_penalty", "skip_special_tokens")),
)

KINDS: dict[str, str] = {name: group.kind for group in GROUPS for name in group.names}
# Lists whose order means nothing.
_SETS = ("lora_target", "additional_target", "freeze_trainable_modules", "freeze_extra_modules", "galore_target",
         "apollo_target")  # fmt: skip


def arguments_of(config: Config) -> dict[str, Any]:
    """The arguments that have an effect on what is trained, as JSON gives them back; saved with each checkpoint."""
    values = config.to_dict()
    v = SimpleNamespace(**values)
    values["optim"] = optimizers.method(v.optim, v.adafactor)  # adamw_torch and adamw_torch_fused are one
    values |= {name: sorted(values[name]) for name in _SETS}
    found = {n: values[n] for group in GROUPS if group.kind != "free" and group.matters(v) for n in group.names}
    return json.loads(json.dumps(found, default=str))


def identity_of(
    config: Config,
    source: Source,
    program: Program,
    trainable: Any,
    splits: Splits,
    plan: Plan,
    reference: str | None = None,
) -> dict[str, Any]:
    """What the data, batches, model and updates of a run are: a checkpoint of another run differs in it.

    Args:
      trainable: the parameters that train, as they were read.
      reference: the digest of the reference of units (`jtune.evaluation.references.References`).
    """
    training, finetuning, change = config.training, config.finetuning, source.change
    assert splits.train is not None
    assert isinstance(program.mesh, Mesh)
    if program.second is not None and reference is None:
        reference = frozen_fingerprint(program.constants.second)
    frozen = program.constants if reference is None else frozen_of(program.constants)
    examples = training.per_device_train_batch_size * batch_shards(program.mesh)
    identity = {
        "data": data_fingerprint(splits.train),
        "examples per update": [examples, training.gradient_accumulation_steps],
        "order": [order_seed(config), not finetuning.disable_shuffling, *other_order(config)],
        "rows": [rows_are_packed(config), config.data.cutoff_len],
        UPDATES: plan.max_steps,
        "frozen weights": frozen_fingerprint(frozen),
    }
    if reference is not None:
        identity["teacher or reference"] = reference
    if change is not None:
        identity["vocabulary"] = [source.decoder.vocab_size, list(change.new)]
    decoder, head = split_head(trainable)
    if finetuning.finetuning_type == "full" and change is None and not config.model.train_from_scratch:
        identity["base weights"] = tree_fingerprint(decoder)
    if source.value_head is not None:
        identity["value head"] = tree_fingerprint(head)
    return identity | {"adapters": adapters_of(program.params), "model": model_of(source.decoder)}


def other_order(config: Config) -> list[Any]:
    """What else the order of rows depends on: for a stream, all that says which row comes when."""
    data = config.data
    if not data.streaming:
        return [] if length_seed(config) is None else ["by length"]
    mix = [data.mix_strategy, *data.interleave_probs]
    return ["streaming", list(data.dataset), data.buffer_size, mix, data.max_samples, data.val_size]


def model_of(decoder: DecoderConfig) -> dict[str, Any]:
    """What a decoder computes besides its weights, flat: `{"ropes.0.theta": 10000.0, ...}`."""
    flat: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if name == "layers":
            value = xxhash.xxh3_64_hexdigest(repr(tuple(map(_of_layer, value))).encode())
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}" if name else key, inner)
        elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            add(name, dict(enumerate(value)))
        elif name != "experts.aux_coef":  # moe_aux_loss_coef, a matter of the course
            flat[name] = value

    add("", dataclasses.asdict(decoder))
    return flat


def _of_layer(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's options, without those that it does not have: checkpoints of code that knew of fewer are resumed."""
    usual = dataclasses.asdict(Layer())
    always = ("window", "rope", "sparse", "linear")
    return {key: value for key, value in layer.items() if key in always or value != usual[key]}


def adapters_of(params: Any) -> Any:
    """What kind of adapter each kernel has, of which rank and scale; one text where all are alike."""
    found = {".".join(path): x.describe() for path, x in tuning.kernels(params) if tuning.is_adapter(x)}
    return next(iter(found.values()), None) if len(set(found.values())) < 2 else found


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of an identity is not what it was: one line each."""
    lines = []
    for key in {**saved, **now}:
        then, here = saved.get(key), now.get(key)
        if key == UPDATES or then == here or (key in LATER and (then is None or key not in now)):
            continue
        if isinstance(then, dict) and isinstance(here, dict):
            both = [inner for inner in then if inner in here] if key in LATER else [*{**then, **here}]
            lines += [_line(f"{key}: {i}", then.get(i), here.get(i)) for i in both if then.get(i) != here.get(i)]
        else:
            lines.append(_line(key, then, here))
    return lines


def changed_arguments(saved: Mapping[str, Any], now: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Any, Any]]:
    """`(name, then, now)` of the arguments of a kind that differ; those that only one of the two has do not count."""
    for name in now:
        if name in saved and KINDS[name] == kind and saved[name] != now[name]:
            yield name, saved[name], now[name]


def differences(then: Run, now: Run) -> list[str]:
    """All that makes `now` another run: one line each; nothing if it is the same."""
    arguments = changed_arguments(then.arguments, now.arguments, "identity")
    return [_line(*change) for change in arguments] + changes(then.identity, now.identity)


def describe_course(then: Run, now: Run) -> str | None:
    """What changes the course of training, from what to what.

    >>> describe_course(Run({"updates": 4}, {"learning_rate": 1e-4}), Run({"updates": 8}, {"learning_rate": 5e-5}))
    'learning_rate was 0.0001, is 5e-05; number of updates was 4, is 8'
    """
    found = list(changed_arguments(then.arguments, now.arguments, "course"))
    before, here = (run.identity.get(UPDATES) for run in (then, now))
    if None not in (before, here) and before != here:
        found.append(("number of updates", before, here))
    return "; ".join(f"{name} was {_short(before)}, is {_short(here)}" for name, before, here in found) or None


def _line(key: str, then: Any, now: Any) -> str:
    return f"{key}: {_short(then)} then, {_short(now)} now"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
