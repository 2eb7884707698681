"""An adapter as shapes, from its adapter_config.json alone."""

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

from jtune import tuning
from jtune.config import Config
from jtune.interop import hf, peft
from jtune.models import DecoderConfig
from jtune.models.families import file_names, module_names
from jtune.models.names import module_name
from jtune.tuning.expand import on_layers
from jtune.tuning.nodes import Path


def adapter_shapes(params: Any, decoder: DecoderConfig, path: str, config: Config) -> tuple[Any, tuple[str, ...]]:
    """What `jtune.interop.peft.load_adapter` gives, from adapter_config.json alone.

    Layers of a lower rank are filled up there: the highest rank counts.
    """
    folder = hf.fetch(path, weights=False, **config.model.hub) / (config.model.adapter_folder or "")
    options = peft.read_options(folder)
    rank = max(options["r"], *(options.get("rank_pattern") or {}).values(), 0)
    alpha, targets = options["lora_alpha"], options.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":  # a pattern for names of modules
        their = module_names(decoder)
        there = {path: module_name(path, their, layer=0, expert=0) for path, _ in tuning.kernels(params)}
        targets = [".".join(path) for path, name in there.items() if re.fullmatch(targets, name)]
    targets = ["all"] if targets == "all-linear" else [re.sub(r"^.*\.\d+\.", "", name) for name in targets or ()]
    for name in options.get("target_parameters") or ():  # a mixture's experts; weights of modules
        stem, last = re.sub(r"^.*\.\d+\.", "", name.removesuffix(".weight")).rpartition(".")[::2]
        targets += [f"{stem}.{x}".lstrip(".") for x in {"gate_up_proj": ("gate_proj", "up_proj")}.get(last, (last,))]
    dropout = float(options.get("lora_dropout") or 0.0)
    start = peft.start_of(options, folder / peft.CONFIG)
    form = "dora" if options.get("use_dora") else "pissa" if start else "lora"
    names = file_names(decoder)
    add = partial(tuning.lora.add, rank=rank, alpha=alpha, dropout=dropout, form=form, names=names)
    whole = peft.trained_whole(options, params, decoder)
    if not peft.selective(options):
        return add(params, targets), whole
    layers: dict[frozenset[int], list[Path]] = defaultdict(list)
    for module in tuning.select(params, targets, names):
        layers[adapted_layers(module, options, decoder)].append(module)
    for numbers, paths in layers.items():
        params = on_layers(params, numbers, paths, lambda tree, names, _: add(tree, names))
    outside = [".".join(module) for paths in layers.values() for module in paths if module[0] != "layers"]
    return add(params, outside) if outside else params, whole


def adapted_layers(path: Path, options: Mapping[str, Any], decoder: DecoderConfig) -> frozenset[int]:
    """The layers in which PEFT adapts the module at `path`."""
    count = range(decoder.num_hidden_layers)
    parameters = options.get("target_parameters") or ()
    modules = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
    if "experts" in path:
        of_experts = [name for name in parameters if not name.endswith(".weight")]
        return frozenset({int(i) for name in of_experts for i in re.findall(r"\.(\d+)\.", name)} or count)
    name = {i: module_name(path, module_names(decoder), layer=i) for i in count}
    chosen = options.get("layers_to_transform")
    chosen = {chosen} if isinstance(chosen, int) else set(chosen or count)

    def among(wanted: Any, i: int) -> bool:
        if isinstance(wanted, str):
            return wanted == "all-linear" or re.fullmatch(wanted, name[i]) is not None
        return name[i] in wanted or (i in chosen and any(name[i].endswith(f".{end}") for end in wanted))

    left_out = options.get("exclude_modules") or ()
    wanted = options.get("target_modules") or ()
    return frozenset(i for i in count if (among(wanted, i) or among(modules, i)) and not among(left_out, i))
