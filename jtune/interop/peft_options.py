"""adapter_config.json: each option of PEFT's LoraConfig is honoured, has no effect on a saved adapter, or is refused.

OPTIONS is the one table of them; the reader asks nothing that is not in it.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jtune.errors import DataError
from jtune.files import read_object

log = logging.getLogger("jtune")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "lm_head")

Test = Callable[[Any], bool]
NUMBER: Test = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
COUNT: Test = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0
RANK: Test = lambda x: COUNT(x) and x > 0
SWITCH: Test = lambda x: isinstance(x, bool) or x is None
NAMES: Test = lambda x: x is None or (isinstance(x, list) and all(isinstance(name, str) for name in x))
TARGETS: Test = lambda x: isinstance(x, str) or NAMES(x)
INDICES: Test = lambda x: isinstance(x, list) and all(map(COUNT, x))
ROWS: Test = lambda x: not x or INDICES(x) or (isinstance(x, dict) and all(map(INDICES, x.values())))
INIT: Test = lambda x: isinstance(x, bool | str) or x is None
ANY: Test = lambda _: True


def pattern_of(value: Test) -> Test:
    """Whether it is a dict from regular expressions to values that pass."""

    def is_expression(x: str) -> bool:
        try:
            re.compile(x)
        except re.error:
            return False
        return True

    return lambda x: not x or (isinstance(x, dict) and all(is_expression(k) and value(v) for k, v in x.items()))


def only(*values: Any) -> Test:
    """Whether it is one of the values under which an option does nothing; jtune does not honour others."""
    return lambda x: any(x == value and isinstance(x, bool) == isinstance(value, bool) for value in values)


# Option -> (whether its value is one that is read, what is expected). Of those with ANY, the tensors in the file tell
# what matters, or it matters to training, or to where things lie, only.
OPTIONS: dict[str, tuple[Test, str]] = {
    "peft_type": (only("LORA"), "'LORA'"),
    "r": (RANK, "a whole number above 0"),
    "lora_alpha": (NUMBER, "a number"),
    "rank_pattern": (pattern_of(RANK), "regular expressions, each with a whole number above 0"),
    "alpha_pattern": (pattern_of(NUMBER), "regular expressions, each with a number"),
    "lora_dropout": (lambda x: x is None or (NUMBER(x) and 0 <= x <= 1), "a number from 0 to 1"),
    "use_rslora": (SWITCH, "true or false"),
    "use_dora": (SWITCH, "true or false"),
    "modules_to_save": (NAMES, "a list of names"),
    "target_modules": (TARGETS, "a list of names, or a regular expression"),
    "exclude_modules": (TARGETS, "a list of names, or a regular expression"),
    "target_parameters": (NAMES, "a list of names"),
    "layers_to_transform": (lambda x: x is None or COUNT(x) or INDICES(x), "layer numbers"),
    "trainable_token_indices": (ROWS, "token ids, or modules with token ids each"),
    "init_lora_weights": (INIT, "true, false, or a name"),  # see `start_of`
    # Not honoured: what they change, jtune does not compute.
    "bias": (only("none", None), "'none'"),
    "lora_bias": (only(False, None), "False"),
    "use_qalora": (only(False, None), "False"),
    "layer_replication": (only(None), "None"),
    "alora_invocation_tokens": (only(None), "None"),
    "use_bdlora": (only(None, False), "None"),
    "arrow_config": (only(None), "None"),
    "kasa_config": (only(None), "None"),
    "monteclora_config": (only(None), "None"),
    "megatron_config": (only(None), "None"),
    # Without effect on what a saved adapter computes.
    "task_type": (ANY, ""),
    "auto_mapping": (ANY, ""),
    "peft_version": (ANY, ""),
    "base_model_name_or_path": (ANY, ""),
    "revision": (ANY, ""),
    "inference_mode": (ANY, ""),
    "fan_in_fan_out": (ANY, ""),  # how the base is stored, which its family tells
    "layers_pattern": (ANY, ""),
    "megatron_core": (ANY, ""),
    "loftq_config": (ANY, ""),  # the starts are told by init_lora_weights
    "eva_config": (ANY, ""),
    "corda_config": (ANY, ""),
    "lora_ga_config": (ANY, ""),
    "velora_config": (ANY, ""),  # what the backward pass keeps
    "qalora_group_size": (ANY, ""),
    "runtime_config": (ANY, ""),
    "ensure_weight_tying": (ANY, ""),
}
DEFAULTS = {"r": 8, "lora_alpha": 8}  # PEFT's
# Values of init_lora_weights that leave the base as it is.
HARMLESS = ("gaussian", "eva", "orthogonal", "mica")


def read_options(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json, each option checked.

    Raises:
      DataError: there is none, it is no LoRA adapter's, a value is of the wrong kind, or jtune does not honour it.
    """
    path = folder / CONFIG
    try:
        options = read_object(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file: is {folder} a PEFT adapter?") from error
    if options.get("peft_type") != "LORA":
        raise DataError(f"{path}: peft_type is {options.get('peft_type')!r}; jtune reads LORA")
    options = DEFAULTS | options
    for key, value in options.items():
        if key in OPTIONS:
            fits, expected = OPTIONS[key]
            if not fits(value):
                raise DataError(f"{path}: {key}={value!r} is not supported; expected {expected}")
        elif value and (key.startswith("use_") or key.endswith("_config")):  # as PEFT names its variants of LoRA
            raise DataError(f"{path}: {key}={value!r} is an option that jtune does not know, and may change the result")
        elif value:
            log.info("note: %s: %s=%r is an option that jtune does not know: it has no effect", path, key, value)
    if start_of(options, path) and options.get("use_dora"):
        raise DataError(f"{path}: use_dora with init_lora_weights={options['init_lora_weights']!r} is not supported")
    return options


def start_of(options: Mapping[str, Any], path: Path) -> Literal["pissa", "olora"] | None:
    """What PEFT takes out of the base when it loads the adapter: a part that follows from the kernel, or nothing.

    Raises:
      DataError: the part depends on random numbers, or on data, that are not with the adapter.
    """
    init = options.get("init_lora_weights", True)
    if not isinstance(init, str) or init.lower() in HARMLESS:
        return None
    if init == "pissa":
        return "pissa"
    if init.lower() == "olora":
        return "olora"
    raise DataError(
        f"{path}: init_lora_weights={init!r}: the adapter belongs on a base that its start has changed, in a way that "
        "does not follow from the files; convert it with PEFT where it was trained: model.save_pretrained(folder, "
        "path_initial_model_for_weight_conversion=folder of the adapter before training)"
    )


def selective(options: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json says which layers are adapted, by their numbers: the others are not."""
    layers, targets = options.get("layers_to_transform"), options.get("target_modules") or ()
    names = [*([targets] if isinstance(targets, str) else targets), *(options.get("target_parameters") or ())]
    numbered = isinstance(targets, str) or any(re.search(r"\.\d+\.", name) for name in names)
    return bool(layers or layers == 0 or options.get("exclude_modules") or numbered)


def note_base(options: Mapping[str, Any], folder: Path, base: str | None) -> None:
    """Say it, if the adapter names another base than the one that is given."""
    named = options.get("base_model_name_or_path")
    if isinstance(named, str) and named and base and Path(named).name != Path(base).name:
        log.info("note: %s was trained on %s; the base given is %s", folder, named, base)
