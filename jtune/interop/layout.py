"""Which tensors of a checkpoint are the decoder's, and which belong to what is around or beside it.

Files name the same tensors in several ways: an image-text model holds its text stack at one of a few places, and
experts lie in a tensor each or in one for all. `open_decoder` gives all of them the names of `jtune.models.names`.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from jtune.errors import ConfigError
from jtune.interop.weights import DTYPES, FLOAT8, Stored, open_weights
from jtune.models import DecoderConfig
from jtune.models.families import file_names
from jtune.models.families.wrapped import PLACES, WRAPPERS, Place, place_in
from jtune.models.names import Tensor, further_heads, tensors


def open_decoder(folder: Path, config: DecoderConfig) -> dict[str, Stored]:
    """`of_decoder` of the files in a folder.

    Raises:
      DataError: see `jtune.interop.weights.open_weights`.
    """
    return of_decoder(open_weights(folder), config)


def of_decoder(stored: Mapping[str, Stored], config: DecoderConfig) -> dict[str, Stored]:
    """The tensors of a checkpoint but for `others`, by the names of `jtune.models.names.tensors`."""
    beside = others(stored, config)
    names = _moved([name for name in stored if name not in beside], _place(stored, config), _own_place(config))
    for pattern, replacement in file_names(config).also_read:
        names = {name: re.sub(pattern, replacement, ours) for name, ours in names.items()}
    return _one_each({ours: stored[name] for name, ours in names.items()}, config)


def others(stored: Mapping[str, Stored], config: DecoderConfig) -> dict[str, Stored]:
    """The tensors of a model that are not its decoder's: of other towers, and heads that predict tokens after the
    next, which transformers does not read either.
    """
    place, heads = _place(stored, config), further_heads(stored, config.num_hidden_layers)
    inside = () if place is None else (f"{place.prefix}.", f"{place.head}.")
    is_other = lambda name: name in heads or (place is not None and not name.startswith(inside))
    return {name: x for name, x in stored.items() if is_other(name)}


def copied(stored: Mapping[str, Stored], config: DecoderConfig) -> dict[str, Stored]:
    """Those of `others` that go to what is written, byte for byte. Heads in float8 do not: nothing else is in it there.

    Raises:
      ConfigError: towers are stored in float8.
    """
    beside, heads = others(stored, config), further_heads(stored, config.num_hidden_layers)
    if any(beside[name].dtype == FLOAT8 for name in heads & beside.keys()):
        beside = {name: x for name, x in beside.items() if name not in heads}
    if packed := next((name for name, x in beside.items() if x.dtype == FLOAT8), None):
        raise ConfigError(
            f"{beside[packed].file}: {packed} is float8, and is not of the text model: jtune writes other weights "
            "without float8, and cannot write these beside them. Train an adapter (finetuning_type: lora), or take a "
            "release in bfloat16"
        )
    return beside


def to_place(names: Iterable[str], config: DecoderConfig, stored: Mapping[str, Stored]) -> dict[str, str]:
    """The name that each tensor of the decoder gets in a file: as in the checkpoint that `stored` is of."""
    return _moved(names, _own_place(config), _place(stored, config))


def in_place(names: Iterable[str], config: DecoderConfig) -> dict[str, str]:
    """The names of an adapter's tensors, made by whatever version of transformers, as those of today's model."""
    names = list(names)
    within = lambda place: any(name.startswith((f"{place.prefix}.layers.", f"{place.prefix}.embed_")) for name in names)
    return _moved(names, next(filter(within, PLACES), None), _own_place(config))


def turned(part: Tensor, shape: tuple[int, ...], stored: Mapping[str, Stored]) -> Tensor:
    """The tensor as these files hold it, where they hold all experts of a layer the other way round.

    Args:
      shape: of the tensor, if it lies as `part` says.
    """
    here = stored.get(part.name)
    if here is None or len(shape) != 3 or here.shape == shape or here.shape != (shape[0], shape[2], shape[1]):
        return part
    return part._replace(transposed=not part.transposed)


def _own_place(config: DecoderConfig) -> Place | None:
    """Where the text stack of an image-text model is in transformers' model; None: the model is one."""
    return None if config.wrapper is None else WRAPPERS[config.wrapper]


def _place(stored: Collection[str], config: DecoderConfig) -> Place | None:
    """Where these files hold it."""
    if config.wrapper is None:
        return None
    [embedding] = tensors(("embed_tokens", "embedding"), config, range(0))
    last = embedding.name.removeprefix(f"{file_names(config).prefix}.")
    return place_in(stored, config.wrapper, last)


def _moved(names: Iterable[str], old: Place | None, new: Place | None) -> dict[str, str]:
    """Each name, and what it becomes when the text stack moves from one place to another; None: it stays."""

    def at_new(name: str) -> str:
        if old is not None and new is not None:
            for before, after in ((old.prefix, new.prefix), (old.head, new.head)):
                if name.startswith(f"{before}."):
                    return after + name.removeprefix(before)
        return name

    return {name: at_new(name) for name in names}


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
