"""From `{name: Given}` to checked values: known, of the right type, in range, and consistent with each other."""

import difflib
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from jtune.config import optimizers, preference, trackers
from jtune.config.arguments import FIELDS
from jtune.config.foreign import FOREIGN, TRAINING, verdict
from jtune.config.kinds import Mismatch, coerce, describe_kind
from jtune.config.packing import joins_texts
from jtune.config.parse import Fault, Given, Origin
from jtune.config.renamed import RENAMED
from jtune.config.stages import RULES, rules_of

Rule = tuple[tuple[str, ...], str]  # the names involved, the one to point at first; the message


def check(
    given: Mapping[str, Given], origin: Origin, command: str, unread: frozenset[str] = frozenset()
) -> tuple[dict[str, Any], list[Fault], list[str]]:
    """`(values of the honoured arguments that were given, faults, notes)`.

    Args:
      given: the arguments that the user gave.
      origin: of the case as a whole; a missing argument is reported there.
      command: only its own arguments are required, and only arguments that it would use are refused.
      unread: arguments that could not be read; they have been reported already.
    """
    values: dict[str, Any] = {}
    faults: list[Fault] = []
    notes: list[str] = []
    answered: dict[tuple[bool, str], list[str]] = {}  # (refused, reason) -> names
    for name, (value, where) in given.items():
        if name in FIELDS:
            try:
                values[name] = _checked(name, value)
            except Mismatch as mismatch:
                faults.append(Fault(where, str(mismatch)))
        elif name in FOREIGN:
            if group := verdict(name, value, command):
                answered.setdefault((group.refused, group.why), []).append(name)
        else:
            hint = " (Arguments are not grouped: move its keys to the top level.)" if isinstance(value, dict) else ""
            faults.append(Fault(where, unknown(name) + hint))
    for (refused, why), names in answered.items():
        where, subject = given[names[0]].origin, f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"
        if refused:
            faults.append(Fault(where, f"{subject} not supported: {why}"))
        else:
            notes.append(f"{where}: {subject} ignored: {why}")
    # An argument that could not be read or is misspelt is reported once: no rule looks at its default.
    unknown_names = [name for name in given if name not in values and name not in FOREIGN]
    bad = unread | {name if name in FIELDS else nearest(name) for name in unknown_names}
    for names, message in rules(values, command):
        if not bad & set(names):
            where = next((given[name].origin for name in names if name in given), origin)
            faults.append(Fault(where, message))
    if values.get("flash_attn") in ("sdpa", "fa2", "fa3"):
        where = given["flash_attn"].origin
        notes.append(f"{where}: flash_attn: {values['flash_attn']} is for torch; {_ATTENTION[values['flash_attn']]}")
    notes += [f"{given[name].origin}: {note}" for name, note in optimizers.notes(values)]
    if command in TRAINING:
        changed = [name for name, value in values.items() if value != FIELDS[name].default]
        every = SimpleNamespace(**{name: field.default for name, field in FIELDS.items()} | values)
        for name, note in preference.notes(every, values.keys(), changed):
            notes.append(f"{given[name].origin if name in given else origin}: {note}")
    default = FIELDS["buffer_size"].default
    if not values.get("streaming") and values.get("buffer_size", default) != default:
        notes.append(f"{given['buffer_size'].origin}: buffer_size is ignored without streaming: true")
    notes += _unused_by_the_loss(values, given)
    if values.get("finetuning_type", "lora") != "lora":
        for name in ("additional_target", "create_new_adapter"):
            if values.get(name):
                notes.append(f"{given[name].origin}: {name} is ignored: it is only for finetuning_type: lora")
    for name in ("disable_shuffling", "streaming"):
        if values.get("train_sampling_strategy") == "group_by_length" and values.get(name):
            where = given["train_sampling_strategy"].origin
            notes.append(f"{where}: train_sampling_strategy: group_by_length is ignored with {name}: true")
    if command == "export" and values.pop("quantization_bit", None):
        message = "quantization_bit is ignored: export merges adapters into the stored model, and writes its dtype"
        notes.append(f"{given['quantization_bit'].origin}: {message}")
    unused = trackers.notes(values, {name: field.default for name, field in FIELDS.items()})
    notes += [f"{given[name].origin}: {note}" for name, note in unused]
    if values.get("new_special_tokens_config") and values.get("add_special_tokens"):
        where = given["add_special_tokens"].origin
        notes.append(f"{where}: add_special_tokens is ignored: new_special_tokens_config names the special tokens")
    if values.get("init_special_tokens", "noise_init") != "noise_init" and not values.get("new_special_tokens_config"):
        where, name = given["init_special_tokens"].origin, values["init_special_tokens"]
        notes.append(f"{where}: init_special_tokens: {name} needs new_special_tokens_config: noise_init is used")
    if values.get("streaming") and values.get("preprocessing_num_workers"):
        where = given["preprocessing_num_workers"].origin
        notes.append(f"{where}: preprocessing_num_workers applies to eval_dataset only: one thread encodes a stream")
    return values, faults, notes


def _unused_by_the_loss(values: Mapping[str, Any], given: Mapping[str, Given]) -> Iterator[str]:
    for name, owner in (("eaft_alpha", "use_eaft_loss"), ("asft_alpha", "use_asft_loss")):
        if not values.get(owner) and values.get(name, FIELDS[name].default) != FIELDS[name].default:
            yield f"{given[name].origin}: {name} is ignored without {owner}: true"
    best = values.get("load_best_model_at_end") or values.get("early_stopping_steps")
    for name in ("use_dft_loss", "use_eaft_loss"):
        if values.get(name) and best and (values.get("metric_for_best_model") or "loss").endswith("loss"):
            yield (
                f"{given[name].origin}: {name}: models are compared by eval_loss, and this loss is also small where a "
                "model is confident and wrong: metric_for_best_model: accuracy, with compute_accuracy: true, is safer"
            )


SIMILARITY = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")  # the metrics of predict_with_generate
_FASTEST = "jtune uses the fastest kernel of the platform, as with auto"
_ATTENTION = {"sdpa": "jtune uses plain attention by XLA; auto is faster", "fa2": _FASTEST, "fa3": _FASTEST}


def unknown(name: str) -> str:
    """The message about an unknown name.

    >>> unknown("lerning_rate")
    'lerning_rate is not an argument of jtune. Did you mean learning_rate?'
    """
    near = nearest(name)
    hint = f" Did you mean {near}?" if near else " `jtune help all` lists them."
    return f"{name} is not an argument of jtune.{hint}"


def nearest(name: str) -> str | None:
    """The argument that was probably meant; arguments that jtune honours come first."""
    near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.75)
    near = near or difflib.get_close_matches(name, [*FIELDS, *RENAMED, *FOREIGN], n=1)
    return near[0] if near else None


def _checked(name: str, value: Any) -> Any:
    """The value in the type of its field; raises a Mismatch with the whole message."""
    field = FIELDS[name]
    if value is None and isinstance(field.default, tuple):
        return field.default  # `dataset:` without a value
    shown = "" if field.metadata["secret"] else f", not {_show(value)}"
    near = ""
    try:
        checked = coerce(field.type, value)
    except Mismatch as mismatch:
        choices = describe_kind(field.type).removeprefix("one of ").split(", ")
        close = difflib.get_close_matches(str(value), choices, n=1) if len(choices) > 1 else []
        near = f". Did you mean {close[0]}?" if close else ""
        raise Mismatch(f"{name} must be {mismatch}{shown}{near}") from None
    within = field.metadata["within"]
    if within is not None and checked is not None and not within.holds(checked):
        raise Mismatch(f"{name} must be {within.text}{shown}")
    return checked


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def rules(given: Mapping[str, Any], command: str) -> Iterator[Rule]:
    """Check the rules between arguments, over the given values and the defaults of the others."""
    v = SimpleNamespace(**{name: field.default for name, field in FIELDS.items()} | dict(given))
    yield from _required(v, command)
    yield from _method(v, command)
    if command in TRAINING:
        yield from _data(v)
        yield from _numbers(v)
        yield from optimizers.faults(v)
        if command != "data":
            yield from _losses(v)
            yield from preference.faults(v)
        if v.streaming:
            yield from _streaming(v, command)
    if command == "train":
        yield from _evaluation(v)
    if command in ("chat", "eval") and rules_of(v.stage).scores:
        yield ("stage",), f"stage: {v.stage}: a reward model gives scores, not text: {command} does not support it"
    if command == "chat" or (command == "train" and v.predict_with_generate):
        yield from _generating(v)


def _required(v: SimpleNamespace, command: str) -> Iterator[Rule]:
    if not v.model_name_or_path:
        yield ("model_name_or_path",), "model_name_or_path is missing: a folder in Hugging Face form, or a hub id"
    if command == "export" and not v.export_dir:
        yield ("export_dir",), "export_dir is missing: a folder for the merged model"
    if command == "data" and not (v.dataset or v.eval_dataset):
        yield ("dataset",), "dataset is missing: a name in dataset_info.json"
    if command == "train":
        if v.do_train and not v.dataset:
            yield ("dataset", "do_train"), "do_train needs a dataset: a name in dataset_info.json"
        if not v.output_dir:
            yield ("output_dir",), "output_dir is empty: give a folder"
        if not (v.do_train or v.do_eval or v.do_predict or v.eval_strategy != "no"):
            message = "there is nothing to do: set do_train: true, do_eval: true, or do_predict: true"
            yield ("do_train", "do_eval", "do_predict"), message


LORA_ONLY = ("adapter_name_or_path", "use_rslora", "use_dora", "pissa_init", "rank_pattern", "alpha_pattern")


def _method(v: SimpleNamespace, command: str) -> Iterator[Rule]:
    if v.finetuning_type == "oft":
        message = "finetuning_type: oft is not built: the nearest are lora, and lora with use_dora: true"
        yield from [] if command == "data" else [(("finetuning_type",), message)]
    elif v.finetuning_type != "lora":
        for name in LORA_ONLY:
            if getattr(v, name):
                yield (name, "finetuning_type"), f"{name} is only for finetuning_type: lora, not {v.finetuning_type}"
    elif v.use_dora and v.pissa_init:
        yield ("use_dora", "pissa_init"), "use_dora and pissa_init are two forms of one adapter: choose one"
    elif v.pissa_init and v.adapter_name_or_path and not v.create_new_adapter:
        message = "pissa_init starts a new adapter, but one is given: create_new_adapter: true merges that one first"
        yield ("pissa_init", "adapter_name_or_path"), message
    if v.quantization_bit is not None and command != "export":
        yield from _quantized(v)
    if v.use_llama_pro:
        if v.finetuning_type == "full":
            message = "use_llama_pro is only valid for finetuning_type: freeze or lora, not full"
            yield ("use_llama_pro", "finetuning_type"), message
        if v.freeze_trainable_layers < 1:
            message = f"freeze_trainable_layers must be above 0 with use_llama_pro, not {v.freeze_trainable_layers}"
            yield ("freeze_trainable_layers", "use_llama_pro"), message + ": the number of layers that were added"
    adds_rows = v.resize_vocab or v.add_tokens or v.add_special_tokens or v.new_special_tokens_config
    if adds_rows and v.finetuning_type == "lora" and "lm_head" in v.lora_target and not v.additional_target:
        message = "lora_target: lm_head gets new rows (resize_vocab), so all of it trains: leave it out"
        yield ("lora_target", "resize_vocab"), f"{message}, or name the modules that train whole in additional_target"
    if command in TRAINING and command != "data" and not rules_of(v.stage).trains:
        trained = ", ".join(name for name, rules in RULES.items() if rules.trains)
        message = f"stage: {v.stage}: it is not built; jtune trains stages {trained}"
        yield ("stage",), message


def _quantized(v: SimpleNamespace) -> Iterator[Rule]:
    """LLaMA-Factory's rules for `quantization_bit`."""
    bit = f"quantization_bit: {v.quantization_bit}"
    if v.finetuning_type in ("full", "freeze"):
        message = f"{bit} freezes the kernels, but finetuning_type: {v.finetuning_type} trains them: set lora"
        yield ("finetuning_type", "quantization_bit"), message
    if v.quantization_method == "hqq":
        message = f"quantization_method: hqq is not built: the nearest is bnb, with {bit}"
        yield ("quantization_method",), message
    if v.quantization_method == "eetq" and v.quantization_bit != 8:
        yield (
            ("quantization_method", "quantization_bit"),
            f"quantization_method: eetq needs quantization_bit: 8, not {v.quantization_bit}: bnb has both",
        )
    if v.pissa_init:
        message = f"pissa_init changes the base that {bit} rounds: leave pissa_init out, or quantization_bit"
        yield ("pissa_init", "quantization_bit"), message
    merged = "merge it first: run `jtune export`, and set model_name_or_path to the model that it writes"
    if v.adapter_name_or_path and v.create_new_adapter:
        message = f"create_new_adapter merges adapter_name_or_path, and {bit} cannot be merged into: {merged}"
        yield ("create_new_adapter", "quantization_bit"), message
    elif len(v.adapter_name_or_path) > 1:
        message = (
            f"adapter_name_or_path has {len(v.adapter_name_or_path)} adapters, but {bit} allows only one: {merged}"
        )
        yield ("adapter_name_or_path", "quantization_bit"), message


def _generating(v: SimpleNamespace) -> Iterator[Rule]:
    if v.num_beams > 1 and v.do_sample:
        message = f"num_beams: {v.num_beams} searches, but do_sample: true (the default) samples: set do_sample: false"
        yield ("num_beams", "do_sample"), message


def _data(v: SimpleNamespace) -> Iterator[Rule]:
    if v.train_on_prompt and v.mask_history:
        yield ("mask_history", "train_on_prompt"), "mask_history and train_on_prompt contradict each other: choose one"
    stage = rules_of(v.stage)
    for name in ("train_on_prompt", "mask_history"):
        if getattr(v, name) and (stage.has_preferences or not stage.has_prompts):
            why = "learns the answers that are compared" if stage.has_prompts else "has no prompts"
            yield (name, "stage"), f"{name} is only for stage sft: stage {stage.name} {why}"
    if not stage.has_prompts and v.overlong != "truncate" and joins_texts(v.packing):
        message = f"overlong: {v.overlong} is not for packed text, which is cut every cutoff_len"
        yield ("overlong", "packing"), f"{message}: set packing: false"
    if v.overlong == "split" and stage.has_preferences:
        yield ("overlong", "stage"), f"overlong: split is not for stage {v.stage}: choose truncate, drop or error"
    if v.val_size and v.eval_dataset:
        message = "val_size holds rows out of dataset, but eval_dataset is given too: choose one"
        yield ("val_size", "eval_dataset"), message
    if v.val_size and not v.dataset:
        yield ("val_size", "dataset"), "val_size holds rows out of dataset, but there is no dataset"
    if v.neat_packing and v.packing is False:
        yield ("packing", "neat_packing"), "packing: false contradicts neat_packing, which packs: leave one of them out"
    if v.interleave_probs:
        yield from _interleaving(v)


def _streaming(v: SimpleNamespace, command: str) -> Iterator[Rule]:
    if v.max_steps < 1 and (command == "plan" or (command == "train" and v.do_train)):
        message = "streaming needs max_steps: the updates of an epoch can only be counted when all rows have been read"
        yield ("max_steps", "streaming"), f"{message}. Set it, or streaming: false"
    if 0 < v.val_size < 1:
        message = f"val_size: {v.val_size:g} is a share of rows, but streaming does not count rows: give a number"
        yield ("val_size", "streaming"), message
    if v.tokenized_path:
        message = "tokenized_path stores all encoded rows, but streaming never has all of them: leave one out"
        yield ("tokenized_path", "streaming"), message


def _interleaving(v: SimpleNamespace) -> Iterator[Rule]:
    names = ("interleave_probs", "mix_strategy", "dataset", "eval_dataset")
    if v.mix_strategy == "concat":
        yield names[:2], "interleave_probs needs mix_strategy: interleave_under, interleave_over or interleave_once"
    for kind in ("dataset", "eval_dataset"):
        sets = getattr(v, kind)
        if sets and len(sets) != len(v.interleave_probs) and not (kind == "eval_dataset" and v.eval_on_each_dataset):
            message = f"interleave_probs has {len(v.interleave_probs)} probabilities for the {len(sets)} sets of {kind}"
            yield names, message
    if min(v.interleave_probs) < 0 or abs(sum(v.interleave_probs) - 1) > 1e-3:
        yield names[:1], f"interleave_probs must be at least 0 and add up to 1, not to {sum(v.interleave_probs):g}"


def _losses(v: SimpleNamespace) -> Iterator[Rule]:
    # LLaMA-Factory silently takes the first of these, and so would not train with the other one.
    losses = ("use_dft_loss", "use_eaft_loss", "use_asft_loss")
    chosen = [name for name in (*losses, "label_smoothing_factor") if getattr(v, name)]
    if len(chosen) > 1:
        yield tuple(chosen), f"{' and '.join(chosen)}: each is a loss of its own: choose one"
    for name in chosen:
        if name in losses and not rules_of(v.stage).token_losses:
            message = f"{name} is only for stage sft, not {v.stage}: leave it out (LLaMA-Factory ignores it)"
            yield (name, "stage"), message
    if v.use_asft_loss and v.pissa_init and v.finetuning_type == "lora":
        message = "use_asft_loss: with pissa_init, each update would have to rebuild the model of the start: "
        yield ("use_asft_loss", "pissa_init"), message + "leave pissa_init out"
    if v.use_asft_loss and v.ref_model:
        message = "ref_model: the reference of use_asft_loss is the model at the start: leave ref_model out"
        yield ("ref_model", "use_asft_loss"), message
    if v.label_smoothing_factor and not rules_of(v.stage).learns_tokens:
        hint = ", or set dpo_label_smoothing" if rules_of(v.stage).compares_answers else ""
        message = f"label_smoothing_factor is only for stages pt and sft, not {v.stage}: leave it out{hint}"
        yield ("label_smoothing_factor", "stage"), message


def _numbers(v: SimpleNamespace) -> Iterator[Rule]:
    if v.fp16 and v.bf16:
        yield ("fp16", "bf16"), "fp16 and bf16 are both true: choose one (bf16 where the device has it)"
    if v.fp16 and v.pure_bf16:
        yield ("fp16", "pure_bf16"), "fp16 and pure_bf16 are both true: choose one"
    if v.warmup_ratio and v.warmup_steps:
        # In transformers 4 warmup_steps takes precedence, in transformers 5 warmup_ratio: no choice suits everyone.
        yield ("warmup_ratio", "warmup_steps"), "warmup_ratio and warmup_steps are both given: choose one"
    sizes = [name for name in vars(v) if name.startswith("mesh_") and getattr(v, name) == -1]
    if len(sizes) > 1:
        yield tuple(sizes), f"{' and '.join(sizes)} are all -1: only one of them can take the remaining devices"
    yield from trackers.faults(v)
    for what in ("logging", "save"):
        if getattr(v, f"{what}_strategy") == "steps" and not getattr(v, f"{what}_steps"):
            yield (f"{what}_steps", f"{what}_strategy"), f"{what}_steps must be above 0; for never: {what}_strategy: no"


def _evaluation(v: SimpleNamespace) -> Iterator[Rule]:
    scheduled = v.eval_strategy != "no"
    shown = bool(v.eval_samples and v.dataset)  # answers to training rows are worth a look, too
    asked = {
        "do_predict": v.do_predict,
        "predict_with_generate": v.predict_with_generate,
        "do_eval": v.do_eval,
        f"eval_strategy: {v.eval_strategy}": scheduled and not shown,
        "eval_on_start": v.eval_on_start and not shown,
    }
    if any(asked.values()) and not (v.eval_dataset or v.val_size):
        name = next(name for name in asked if asked[name])
        message = f"{name} needs something to evaluate on: eval_dataset, or val_size to hold rows out of dataset"
        yield (name.split(":")[0], "eval_dataset", "val_size", "do_eval"), message
    if v.eval_samples and not (v.do_eval or scheduled or v.eval_on_start):
        yield ("eval_samples", "eval_strategy"), "evaluations show eval_samples: set eval_strategy: steps"
    stage = rules_of(v.stage)
    if v.eval_samples and stage.scores:
        message = f"eval_samples shows answers, and stage {v.stage} trains a model that gives scores: leave it out"
        yield ("eval_samples", "stage"), message
    if v.predict_with_generate and not stage.answers:
        message = f"predict_with_generate is only for stage sft, not {v.stage}: do_eval measures the loss"
        yield ("predict_with_generate", "stage"), message
    if v.do_predict and not (stage.answers or stage.scores):
        message = (
            f"do_predict is only for stages sft (answers) and rm (scores), not {v.stage}: do_eval measures the loss"
        )
        yield ("do_predict", "stage"), message
    if v.do_predict and not v.predict_with_generate and stage.answers:
        message = "do_predict writes answers: set predict_with_generate: true (do_eval measures the loss)"
        yield ("do_predict", "predict_with_generate"), message
    if v.load_best_model_at_end and v.save_only_model:
        message = "load_best_model_at_end needs whole checkpoints, but save_only_model saves only the model: choose one"
        yield ("save_only_model", "load_best_model_at_end"), message
    best = "early_stopping_steps" if v.early_stopping_steps else ""
    best = "save_strategy" if v.save_strategy == "best" else best
    best = "load_best_model_at_end" if v.load_best_model_at_end else best
    if not best:
        return
    if not scheduled:
        yield (best, "eval_strategy"), f"{best} compares evaluations, but eval_strategy is no: set it to steps or epoch"
    else:
        yield from _known_metric(v, best)
    if v.load_best_model_at_end and scheduled and v.save_strategy != "best":
        yield from _saved_when_evaluated(v)


def _known_metric(v: SimpleNamespace, wanted_by: str) -> Iterator[Rule]:
    tokens = v.compute_accuracy and not rules_of(v.stage).has_preferences
    kinds = ["loss", *(["accuracy"] if tokens else []), *(SIMILARITY if v.predict_with_generate else ())]
    kinds += preference.metrics(v)
    each = v.eval_on_each_dataset and v.eval_dataset
    known = [f"{name}_{kind}" for name in v.eval_dataset for kind in kinds] if each else kinds
    name = (v.metric_for_best_model or "loss").removeprefix("eval_")
    if name in known:
        return
    names = ("metric_for_best_model", wanted_by, "compute_accuracy", "eval_on_each_dataset")
    hint = " (with compute_accuracy: true)" if name.endswith("accuracy") and not v.compute_accuracy else ""
    yield names, f"metric_for_best_model: there is no {name}{hint}, which {wanted_by} compares: {', '.join(known)}"


def _saved_when_evaluated(v: SimpleNamespace) -> Iterator[Rule]:
    """The best model can only be loaded if a checkpoint was saved at every evaluation."""
    names = ("load_best_model_at_end", "save_strategy", "eval_strategy", "save_steps", "eval_steps")
    if v.eval_strategy != v.save_strategy:
        message = (
            f"load_best_model_at_end needs a checkpoint at each evaluation: save_strategy is {v.save_strategy}, "
            f"eval_strategy is {v.eval_strategy}: make them the same, or save_strategy: best"
        )
        yield names[:3], message
    elif v.eval_strategy == "steps":
        every, save = v.eval_steps or v.logging_steps, v.save_steps
        ratio = save / every if every else 0.5
        if (save < 1) != (every < 1) or abs(ratio - round(ratio)) > 1e-6 or round(ratio) < 1:
            message = f"load_best_model_at_end needs save_steps ({save}) to be a multiple of eval_steps ({every})"
            yield names, message
