"""Hugging Face checkpoints: config.json and safetensors files, read straight to where they belong, and written back."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jtune.errors import DataError
from jtune.models import DecoderConfig, abstract_params
from jtune.models.families import file_names
from jtune.models.names import Tensor, located, tensors
from jtune.sharding import hosts, spread

log = logging.getLogger("jtune")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
# What a decoder of ours does not use, though some files hold it: buffers that follow from the config.
UNUSED = ("rotary_emb.inv_freq", "attn.masked_bias", ".attn.bias", ".attention.bias", ".attention.masked_bias")
DTYPES = {"BF16": jnp.bfloat16, "F16": jnp.float16, "F32": jnp.float32}


def fetch(
    path: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    weights: bool = True,
) -> Path:
    """The folder of a model: `path` itself, or what the hub has under this id, downloaded.

    Args:
      weights: False leaves them where they are.

    Raises:
      DataError: it is no folder, and cannot be had from the hub.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(f"{path} is a file; expected the folder of a Hugging Face model")
    if folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise DataError(f"{path}: there is no such folder")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.jinja", "*.txt", *(["*.safetensors"] if weights else [])]
    try:
        return Path(
            snapshot_download(path, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=patterns)
        )
    except Exception as error:  # of several libraries: no network, no such model, not allowed to see it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DataError(f"{path}: there is no such folder, and the hub does not give it: {reason}") from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
      DataError: there is none, or it is not JSON.
    """
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file: is {folder} the folder of a Hugging Face model?") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: {error}") from error


def stored_dtype(source: Mapping[str, Any]) -> jnp.dtype:
    """What a config.json says its weights are stored in."""
    return jnp.dtype(source.get("dtype") or source.get("torch_dtype") or "float32")


def load_params(
    folder: str | Path, config: DecoderConfig, *, dtype: Any = None, shardings: Any = None
) -> dict[str, Any]:
    """The parameters, each part read by the device that holds it.

    Args:
      dtype: of all leaves; default: what is stored.
      shardings: tree like the parameters; default: the first device.

    Raises:
      DataError: a tensor is missing, has another shape, or is one that the model has no place for, by name.
    """
    folder = Path(folder)
    abstract = abstract_params(config)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, abstract)
    with ExitStack() as stack:
        stored = open_weights(folder, stack)
        wanted = [(list(tensors(keys, config, layers)), leaf.shape) for keys, leaf, layers in located(abstract)]
        _check_tensors(folder, stored, wanted, config)
        arrays = [
            _read_leaf(stored, parts, shape, sharding, dtype)
            for (parts, shape), sharding in zip(wanted, jax.tree.leaves(shardings), strict=True)
        ]
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def open_weights(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Every tensor of a checkpoint, one file or sharded, as a slice that is read when it is indexed."""
    if (folder / INDEX).exists():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise DataError(f"{folder / INDEX}: not an index of safetensors files: {error}") from error
        strange = [file for file in files if Path(file).name != file]
        if strange:
            raise DataError(f"{folder / INDEX}: names {strange[0]!r}, which is not a file of this folder")
    elif (folder / WEIGHTS).exists():
        files = [WEIGHTS]
    else:
        others = sorted(p.name for p in folder.glob("*.bin"))
        hint = f" {others[0]} is a pickle, which can run code: convert it to safetensors first." if others else ""
        raise DataError(f"{folder}: there is neither {WEIGHTS} nor {INDEX}.{hint}")
    return {name: found for file in files for name, found in _open(folder / file, stack)}


def _open(path: Path, stack: ExitStack) -> Iterator[tuple[str, Any]]:
    try:
        file = stack.enter_context(safe_open(path, "np"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: the index names this file, but it is not there") from error
    except SafetensorError as error:
        raise DataError(f"{path}: not a complete safetensors file: {error}") from error
    for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
        yield name, file.get_slice(name)


def _check_tensors(
    folder: Path, stored: Mapping[str, Any], wanted: list[tuple[list[Tensor], tuple[int, ...]]], config: DecoderConfig
) -> None:
    """Compare names and shapes of all tensors before any of them is read; say everything that is wrong."""
    faults, known = [], set()
    for parts, shape in wanted:
        for part in parts:
            known.add(part.name)
            expected = list(shape[len(part.index) :])
            expected = _swapped(expected) if part.transposed else expected
            if part.name not in stored:
                faults.append(f"{part.name} is missing (expected shape {expected})")
            elif stored[part.name].get_shape() != expected:
                faults.append(f"{part.name} has shape {stored[part.name].get_shape()}, config.json says {expected}")
            elif stored[part.name].get_dtype() not in DTYPES:
                faults.append(f"{part.name} is {stored[part.name].get_dtype()}; expected one of {', '.join(DTYPES)}")
    if config.tie_word_embeddings:
        known.add(f"{file_names(config).words.get('lm_head', 'lm_head')}.weight")  # some writers repeat the embedding
    for name in sorted(stored.keys() - known):
        if not name.endswith(UNUSED):
            faults.append(f"{name} has no place in this model (model_type {config.family})")
    if faults:
        more = f"\n  ... and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise DataError(
            f"{folder}: these weights are not the model of config.json:\n  " + "\n  ".join(faults[:8]) + more
        )


def _swapped(x: Any) -> Any:
    """A shape or an index with its last two dimensions swapped."""
    return type(x)([*x[:-2], x[-1], x[-2]])


def _read_leaf(stored: Mapping[str, Any], parts: list[Tensor], shape: tuple[int, ...], sharding, dtype) -> jax.Array:
    """One leaf; each device's part is put together from slices of the tensors it needs, and from nothing else."""
    if dtype is None:
        dtype = jnp.result_type(*{DTYPES[stored[part.name].get_dtype()] for part in parts})
    dims = len(parts[0].index)
    by_index = {part.index: part for part in parts}
    done: dict[Any, np.ndarray] = {}  # replicas ask for the same part again

    def read(index: Any) -> np.ndarray:
        key = tuple(s.indices(n)[:2] for s, n in zip(index, shape))
        if key not in done:
            done.clear()
            out = np.empty([stop - start for start, stop in key], dtype)
            rest = tuple(slice(*k) for k in key[dims:])
            for place in np.ndindex(*out.shape[:dims]):
                part = by_index[tuple(p + start for p, (start, _) in zip(place, key))]
                piece = stored[part.name]
                out[place] = piece[_swapped(rest)].swapaxes(-1, -2) if part.transposed else piece[rest]
            done[key] = out
        return done[key]

    return jax.make_array_from_callback(shape, sharding, read)


def save_model(
    params: Mapping[str, Any],
    config: DecoderConfig,
    source: Mapping[str, Any],
    folder: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    dtype: Any = None,
) -> None:
    """Write config.json and safetensors files that transformers loads. Of several processes the first writes.

    Args:
      params: plain arrays (see `jtune.lora.merge`).
      source: the config.json that the model came with.
      dtype: of all tensors; default: what `source` says its weights are.
    """
    folder = Path(folder)
    if hosts.is_first():
        folder.mkdir(parents=True, exist_ok=True)
    dtype = stored_dtype(source) if dtype is None else jnp.dtype(dtype)
    written: list[tuple[str, list[str], int]] = []  # file, tensors, bytes
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        name = f"part-{len(written):05d}"
        save_file(pending, folder / name, metadata={"format": "pt"})
        written.append((name, list(pending), sum(x.nbytes for x in pending.values())))
        pending.clear()

    for keys, leaf, layers in located(params):
        for part in tensors(keys, config, layers):
            piece = spread.whole(leaf, part.index)
            if not hosts.is_first():
                continue
            x = np.asarray(piece).astype(dtype)
            x = np.ascontiguousarray(x.swapaxes(-1, -2) if part.transposed else x)
            if pending and sum(p.nbytes for p in pending.values()) + x.nbytes > max_shard_bytes:
                flush()
            pending[part.name] = x
    if not hosts.is_first():
        return
    flush()
    _name_shards(folder, written)
    config_json = {key: value for key, value in source.items() if key not in ("_name_or_path", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps(config_json | {"dtype": dtype.name}, indent=2) + "\n")


def _name_shards(folder: Path, written: list[tuple[str, list[str], int]]) -> None:
    """Give the files their names, now that their number is known, and take away those of an earlier model."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    if len(written) == 1:
        (folder / written[0][0]).rename(folder / WEIGHTS)
        return
    weight_map = {}
    for i, (file, names, _) in enumerate(written):
        final = f"model-{i + 1:05d}-of-{len(written):05d}.safetensors"
        (folder / file).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": sum(size for *_, size in written)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_generation_config(base: Path, folder: Path) -> None:
    """Take along what says how to generate, where there is such a file."""
    if (base / GENERATION).exists():
        shutil.copyfile(base / GENERATION, folder / GENERATION)
