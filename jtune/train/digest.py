"""A 32-bit content digest of arrays, computed on the devices, the same on every mesh.

Checkpoint formats do not checksum array data: a flipped bit restores without an error. Each element's bits are mixed
and multiplied by an odd number made of its index, and the products summed modulo 2**32. Integer addition is
associative, so the sum does not depend on how the array is sharded or in what order it is reduced, and a changed bit
or two swapped elements change it.
"""

import hashlib
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import xxhash

import jtune
from jtune import tuning
from jtune.data import Encoded

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def array_digest(x: jax.Array) -> jax.Array:
    """uint32 digest of one array of 1-, 2- or 4-byte elements."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA6B)  # murmur3's finaliser, one round
    bits ^= bits >> 13
    index = jnp.zeros(bits.shape, jnp.uint32)  # row-major position, modulo 2**32
    for d, _ in enumerate(bits.shape):
        stride = math.prod(bits.shape[d + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, d) * jnp.uint32(stride)
    return jnp.sum(bits * ((index * jnp.uint32(0x9E3779B1)) | 1), dtype=jnp.uint32)


@jax.jit
def _digests(arrays):
    return {name: array_digest(x) for name, x in arrays.items()}


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Hexadecimal digest of each named array."""
    return {name: f"{int(value):08x}" for name, value in jax.device_get(_digests(dict(arrays))).items()}


def named_leaves(tree) -> dict[str, jax.Array]:
    """The arrays of a tree under dotted path names; None leaves have no entry."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def data_fingerprint(encoded: Encoded) -> str:
    """A digest of an encoded data set: the lengths and labelled counts of all rows, and the tokens of some; of pairs,
    those of both answers; and all tags and margins.
    """
    content = xxhash.xxh3_64(encoded.lengths.tobytes())
    content.update(encoded.labelled.tobytes())
    if encoded.prefix:
        content.update(encoded.rejected.lengths.tobytes())
    for name in ("kto_tags", "margin"):
        if (values := encoded.column(name)) is not None:
            content.update(values.tobytes())
    for row in sorted({0, len(encoded) // 2, len(encoded) - 1}):
        content.update(encoded[row]["input_ids"].tobytes())
    return content.hexdigest()


def tree_fingerprint(tree: Any) -> str:
    """One digest of all arrays of a tree; the same on every mesh."""
    return xxhash.xxh3_64(repr(sorted(digests(named_leaves(tree)).items())).encode()).hexdigest()


def frozen_fingerprint(frozen: Any) -> str:
    """One digest of what does not train, as it was read."""
    return tree_fingerprint(as_read(frozen))


def as_read(params: Any) -> Any:
    """`params` without what PiSSA takes apart, which another mesh rounds otherwise."""
    is_taken_apart = lambda x: isinstance(x, tuning.lora.PiSSA)
    return jax.tree.map(lambda x: None if is_taken_apart(x) else x, params, is_leaf=is_taken_apart)


def fingerprint(*parts: Any) -> str:
    """A digest of `parts`, of the versions of everything that compiles programs, and of jtune's own code."""
    digest = hashlib.sha256(repr(parts).encode())
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        try:
            digest.update(f"{name} {version(name)}".encode())
        except PackageNotFoundError:
            digest.update(name.encode())
    root = Path(jtune.__file__).parent
    for folder in ("models", "tuning", "losses", "train", "evaluation", "sharding"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
