"""Safetensors files: what a folder holds, parts of tensors read, tensors written one at a time.

The format: eight bytes, how long the header is; the header, JSON: name -> dtype, shape, where its bytes are; the bytes.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jtune.errors import DataError, NonFiniteError
from jtune.files import read_object

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
}
FLOAT8 = "F8_E4M3"
BLOCK = 128  # rows and columns of a float8 kernel that share a scale
# How a float8 tensor's scales are called, beside its own name: what is stored is multiplied by them, by either.
SCALES = ("_scale_inv", "_scale")


FINITE_PIECE = 2**16  # elements
COPIED_PIECE = 2**24  # bytes


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    offset: int  # of its first byte, in the file
    shape: tuple[int, ...]
    dtype: str  # safetensors' name
    size: int = 0  # bytes in the file


# ---------------------------------------------------------------------- what there is


def open_weights(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, one file or sharded. Nothing but headers is read, and no file stays open.

    Raises:
      DataError: there are no safetensors files, or any is missing or cut short, or is not what the index says; all that
        is wrong.
    """
    index = read_index(folder)
    files = sorted(set(index.values())) if index else [WEIGHTS]
    faults, held = [], {}
    for file in files:
        try:
            held[file] = read_header(folder / file)
        except DataError as error:
            faults.append(str(error))
    for file, names in held.items():
        missing = [name for name, where in index.items() if where == file and name not in names]
        faults += [f"{folder / file}: {name} is not in it, though {INDEX} says so" for name in grouped(missing)]
    if faults:
        raise DataError("\n".join(faults))
    everything = {name: stored for names in held.values() for name, stored in names.items()}
    return everything | {name: held[file][name] for name, file in index.items()}  # of two with one name, the index's


def read_index(folder: Path) -> dict[str, str]:
    """Tensor -> file, as model.safetensors.index.json says; empty where one file holds all.

    Raises:
      DataError: it is no index, or names files of other folders; or there is neither an index nor the one file.
    """
    path = folder / INDEX
    if not path.exists():
        if (folder / WEIGHTS).exists():
            return {}
        raise DataError(f"{folder}: there is neither {WEIGHTS} nor {INDEX}.{_way_out(folder)}")
    try:
        index = read_object(path)["weight_map"]
        files = set(index.values())
        strange = sorted(file for file in files if Path(file).name != file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not an index of safetensors files: {error!r}") from error
    if strange:
        raise DataError(f"{path}: names {', '.join(map(repr, strange))}: not a file of this folder")
    pickles = sorted(file for file in files if file.endswith(PICKLES))
    if pickles or not files:
        raise DataError(f"{path}: names {', '.join(pickles) or 'no files'}; expected safetensors.{_way_out(folder)}")
    return index


def _way_out(folder: Path) -> str:
    """What to do about a folder without safetensors."""
    pickles = sorted(file.name for file in folder.iterdir() if file.name.endswith(PICKLES))
    if not pickles:
        return ""
    return (
        f" {pickles[0]} is a pickle, which can run any code when it is read, so jtune does not. If you trust where it "
        "comes from, convert it:\n"
        f"  python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}', "
        f"dtype='auto', trust_remote_code=False).save_pretrained('{folder}-safetensors')\""
    )


def read_header(path: Path) -> dict[str, Stored]:
    """What a file holds.

    Raises:
      DataError: there is no such file, or it is not whole.
    """
    try:
        with safe_open(path, "np"):  # checks the header, and that the file is as long as it says
            pass
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
    except FileNotFoundError as error:
        raise DataError(f"{path}: the index names this file, but it is not there") from error
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a complete safetensors file: {error}") from error
    return {
        name: Stored(
            path,
            start + (bounds := entry["data_offsets"])[0],
            tuple(entry["shape"]),
            entry["dtype"],
            bounds[1] - bounds[0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def grouped(names: Iterable[str]) -> list[str]:
    """Names that differ in numbers only, as one each.

    >>> grouped(["a.0.b", "a.1.b", "a.2.b", "a.5.b", "c.weight", "e.1.w", "f.1.w.0", "f.2.w.1"])
    ['a.{0-2,5}.b (4 of them)', 'c.weight', 'e.1.w', 'f.{1-2}.w.{0-1} (2 of them)']
    """
    patterns: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        words = name.split(".")
        pattern = tuple("*" if word.isdecimal() else word for word in words)
        patterns.setdefault(pattern, []).append(tuple(int(word) for word in words if word.isdecimal()))
    found = []
    for pattern, numbers in patterns.items():
        columns = iter([_ranges(sorted(set(column))) for column in zip(*numbers)])
        count = f" ({len(numbers)} of them)" if len(numbers) > 1 else ""
        found.append(".".join(next(columns) if word == "*" else word for word in pattern) + count)
    return found


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


# ---------------------------------------------------------------------- reading


def map_files(stored: Iterable[Stored]) -> dict[Path, np.ndarray]:
    """The files of these tensors as bytes that are read when they are looked at, until the dict is let go."""
    return {path: np.memmap(path, np.uint8, "r") for path in {x.file for x in stored}}


def read_part(
    stored: Mapping[str, Stored], name: str, part: tuple[slice, ...], files: Mapping[Path, np.ndarray]
) -> np.ndarray:
    """`tensor[part]`, in the dtype that is stored: a view of the file. Of float8 the values, in float32.

    Args:
      part: a slice with start and stop for each dimension.
      files: see `map_files`.
    """
    x = _view(stored[name], files)[part]
    if stored[name].dtype != FLOAT8:
        return x
    scale = _view(stored[str(scale_name(stored, name))], files).astype(np.float32)
    blocks = [np.arange(p.start, p.stop) // BLOCK for p in part] if scale.size > 1 else None
    with np.errstate(invalid="ignore", over="ignore"):  # who reads it looks for NaN and says where (`is_finite`)
        return x.astype(np.float32) * (scale.reshape(()) if blocks is None else scale[blocks[0]][:, blocks[1]])


def same(stored: Mapping[str, Stored], *names: str) -> bool:
    """Whether two tensors hold the same numbers, compared some rows at a time."""
    if len({stored[name].shape for name in names}) > 1 or any(stored[name].dtype not in DTYPES for name in names):
        return False
    a, b = (_view(stored[name], map_files([stored[name]])) for name in names)
    rows = max(1, 2**24 // max(1, math.prod(a.shape[1:])))
    return all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


def is_finite(x: np.ndarray) -> bool:
    """Whether there is neither NaN nor infinity: told by the bits, in pieces that stay in the processor's cache."""
    x = np.asarray(x)
    bits = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}
    if x.dtype.name not in bits or not x.flags.c_contiguous:
        return bool(np.isfinite(np.asarray(x, np.float32)).all())
    kind, exponent = bits[x.dtype.name]
    flat = x.reshape(-1).view(kind)
    sign_out = np.empty(min(len(flat), FINITE_PIECE), kind)
    for first in range(0, len(flat), FINITE_PIECE):
        piece = flat[first : first + FINITE_PIECE]
        if np.left_shift(piece, 1, out=sign_out[: len(piece)]).max() >= exponent << 1:
            return False
    return True


def _view(stored: Stored, files: Mapping[Path, np.ndarray]) -> np.ndarray:
    dtype = DTYPES[stored.dtype]
    size = math.prod(stored.shape) * dtype.itemsize
    return files[stored.file][stored.offset : stored.offset + size].view(dtype).reshape(stored.shape)


def scale_name(stored: Mapping[str, Stored], name: str) -> str | None:
    """The tensor that holds the scales of the float8 tensor `name`."""
    return next((name + suffix for suffix in SCALES if name + suffix in stored), None)


def scale_fault(stored: Mapping[str, Stored], name: str) -> str | None:
    """What is wrong with the scales of a float8 tensor, if anything is."""
    scale = scale_name(stored, name)
    if scale is None:
        return f"is float8 and has no {name.rpartition('.')[2]}{SCALES[0]}"
    shape, dtype = stored[scale].shape, stored[scale].dtype
    if dtype not in DTYPES or dtype == FLOAT8:
        return f"is float8, its scale is {dtype}; expected F32 or BF16"
    blocks = tuple(-(-size // BLOCK) for size in stored[name].shape)
    if math.prod(shape) != 1 and (shape != blocks or len(blocks) != 2):
        return f"is float8, its scale has shape {list(shape)}; expected one for each {BLOCK}x{BLOCK}, {list(blocks)}"
    return None


# ---------------------------------------------------------------------- writing


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterable[np.ndarray],
    max_shard_bytes: int,
    copied: Mapping[str, Stored] | None = None,
) -> None:
    """Write safetensors files, and their index if they are several. One tensor is held at a time.

    Args:
      shapes: of all tensors, by name; they are cut into files in this order.
      tensors: of these shapes, in this order; cast to `dtype`.
      copied: tensors of other files, by name, which are written after them, byte for byte.

    Raises:
      NonFiniteError: a tensor holds NaN or infinity, by name.
    """
    copied = dict(copied or {})
    kind = next(theirs for theirs, ours in DTYPES.items() if ours == dtype)
    entries = {name: Stored(Path(), 0, shape, kind) for name, shape in shapes.items()} | copied
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    sizes |= {name: x.size for name, x in copied.items()}
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    arrays = iter(tensors)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = [WEIGHTS] if len(files) == 1 else files
    for path, names in zip(files, shards):
        with (folder / path).open("wb") as file:
            file.write(_header({name: entries[name] for name in names}, sizes))
            for name in names:
                if name in copied:
                    with copied[name].file.open("rb") as other:
                        other.seek(copied[name].offset)
                        for left in range(sizes[name], 0, -COPIED_PIECE):
                            file.write(other.read(min(left, COPIED_PIECE)))
                    continue
                x = next(arrays)
                if x.shape != shapes[name]:
                    raise ValueError(f"{name} is {x.shape}, expected {shapes[name]}")
                x = np.ascontiguousarray(x, dtype)
                if not is_finite(x):
                    raise NonFiniteError(f"{name} is not written: not finite (NaN or infinity) in {dtype.name}")
                file.write(x.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())  # the name they get next must not stand for less than this
    if len(files) > 1:
        where = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(entries: Mapping[str, Stored], sizes: Mapping[str, int]) -> bytes:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, x in entries.items():
        entry = {"dtype": x.dtype, "shape": list(x.shape), "data_offsets": [offset, offset + sizes[name]]}
        header[name] = entry  # type: ignore[assignment]
        offset += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the bytes after it begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text
