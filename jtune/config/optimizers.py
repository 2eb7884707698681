"""Hugging Face's names of optimizers: the rule of each, the refused names with their nearest rule, and `optim_args`."""

import difflib
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from jtune.config.kinds import Mismatch, coerce

Rule = tuple[tuple[str, ...], str]  # as in jtune.config.check

# Value of `optim` -> its rule. "paged" is about where bitsandbytes keeps the state; the computation is the same.
METHODS: dict[str, str] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw_32bit"), "adamw"),
    **dict.fromkeys(("adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), "adamw_8bit"),
    "adafactor": "adafactor",
    "sgd": "sgd",
    "adagrad": "adagrad",
    **dict.fromkeys(("rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit"), "rmsprop"),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), "lion"),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), "lion_8bit"),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), "ademamix"),
}  # fmt: skip

# Refused value of `optim` -> the nearest that works.
REFUSED: dict[str, str] = {
    "adamw_anyprecision": "adamw_torch (moments are float32), with pure_bf16: true for parameters in bfloat16",
    "adamw_torch_4bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), "ademamix, or adamw_8bit"),
    "rmsprop_bnb_8bit": "rmsprop, or adamw_8bit",
    **dict.fromkeys(("galore_adamw", "galore_adamw_layerwise"), "adamw_torch with use_galore: true"),
    **dict.fromkeys(("galore_adamw_8bit", "galore_adamw_8bit_layerwise"), "adamw_8bit with use_galore: true"),
    **dict.fromkeys(("galore_adafactor", "galore_adafactor_layerwise"), "adafactor with use_galore: true"),
    **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), "adamw_torch with use_apollo: true"),
    **dict.fromkeys(("lomo", "adalomo"), "adafactor, which also keeps almost no state"),
    "grokadamw": "adamw_torch",
    **dict.fromkeys(
        ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
        "adamw_torch with lr_scheduler_type: constant_with_warmup",
    ),
    "stable_adamw": "adamw_torch with max_grad_norm",
}


class Option(NamedTuple):
    """A key of `optim_args`."""

    kind: Any
    default: Any
    only: bool = False  # only the default is built


OPTIONS: dict[str, dict[str, Option]] = {
    "sgd": {
        "momentum": Option(float, 0.0),
        "nesterov": Option(bool, False),
        "dampening": Option(float, 0.0, only=True),
    },
    "adagrad": {"lr_decay": Option(float, 0.0), "eps": Option(float, 1e-10)},
    "rmsprop": {
        "alpha": Option(float, 0.99),
        "momentum": Option(float, 0.0),
        "eps": Option(float, 1e-8),
        "centered": Option(bool, False),
    },
    "ademamix": {"beta3": Option(float, 0.9999), "alpha": Option(float, 5.0)},
    # Hugging Face's Trainer always sets these to False.
    "adafactor": {name: Option(bool, False, only=True) for name in ("scale_parameter", "relative_step", "warmup_init")},
}

# Flags that each choose an optimizer.
FLAGS = ("use_galore", "use_apollo", "use_adam_mini", "use_muon")


def method(optim: str, adafactor: bool) -> str:
    """The rule that `optim` and `adafactor` ask for."""
    return "adafactor" if adafactor else METHODS[optim]


def options(method: str, optim_args: str | None) -> dict[str, Any]:
    """The values of `optim_args` (`key=value,key=value`), with defaults for the missing ones.

    Raises:
      Mismatch: says what is wrong.

    >>> options("sgd", "momentum=0.9, nesterov=true")
    {'momentum': 0.9, 'nesterov': True, 'dampening': 0.0}
    """
    known = OPTIONS.get(method, {})
    values = {name: option.default for name, option in known.items()}
    for part in (optim_args or "").replace(" ", "").split(","):
        name, equals, value = part.partition("=")
        if not part:
            continue
        if not equals:
            raise Mismatch(f"optim_args: {part!r} is not key=value")
        if name == "weight_decay":
            raise Mismatch("optim_args: weight_decay is an argument of its own: set that one")
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            hint = "; set adam_beta1, adam_beta2, adam_epsilon" if name in ("betas", "beta1", "beta2", "eps") else ""
            raise Mismatch(f"optim_args: {method} has no {name}: {takes}{hint}")
        try:
            values[name] = coerce(known[name].kind, value)
        except Mismatch as mismatch:
            raise Mismatch(f"optim_args: {name} is {value!r}, expected {mismatch}") from None
        if known[name].only and values[name] != known[name].default:
            raise Mismatch(f"optim_args: {name}={value} is not built (it is {known[name].default}): leave it out")
    return values


def faults(v: SimpleNamespace) -> Iterator[Rule]:
    """Contradictions in the choice of an optimizer."""
    if v.optim not in METHODS:
        near = difflib.get_close_matches(v.optim, METHODS, n=1)
        hint = f"did you mean {near[0]}? There are" if near else "there are"
        nearest = REFUSED.get(v.optim)
        known = f"the nearest is {nearest}" if nearest else f"{hint} {', '.join(METHODS)}"
        yield ("optim",), f"optim: {v.optim} is not built: {known}"
        return
    chosen = method(v.optim, v.adafactor)
    if v.adafactor and METHODS[v.optim] not in ("adamw", "adafactor"):
        yield ("adafactor", "optim"), f"adafactor: true contradicts optim: {v.optim}: leave one of them out"
    try:
        given = options(chosen, v.optim_args)
        if given.get("nesterov") and not given["momentum"]:
            yield ("optim_args",), "optim_args: nesterov=true needs momentum, as in momentum=0.9"
    except Mismatch as mismatch:
        yield ("optim_args", "optim"), str(mismatch)
    yield from _flags(v, chosen)
    for name in ("galore", "apollo"):
        layerwise = f"{name}_layerwise"
        if getattr(v, f"use_{name}") and getattr(v, layerwise) and v.gradient_accumulation_steps > 1:
            message = f"{layerwise} updates after each batch: set gradient_accumulation_steps: 1, or leave it out"
            yield (layerwise, "gradient_accumulation_steps"), message
    if v.loraplus_lr_ratio is not None:
        if v.finetuning_type != "lora":
            message = f"loraplus_lr_ratio is only for finetuning_type: lora, not {v.finetuning_type}"
            yield ("loraplus_lr_ratio", "finetuning_type"), message
        if not v.learning_rate:
            yield ("loraplus_lr_ratio", "learning_rate"), "loraplus_lr_ratio multiplies learning_rate, which is 0"


def _flags(v: SimpleNamespace, chosen: str) -> Iterator[Rule]:
    on = [name for name in FLAGS if getattr(v, name)]
    on += ["loraplus_lr_ratio"] if on and v.loraplus_lr_ratio is not None else []
    if len(on) > 1:
        yield tuple(on), f"{' and '.join(on)} are different optimizers: choose one"
    for name in on[:1]:
        fits = ("adamw", "adamw_8bit", "adafactor") if name == "use_galore" else ("adamw",)
        if chosen not in fits:
            nearest = "adamw_torch, adamw_8bit or adafactor" if len(fits) > 1 else "adamw_torch"
            yield (name, "optim"), f"{name} is not built for optim: {v.optim}: set optim: {nearest}"
        if v.finetuning_type == "lora" and name != "use_muon":
            message = f"{name} is not for finetuning_type: lora, whose state is small already: set full or freeze"
            yield (name, "finetuning_type"), f"{message}, or leave it out"


def notes(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """`(name, note)` for arguments that are accepted but mean less than they say."""
    optim = values.get("optim", "")
    if optim.startswith("paged_") and optim in METHODS:
        yield "optim", f"optim: {optim}: no state is paged to main memory; it is split over the devices"
    for name in ("galore_layerwise", "apollo_layerwise"):
        if values.get(name):
            owner = f"use_{name.partition('_')[0]}"
            used = f"gradients are not scaled to max_grad_norm, as in LLaMA-Factory. {_WHOLE}"
            yield name, f"{name}: {used}" if values.get(owner) else f"{name} is ignored without {owner}: true"


_WHOLE = "Layers are still updated together: mesh_fsdp splits their gradients over the devices"
