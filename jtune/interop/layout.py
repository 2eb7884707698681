"""Which tensors of a checkpoint are the decoder's, and which belong to what is around or beside it.

Files name the same tensors in several ways: an image-text model holds its text stack at one of a few places, and
experts lie in a tensor each or in one for all. `open_decoder` gives all of them the names of `jtune.models.names`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from jtune.errors import ConfigError
from jtune.interop.weights import DTYPES, FLOAT8, Stored, open_weights
from jtune.models import DecoderConfig
from jtune.models.families import file_names
from jtune.models.families.wrapped import PLACES, WRAPPERS, Place, place_in
from jtune.models.names import Tensor, further_heads, tensors


def open_decoder(folder: Path, config: DecoderConfig) -> dict[str, Stored]:
    """The tensors of a checkpoint but for `others`, by the names of `jtune.models.names.tensors`.

    Raises:
      DataError: see `jtune.interop.weights.open_weights`.
    """
    stored = open_weights(folder)
    beside = others(stored, config)
    names = _canonical(stored, config)
    return _one_each({names[name]: x for name, x in stored.items() if name not in beside}, config)


def others(stored: Mapping[str, Stored], config: DecoderConfig) -> dict[str, Stored]:
    """The tensors of a model that are not its decoder's: of other towers, and heads that predict tokens after the
    next, which transformers does not read either.
    """
    place, heads = _place(stored, config), further_heads(stored, config.num_hidden_layers)
    inside = () if place is None else (f"{place.prefix}.", f"{place.head}.")
    is_other = lambda name: name in heads or (place is not None and not name.startswith(inside))
    return {name: x for name, x in stored.items() if is_other(name)}


def copied(base: Path, config: DecoderConfig) -> dict[str, Stored]:
    """Those of `others` that go to what is written, byte for byte. Heads in float8 do not: nothing else is in it there.

    Raises:
      ConfigError: towers are stored in float8.
    """
    stored = open_weights(base)
    beside, heads = others(stored, config), further_heads(stored, config.num_hidden_layers)
    if any(beside[name].dtype == FLOAT8 for name in heads & beside.keys()):
        beside = {name: x for name, x in beside.items() if name not in heads}
    if packed := next((name for name, x in beside.items() if x.dtype == FLOAT8), None):
        raise ConfigError(
            f"{base}: {packed} is float8, and is not of the text model: jtune writes other weights without float8, and "
            "cannot write these beside them. Train an adapter (finetuning_type: lora), or take a release in bfloat16"
        )
    return beside


def _canonical(stored: Iterable[str], config: DecoderConfig) -> dict[str, str]:
    """The name of each tensor as `jtune.models.names` has it."""
    stored = list(stored)
    place, their = _place(stored, config), file_names(config)
    names = {name: name for name in stored}
    if place is not None:
        names = {name: _moved(name, place, Place(their.prefix, their.words["lm_head"])) for name in stored}
    for pattern, replacement in their.also_read:
        names = {name: re.sub(pattern, replacement, ours) for name, ours in names.items()}
    return names


def to_place(names: Iterable[str], config: DecoderConfig, base: Path | None) -> dict[str, str]:
    """The name that each tensor gets in a file: that of the same tensor in the files of `base`."""
    names = list(names)
    place = None if base is None else _place(open_weights(base), config)
    if place is None:
        return {name: name for name in names}
    their = file_names(config)
    return {name: _moved(name, Place(their.prefix, their.words["lm_head"]), place) for name in names}


def in_place(names: Iterable[str], config: DecoderConfig) -> dict[str, str]:
    """The names of an adapter's tensors, made by whatever version of transformers, as those of today's model."""
    names = list(names)
    if config.wrapper is None:
        return {name: name for name in names}
    new = WRAPPERS[config.wrapper]
    within = lambda place: any(name.startswith((f"{place.prefix}.layers.", f"{place.prefix}.embed_")) for name in names)
    old = next((place for place in PLACES if within(place)), new)
    return {name: _moved(name, old, new) for name in names}


def turned(part: Tensor, shape: tuple[int, ...], stored: Mapping[str, Stored]) -> Tensor:
    """The tensor as these files hold it, where they hold all experts of a layer the other way round.

    Args:
      shape: of the tensor, if it lies as `part` says.
    """
    here = stored.get(part.name)
    if here is None or len(shape) != 3 or here.shape == shape or here.shape != (shape[0], shape[2], shape[1]):
        return part
    return part._replace(transposed=not part.transposed)


def _moved(name: str, old: Place, new: Place) -> str:
    for before, after in ((old.prefix, new.prefix), (old.head, new.head)):
        if name.startswith(f"{before}."):
            return after + name.removeprefix(before)
    return name


def _place(stored: Iterable[str], config: DecoderConfig) -> Place | None:
    """Where an image-text model holds its text stack; None: the model is one."""
    if config.wrapper is None:
        return None
    [embedding] = tensors(("embed_tokens", "embedding"), config, range(0))
    last = embedding.name.removeprefix(f"{file_names(config).prefix}.")
    return place_in(set(stored), config.wrapper, last)


def _one_each(stored: dict[str, Stored], config: DecoderConfig) -> dict[str, Stored]:
    """Cut tensors that hold all experts of a layer, `[experts, out, in]`, where the family's files have one each.

    An expert's part of such a tensor lies in one piece, so that it is a tensor of its own at another place of the file.
    """
    if config.experts is None or file_names(config).stacked_experts:
        return stored
    found: dict[str, Stored] = {}
    for name, x in stored.items():
        joined = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if joined is None or len(x.shape) != 3 or x.dtype not in DTYPES:
            found[name] = x
            continue
        count, rows, columns = x.shape
        parts = ("gate_proj", "up_proj") if joined[2] == "gate_up_proj" else ("down_proj",)
        size = rows // len(parts)
        step = math.prod((size, columns)) * DTYPES[x.dtype].itemsize
        for i in range(count):
            for j, part in enumerate(parts):
                at = x.offset + (i * len(parts) + j) * step
                found[f"{joined[1]}.{i}.{part}.weight"] = Stored(x.file, at, (size, columns), x.dtype)
    return found
