"""The losses of stage dpo by name, and the rules of what arguments mean in stages that learn from preferences.

`faults` is what cannot be meant, `notes` what means less than it says, or other than LLaMA-Factory reads it.
"""

import difflib
from collections import Counter
from collections.abc import Collection, Iterator
from types import SimpleNamespace

from jtune.config.stages import StageRules, rules_of

Rule = tuple[tuple[str, ...], str]  # the names involved, the one to point at first; the message
Note = tuple[str, str]  # the name to point at, the note

# The names of LLaMA-Factory, then those that TRL adds; `jtune.losses` has their formulas.
LOSSES = (
    *("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo"),
    *("robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"),
    *("discopop", "sigmoid_norm", "sft"),
)
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")  # dpo_label_smoothing is in their formula
WITHOUT_REFERENCE = ("orpo", "simpo", "sft")
WITH_MARGIN = ("sigmoid",)  # by how much the chosen answer is better, where rows say so, is in their formula
_SIGMOID_THERE = ("hinge", "ipo", "kto_pair")

REFERENCE = ("ref_model", "ref_model_adapters", "ref_model_quantization_bit")
DISTILLATION = ("distill_loss", "distill_beta", "distill_temperature", "distill_weight")
_TEACHER = ("teacher_model_adapters", "teacher_model_quantization_bit", *DISTILLATION)

# Argument -> who reads it, and whether a stage does.
_PAIRS = ("only stage dpo reads it", lambda stage: stage.compares_answers)
_ANCHORED = ("only stages dpo and kto read it", lambda stage: stage.has_reference)
_READERS = {
    **dict.fromkeys(("pref_loss", "pref_loss_weights", "pref_bco_weight", "dpo_label_smoothing", "ld_alpha"), _PAIRS),
    **dict.fromkeys(("pref_beta", "pref_ftx", *REFERENCE, "ref_adapter", "precompute_ref_log_probs"), _ANCHORED),
    "kto_chosen_weight": ("only stage kto reads it", lambda stage: stage.rows == "feedback"),
    "kto_rejected_weight": ("only stage kto reads it", lambda stage: stage.rows == "feedback"),
    "rm_center_coef": ("only stage rm reads it", lambda stage: stage.scores),
}
_OF_ONE_LOSS = {"simpo_gamma": "simpo", "discopop_tau": "discopop"}


def needs_reference(v: SimpleNamespace) -> bool:
    """Whether the loss compares the model with a reference.

    Args:
      v: `stage`, `pref_loss` and `pref_bco_weight`.
    """
    stage = rules_of(v.stage)
    if stage.compares_answers:
        return bool(v.pref_bco_weight) or not set(v.pref_loss) <= {*WITHOUT_REFERENCE}
    return stage.has_reference


def faults(v: SimpleNamespace) -> Iterator[Rule]:
    """Contradictions between arguments of preference stages and of distillation, over the values of all arguments."""
    stage = rules_of(v.stage)
    if stage.compares_answers:
        yield from _losses(v)
    if needs_reference(v):
        yield from _reference(v)
    if v.teacher_model:
        yield from _teacher(v, stage)


def _losses(v: SimpleNamespace) -> Iterator[Rule]:
    if not v.pref_loss:
        yield ("pref_loss",), f"pref_loss is empty: name a loss, or several of {', '.join(LOSSES)}"
        return
    unknown = [name for name in v.pref_loss if name not in LOSSES]
    for name in unknown:
        near = difflib.get_close_matches(name, LOSSES, n=1)
        hint = f"did you mean {near[0]}? There are" if near else "there are"
        yield ("pref_loss",), f"pref_loss: there is no loss {name!r}: {hint} {', '.join(LOSSES)}"
    for name, times in Counter(v.pref_loss).items():
        if times > 1:
            yield (
                ("pref_loss",),
                f"pref_loss names {name} {times} times: name it once, with a weight in pref_loss_weights",
            )
    losses = " + ".join(v.pref_loss)
    weights = v.pref_loss_weights
    if weights and len(weights) != len(v.pref_loss):
        message = (
            f"pref_loss_weights has {len(weights)} weights for the {len(v.pref_loss)} losses of pref_loss, {losses}"
        )
        yield ("pref_loss_weights", "pref_loss"), f"{message}: give one for each"
    if weights and (min(weights) < 0 or not any(weights)):
        message = f"pref_loss_weights must be at least 0, and not all 0, but they are {', '.join(map(str, weights))}"
        yield ("pref_loss_weights",), message
    names = ("dpo_label_smoothing", "pref_loss")
    if v.dpo_label_smoothing and not unknown and not {*v.pref_loss} & {*SMOOTHED}:
        message = f"dpo_label_smoothing: {v.dpo_label_smoothing:g} is not in the formula of {losses}: leave it out"
        yield names, f"{message}, or choose one of {', '.join(SMOOTHED)}"
    if v.dpo_label_smoothing == 0.5 and "robust" in v.pref_loss:
        yield names, "dpo_label_smoothing: 0.5 divides by 0 in pref_loss: robust: set it below 0.5"
    if v.pref_bco_weight and {*v.pref_loss} <= {*WITHOUT_REFERENCE}:
        message = f"pref_bco_weight: BCO compares with a reference, and pref_loss: {losses} has none: leave it out"
        yield ("pref_bco_weight", "pref_loss"), f"{message} (LLaMA-Factory ignores it)"


def _reference(v: SimpleNamespace) -> Iterator[Rule]:
    if v.ref_model_quantization_bit and not v.ref_model:
        message = "ref_model_quantization_bit: without ref_model the reference is the model that trains: set ref_model"
        yield ("ref_model_quantization_bit", "ref_model"), f"{message}, or quantization_bit, which is for both"
    if v.ref_adapter == "start":
        names = ("ref_adapter", "adapter_name_or_path", "finetuning_type", "create_new_adapter", "ref_model")
        what = "ref_adapter: start is the given adapter as it was, but"
        other = next((name for name in ("ref_model", "ref_model_adapters") if getattr(v, name)), None)
        if v.finetuning_type != "lora":
            yield names, f"{what} finetuning_type: {v.finetuning_type} has none: leave it out"
        elif not v.adapter_name_or_path:
            yield names, f"{what} none is given: set adapter_name_or_path, or leave ref_adapter out"
        elif v.create_new_adapter:
            message = "create_new_adapter merges it into the base, which is the reference already"
            yield names, f"{what} {message}: leave ref_adapter out"
        elif other:
            yield (other, *names), f"{other} and ref_adapter: start are two references: choose one"
    if v.precompute_ref_log_probs and v.streaming:
        message = "precompute_ref_log_probs needs all rows before the first update, but streaming never has all of them"
        yield ("precompute_ref_log_probs", "streaming"), f"{message}: leave it out"
    if v.pissa_init and v.finetuning_type == "lora" and not v.ref_model:
        message = "pissa_init changes the base, so the reference must be computed before the first update"
        if v.precompute_ref_log_probs is False:
            yield ("precompute_ref_log_probs", "pissa_init"), f"{message}: leave out precompute_ref_log_probs: false"
        elif v.streaming:
            yield ("pissa_init", "streaming"), f"{message}, and streaming reads rows later: leave one of them out"


def _teacher(v: SimpleNamespace, stage: StageRules) -> Iterator[Rule]:
    if not stage.learns_tokens:
        message = f"teacher_model is only for stages pt and sft, not {v.stage}: leave it out"
        hint = ", or set ref_model to what answers are compared with" if stage.has_reference else ""
        yield ("teacher_model", "stage"), message + hint
    for name in ("use_dft_loss", "use_eaft_loss", "use_asft_loss", "label_smoothing_factor"):
        if getattr(v, name):
            yield (name, "teacher_model"), f"{name} and teacher_model: each is a loss of its own: choose one"


def notes(v: SimpleNamespace, given: Collection[str], changed: Collection[str]) -> Iterator[Note]:
    """What of the given arguments is not used, or is not what LLaMA-Factory makes of it.

    Args:
      v: the values of all arguments.
      given: the names that the case gives.
      changed: those of them whose value is not the default.
    """
    stage = rules_of(v.stage)
    for name in changed:
        if name in _READERS and not _READERS[name][1](stage):
            yield name, f"{name} is ignored in stage {v.stage}: {_READERS[name][0]}"
        elif name in _OF_ONE_LOSS and not (stage.compares_answers and _OF_ONE_LOSS[name] in v.pref_loss):
            yield name, f"{name} is ignored without stage: dpo and pref_loss: {_OF_ONE_LOSS[name]}"
        elif name in _TEACHER and not v.teacher_model:
            yield name, f"{name} is ignored without teacher_model"
        elif name == "distill_beta" and v.distill_loss != "js":
            yield name, "distill_beta is ignored without distill_loss: js"
    if stage.compares_answers:
        yield from _notes_of_losses(v)
        if not needs_reference(v):
            for name in (*REFERENCE, "ref_adapter", "precompute_ref_log_probs"):
                if name in changed and getattr(v, name):
                    yield name, f"{name} is ignored: pref_loss: {' + '.join(v.pref_loss)} has no reference"
    if needs_reference(v) and "ref_adapter" not in given:
        yield from _note_of_adapter(v)
    if stage.has_reference and v.lora_dropout and v.finetuning_type == "lora":
        message = "the model and its reference are computed alike, as in LLaMA-Factory"
        yield "lora_dropout", f"lora_dropout is not applied in stage {v.stage}: {message}"
    if stage.has_preferences:
        yield from _notes_of_batches(v, stage)


def _notes_of_losses(v: SimpleNamespace) -> Iterator[Note]:
    for name in v.pref_loss:
        if name in _SIGMOID_THERE:
            message = "LLaMA-Factory trains the sigmoid loss under this name, jtune the one that is named"
            yield "pref_loss", f"pref_loss: {name}: {message}"
    if "simpo" in v.pref_loss and v.pref_beta < 1:
        message = f"with pref_beta: {v.pref_beta:g}, as DPO has it, answers hardly differ for the loss"
        advice = (
            "SimPO's paper sets pref_beta from 2 to 10, and simpo_gamma from 0.3 to 1.6 times that (arXiv:2405.14734)"
        )
        yield "pref_loss", f"pref_loss: simpo: {message}: {advice}"


def _note_of_adapter(v: SimpleNamespace) -> Iterator[Note]:
    """Of an adapter that goes on being trained: what stands for the reference is not the model at the start."""
    continued = v.finetuning_type == "lora" and v.adapter_name_or_path and not v.create_new_adapter
    if continued and not v.ref_model and not v.ref_model_adapters:
        message = "the reference is the base without this adapter, as in LLaMA-Factory"
        yield (
            "adapter_name_or_path",
            f"adapter_name_or_path: {message}: ref_adapter: start makes it the adapter as it is given, ref_adapter: "
            "base leaves it so without this note",
        )


def _notes_of_batches(v: SimpleNamespace, stage: StageRules) -> Iterator[Note]:
    items = "pairs" if stage.rows == "pair" else "answers"
    if v.packing or v.neat_packing:
        name = "neat_packing" if v.neat_packing else "packing"
        shorter = ", and cutoff_len is one token less, as in LLaMA-Factory" if v.packing else ""
        yield (
            name,
            f"{name}: {items} always share rows, without seeing each other, so this changes nothing else{shorter}",
        )
    if v.compute_accuracy:
        measured = (
            "eval_accuracy" if stage.scores else "rewards/accuracies" if stage.rows == "pair" else "rewards/margins"
        )
        yield "compute_accuracy", f"compute_accuracy is ignored in stage {v.stage}: {measured} is always measured"
    if stage.rows == "feedback" and v.per_device_train_batch_size == 1:
        message = "KTO's divergence is estimated from the rows of a batch, on one device from a single row"
        yield "per_device_train_batch_size", f"per_device_train_batch_size: 1: {message}: 4 or more is steadier"


def metrics(v: SimpleNamespace) -> tuple[str, ...]:
    """What an evaluation measures in a stage of preferences besides the loss, without "eval_"."""
    stage = rules_of(v.stage)
    if stage.scores:
        return ("accuracy",)
    if not stage.has_preferences:
        return ()
    sides = [f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")]
    sides += ["rewards/margins"] if stage.rows == "feedback" else ["rewards/margins", "rewards/accuracies"]
    if "orpo" in v.pref_loss and stage.compares_answers:
        sides += ["sft_loss", "odds_ratio_loss"]
    return (*sides, *(["kl"] if stage.rows == "feedback" else []))
