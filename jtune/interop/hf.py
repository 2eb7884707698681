"""Hugging Face checkpoints: config.json and safetensors files, read straight to where they belong, and written back."""

import json
import math
import shutil
from collections import deque
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtune.distributed import exchange, processes
from jtune.errors import ConfigError, DataError
from jtune.files import read_object, whole_or_absent
from jtune.interop.layout import copied, of_decoder, open_decoder, to_place, turned
from jtune.interop.value_head import BIAS, SCORE, WEIGHT
from jtune.interop.weights import (
    BLOCK,
    DTYPES,
    FLOAT8,
    SCALES,
    Stored,
    grouped,
    is_finite,
    map_files,
    open_weights,
    read_part,
    same,
    scale_fault,
    write_weights,
)
from jtune.models import DecoderConfig, abstract_params
from jtune.models.families import file_names
from jtune.models.families.wrapped import text_part
from jtune.models.names import Tensor, located, tensors
from jtune.sharding import arrays
from jtune.tuning.nodes import is_node
from jtune.tuning.quantize import Form, apply, chosen, quantize

GENERATION = "generation_config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# What a decoder of ours does not use, though some files hold it: buffers that follow from the config, float8 scales.
UNUSED = (
    "rotary_emb.inv_freq",
    ".masked_bias",
    ".attn.bias",
    ".attention.bias",
    ".activation_scale",
    ".input_scale",
    *(SCORE, WEIGHT, BIAS),  # of reward models: `jtune.interop.value_head` reads them
)
PIECE_BYTES = 2**28  # of a leaf, read at a time; or one layer of it, where that is more
STORED = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn")  # what a config.json may say of its weights


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

    patterns = ["*.json", "*.model", "*.jinja", "*.txt", *(["*.safetensors", "value_head.bin"] if weights else [])]
    try:
        return Path(
            snapshot_download(path, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=patterns)
        )
    except Exception as error:  # of several libraries: no network, no such model, not allowed to see it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DataError(f"{path}: there is no such folder, and the hub does not give it: {reason}") from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """The content of config.json, without `quantization_config`: how weights are stored shows in their files.

    Raises:
      DataError: there is none, it is not JSON, or its weights are quantised in a way that is not read.
    """
    path = Path(folder) / "config.json"
    try:
        config = read_object(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file: is {folder} the folder of a Hugging Face model?") from error
    check_quantization(path, config.pop("quantization_config", None) or {})
    return config


def check_quantization(path: Path, options: Mapping[str, Any]) -> None:
    """Refuse what `load_params` does not turn back into numbers: all but float8 (e4m3), one scale a tensor or a block.

    Args:
      path: of the config.json, for the message.
      options: its `quantization_config`.
    """
    if not options:
        return
    method, block, kind = (options.get(key) for key in ("quant_method", "weight_block_size", "fmt"))
    if method != "fp8":
        wrong = f"the weights are quantised (quant_method {method})"
    elif block not in (None, [BLOCK, BLOCK]):
        wrong = f"the weights are float8 with a scale for each {block}"
    elif kind not in (None, "e4m3"):
        wrong = f"the weights are float8 of kind {kind}"
    else:
        return
    raise DataError(
        f"{path}: {wrong}; jtune reads bfloat16, float16, float32, and quant_method fp8: e4m3 with a scale for each "
        f"tensor or for each {BLOCK}x{BLOCK}. Most models have a release that is not quantised"
    )


def stored_dtype(source: Mapping[str, Any]) -> jnp.dtype:
    """What a config.json says its weights are stored in; float32 where it does not, or says "auto".

    Raises:
      DataError: it names no dtype of weights.
    """
    said = (part.get(key) for part in (source, text_part(source)) for key in ("dtype", "torch_dtype"))
    name = next(filter(None, said), "auto")
    if name == "auto":
        return jnp.dtype("float32")
    kind = str(name).removeprefix("torch.")
    if kind not in STORED:
        raise DataError(f"config.json: dtype (torch_dtype) is {name!r}; expected one of {', '.join(STORED)}, auto")
    return jnp.dtype(kind)


def load_params(
    folder: str | Path, config: DecoderConfig, *, dtype: Any = None, shardings: Any = None, form: Form | None = None
) -> dict[str, Any]:
    """The parameters, each part read by the process whose devices hold it, a piece of `PIECE_BYTES` at a time.

    Args:
      dtype: of all leaves; default: what is stored, and bfloat16 for what is stored in float8.
      shardings: tree like the parameters; default: the first device.
      form: quantise the kernels of the layers, each piece as it is read (`jtune.tuning.quantize.apply`).

    Raises:
      DataError: a tensor is missing, has another shape, holds NaN or infinity, or is one that the model has no place
        for, by name.
    """
    folder = Path(folder)
    abstract = abstract_params(config)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, jax.eval_shape(partial(apply, form=form), abstract))
    stored = open_decoder(folder, config)
    leaves = located(abstract)
    damaged: set[str] = set()
    wanted = [
        ([turned(part, _lying(part, leaf.shape), stored) for part in tensors(keys, config, layers)], leaf.shape)
        for keys, leaf, layers in leaves
    ]
    _check_tensors(folder, stored, wanted, config)
    read = []
    for (parts, shape), (keys, *_), sharding in zip(
        wanted, leaves, jax.tree.leaves(shardings, is_leaf=is_node), strict=True
    ):
        by_index = {part.index: part for part in parts}
        leaf = Leaf(stored, by_index, shape, _dtype(stored, parts) if dtype is None else dtype)
        if form is not None and chosen(keys):
            read.append(_read_quantized(leaf, sharding, form, damaged))
        else:
            read.append(_read_leaf(leaf, sharding, damaged))
    damaged.update(*(x.split("\n") for x in exchange.all_gather("weights that are not finite", "\n".join(damaged))))
    if damaged := damaged - {""}:
        raise DataError(f"{folder}: not finite (NaN or infinity): {', '.join(grouped(sorted(damaged)))}")
    return jax.tree.unflatten(jax.tree.structure(abstract), read)


def has_own_head(folder: Path, config: DecoderConfig) -> bool:
    """Whether a checkpoint holds a head that is not its embedding, though its config.json says that they are one.

    transformers then computes with both. Files that are not there or not whole are told of when they are read.
    """
    if not config.tie_word_embeddings:
        return False
    try:
        stored = open_decoder(folder, config)
    except DataError:
        return False
    [part] = tensors(("embed_tokens", "embedding"), config, range(0))
    head = head_name(config)
    return head in stored and part.name in stored and not same(stored, head, part.name)


def head_name(config: DecoderConfig) -> str:
    """What a checkpoint calls the kernel of the head."""
    return f"{file_names(config).words.get('lm_head', 'lm_head')}.weight"


def _check_tensors(folder: Path, stored: Mapping[str, Stored], wanted: list[Any], config: DecoderConfig) -> None:
    """Compare names and shapes of all tensors before any of them is read; say everything that is wrong.

    Args:
      wanted: of each leaf its tensors and its shape.
    """
    faults: dict[str, list[str]] = {}  # what is wrong -> tensors
    known: set[str] = set()
    for parts, shape in wanted:
        for part in parts:
            fault = _fault(stored, part.name, _lying(part, shape))
            if fault:
                faults.setdefault(fault, []).append(part.name)
            known |= {part.name, *(part.name + suffix for suffix in SCALES)}
    if config.tie_word_embeddings:
        known.add(head_name(config))  # some writers repeat the embedding
        if has_own_head(folder, config):
            meant = "is not the embedding, as tie_word_embeddings says: if the head is meant, set it to false"
            faults[meant] = [head_name(config)]
    nowhere = f"has no place in this model (model_type {config.family})"
    for name in sorted(stored.keys() - known):
        if not name.endswith(UNUSED):
            faults.setdefault(nowhere, []).append(name)
    if faults:
        lines = [f"{name} {fault}" for fault, names in faults.items() for name in grouped(names)]
        raise DataError(f"{folder}: these weights are not the model of config.json:\n  " + "\n  ".join(lines))


def _lying(part: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor in its file. `shape`: of the leaf that it is a part of."""
    rest = shape[len(part.index) :]
    return _swapped(rest) if part.transposed else rest


def _swapped(x: tuple[Any, ...]) -> tuple[Any, ...]:
    """A shape or an index with its last two dimensions swapped."""
    return (*x[:-2], x[-1], x[-2])


def _fault(stored: Mapping[str, Stored], name: str, expected: tuple[int, ...]) -> str | None:
    """What is wrong with one tensor, if anything is."""
    if name not in stored:
        return f"is missing (expected shape {list(expected)})"
    shape, dtype = stored[name].shape, stored[name].dtype
    if shape != expected:
        return f"has shape {list(shape)}, config.json says {list(expected)}"
    if dtype not in DTYPES:
        return f"is {dtype}; expected one of {', '.join(DTYPES)}"
    return scale_fault(stored, name) if dtype == FLOAT8 else None


class Leaf(NamedTuple):
    """A leaf that is read from files."""

    stored: Mapping[str, Stored]  # every tensor of the checkpoint
    tensors: Mapping[tuple[int, ...], Tensor]  # the tensors of this leaf, by their indices on its leading axes
    shape: tuple[int, ...]
    dtype: Any

    @property
    def transposed(self) -> bool:
        return next(iter(self.tensors.values())).transposed

    def piece_size(self, axis: int) -> int:
        """How many rows along `axis` fit into `PIECE_BYTES`, at least one."""
        return max(1, PIECE_BYTES * self.shape[axis] // (math.prod(self.shape) * jnp.dtype(self.dtype).itemsize))


def _read_leaf(leaf: Leaf, sharding, damaged: set[str]) -> jax.Array:
    """One leaf. A leaf that is too large for the host's memory grows on the devices, piece by piece."""
    leading = len(next(iter(leaf.tensors)))
    axis = 0 if leading or not leaf.transposed else len(leaf.shape) - 1  # of layers, or of a file's rows
    size, step = leaf.shape[axis], leaf.piece_size(axis)
    read = partial(_read_piece, leaf, sharding, damaged, axis)
    if step >= size or sharding.shard_shape(leaf.shape)[axis] < size:
        return read(0, size)
    whole = jax.jit(partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=sharding)()
    for first in range(0, size, step):
        whole = _put(sharding, axis)(whole, read(first, min(first + step, size)), np.int32(first))
        whole.block_until_ready()  # otherwise pieces are read faster than they are freed
    return whole


def _dtype(stored: Mapping[str, Stored], parts: list[Tensor]) -> Any:
    """The dtype in which the tensors of a leaf are read."""
    found = {stored[part.name].dtype for part in parts}
    return jnp.result_type(*(jnp.bfloat16 if x == FLOAT8 else DTYPES[x] for x in found))


def _read_quantized(leaf: Leaf, shardings, form: Form, damaged: set[str]) -> Any:
    """A stack of kernels as a node, which grows by some layers at a time; only these layers are in memory unquantised.

    Args:
      shardings: of the node's arrays, as a node; the first is also that of the kernel.
    """
    of_kernel = jax.tree.leaves(shardings)[0]
    layers, step = leaf.shape[0], leaf.piece_size(0)
    like = jax.eval_shape(partial(quantize, form=form), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    # A node's structure names the dtype that its kernel is stored in; that of `shardings` may name another.
    shardings = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(shardings))
    make = jax.jit(partial(quantize, form=form), out_shardings=shardings)
    zeros = lambda x, sharding: jax.jit(partial(jnp.zeros, x.shape, x.dtype), out_shardings=sharding)()
    whole = jax.tree.map(zeros, like, shardings)
    for first in range(0, layers, step):
        stop = min(first + step, layers)
        piece = make(_read_piece(leaf, of_kernel, damaged, 0, first, stop))
        at = np.int32(first)
        grown = [
            _put(where, 0)(x, part, at) for x, part, where in zip(*map(jax.tree.leaves, (whole, piece, shardings)))
        ]
        whole = jax.block_until_ready(jax.tree.unflatten(jax.tree.structure(like), grown))
    return whole


def _read_piece(leaf: Leaf, sharding, damaged: set[str], axis: int, first: int, stop: int) -> jax.Array:
    """`leaf[first:stop]` along `axis`; each device reads its own shard and nothing else.

    The names of tensors with NaN or infinity join `damaged`. Processes read different shards, so all of them read on,
    and `load_params` reports all such tensors at the end.
    """
    dims = len(next(iter(leaf.tensors)))  # leading axes, of layers and experts
    transposed = leaf.transposed
    needed = (part.name for i, part in leaf.tensors.items() if not i or first <= i[0] < stop)
    files = map_files(leaf.stored[name] for name in needed)
    piece = (*leaf.shape[:axis], stop - first, *leaf.shape[axis + 1 :])
    done: dict[Any, np.ndarray] = {}  # replicas ask for the same part again

    def read(index: Any) -> np.ndarray:
        bounds = [s.indices(n)[:2] for s, n in zip(index, piece)]
        bounds[axis] = (bounds[axis][0] + first, bounds[axis][1] + first)
        key = tuple(bounds)
        if key not in done:
            part = tuple(slice(*b) for b in bounds[dims:])
            part = _swapped(part) if transposed else part
            out = np.empty([b - a for a, b in bounds[:dims]] + [p.stop - p.start for p in part], leaf.dtype)
            for place in np.ndindex(*out.shape[:dims]):
                tensor = leaf.tensors[tuple(i + a for i, (a, _) in zip(place, bounds))]
                out[place] = read_part(leaf.stored, tensor.name, part, files)
                if not is_finite(out[place]):
                    damaged.add(tensor.name)
            # A view: the runtime transposes while it copies, several times faster than numpy.
            done[key] = out.swapaxes(-1, -2) if transposed else out
        return done[key]

    return jax.make_array_from_callback(piece, sharding, read)


@cache
def _put(sharding, axis: int) -> Any:
    """`put(whole, piece, first)`: `whole`, in the memory that it had, with the piece from `first` on along `axis`."""
    put = lambda whole, piece, first: jax.lax.dynamic_update_slice_in_dim(whole, piece, first, axis)
    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def save_model(
    params: Mapping[str, Any],
    config: DecoderConfig,
    source: Mapping[str, Any],
    folder: str | Path,
    *,
    base: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    dtype: Any = None,
) -> None:
    """Write config.json and safetensors files that transformers loads, a tensor at a time.

    Of several processes the first writes. An earlier model in `folder` is replaced when all of this one is written.

    Args:
      params: arrays, or nodes in their place: these are merged in float32, and rounded to `dtype` once.
      source: the config.json that the model came with.
      base: the folder that it came from: tensors that are not the decoder's, and what processes images, are taken from
        there as they are, and its names for tensors.
      dtype: of all tensors of the decoder; default: what `source` says its weights are.
    """
    dtype = stored_dtype(source) if dtype is None else jnp.dtype(dtype)
    base = base if processes.is_first() else None
    of_base = {} if base is None else open_weights(base)
    shapes, found = _layout(params, config, of_decoder(of_base, config))
    beside: dict[str, Stored] = {}
    if base is not None:
        beside, names = copied(of_base, config), to_place(shapes, config, of_base)
        shapes = {names[name]: shape for name, shape in shapes.items()}
    pieces = (jax.tree.map(lambda x, i=part.index: arrays.whole(x, i), leaf) for leaf, part in found)
    if not processes.is_first():
        deque(pieces, maxlen=0)  # their parts are sent
        return
    stored = (_in_file(piece, part.transposed) for piece, (_, part) in zip(pieces, found))
    config_json = {key: value for key, value in source.items() if key not in ("_name_or_path", "torch_dtype")}
    with whole_or_absent(Path(folder)) as partial_folder:
        write_weights(partial_folder, shapes, dtype, stored, max_shard_bytes, copied=beside)
        text = json.dumps(config_json | {"dtype": dtype.name}, indent=2) + "\n"
        (partial_folder / "config.json").write_text(text)
        if base is not None:
            for path in (base / name for name in PROCESSORS if (base / name).exists()):
                shutil.copyfile(path, partial_folder / path.name)


def check_writable(params: Mapping[str, Any], config: DecoderConfig, base: Path | None) -> None:
    """Raise a ConfigError, with its name, for what cannot be written; nothing is computed. `base`: see `save_model`."""
    _layout(params, config, {})
    if base is not None:
        copied(open_weights(base), config)


def _layout(
    params: Mapping[str, Any], config: DecoderConfig, stored: Mapping[str, Stored]
) -> tuple[dict[str, tuple[int, ...]], list[tuple[Any, Tensor]]]:
    """The tensors of a checkpoint: their shapes by name, and the leaf that each is a part of.

    Args:
      stored: of the base, by our names: what it holds the other way round is written so.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    found: list[tuple[Any, Tensor]] = []
    for keys, leaf, layers in located(params):
        try:
            for part in tensors(keys, config, layers):
                part = turned(part, _lying(part, leaf.shape), stored)
                shapes[part.name] = _lying(part, leaf.shape)
                found.append((leaf, part))
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"{'.'.join(keys[:-1])}: a checkpoint has no place for it: {error!r}") from error
    return shapes, found


def _in_file(piece: Any, transposed: bool) -> np.ndarray:
    """A tensor as it lies in a file. A node's arrays are fetched first: merging is this process's own affair."""
    piece = jax.tree.map(np.asarray, piece)
    x = np.asarray(piece.merged(jnp.float32)) if is_node(piece) else piece
    return x.swapaxes(-1, -2) if transposed else x


def copy_generation_config(base: Path, folder: Path) -> None:
    """Take along what says how to generate, where there is such a file."""
    if (base / GENERATION).exists():
        shutil.copyfile(base / GENERATION, folder / GENERATION)
