"""Moments in 8 bits: blocks of up to 256 numbers share a float32 scale, their absolute maximum.

The code is the dynamic one of arXiv:2110.02861 (bitsandbytes): decades from 1 down to 1e-6 of the scale, each cut in
half as many equal bins as the one above it. So small numbers keep their order of magnitude, which a linear code would
round to nothing: a second moment of nothing makes the next update as large as the learning rate lets it.

A block lies along one dimension of the parameter, so codes have the parameter's shape and its place on the mesh.
"""

import math

import jax
import jax.numpy as jnp

from jtune.train.optimizers.leafwise import Moments, Shape

BLOCK = 256
SMALLEST_BLOCK = 32  # below it a scale costs more than it saves
DECADES = 7
WAYS = 16  # blocks end where a dimension is cut in so many parts, so that a mesh need not cut blocks


def _bins(signed: bool) -> list[tuple[float, int, int]]:
    """Of each decade, the lowest first: (its upper end, its bins, the code of its first bin)."""
    found = []
    for i in range(DECADES):
        bins = 2**i if signed else 2 ** (i + 1)
        found.append((10.0 ** (i + 1 - DECADES), bins, bins if signed else bins - 1))
    return found


def values(signed: bool) -> list[float]:
    """What the codes 0, 1, 2, ... stand for, of a scale of 1; the last one is 1 itself."""
    between = [top * (0.1 + 0.9 * (i + 0.5) / bins) for top, bins, _ in _bins(signed) for i in range(bins)]
    return [0.0, *between, 1.0]


def encode(x: jax.Array, signed: bool) -> jax.Array:
    """The nearest code of numbers between -1 (or 0) and 1: int8, or uint8 of numbers that are not negative.

    Signed codes are negated for negative numbers, and -128 is 1: there are 127 others on each side.
    """
    known = values(signed)
    size = jnp.abs(x)
    code = jnp.zeros(x.shape, jnp.int32)
    for top, bins, first in _bins(signed):
        nearer = (known[first - 1] + known[first]) / 2
        item = jnp.floor((size / top - 0.1) * (bins / 0.9)).astype(jnp.int32)
        code = jnp.where(size > nearer, first + jnp.clip(item, 0, bins - 1), code)
    full = x > (known[-2] + known[-1]) / 2
    if signed:
        return jnp.where(full, -128, jnp.where(x < 0, -code, code)).astype(jnp.int8)
    return jnp.where(full, 255, code).astype(jnp.uint8)


def decode(codes: jax.Array, signed: bool) -> jax.Array:
    """float32 between -1 (or 0) and 1."""
    code = codes.astype(jnp.int32)
    size = jnp.abs(code)
    x = jnp.zeros(codes.shape, jnp.float32)
    for top, bins, first in _bins(signed):
        x = jnp.where(size >= first, top * (0.1 + 0.9 / bins * ((size - first) + 0.5)), x)
    if signed:
        return jnp.where(code == -128, 1.0, jnp.where(code < 0, -x, x))
    return jnp.where(code == 255, 1.0, x)


def blocks(shape: Shape, stacked: int, gathered: int | None = None) -> tuple[int, int] | None:
    """(dimension, size) of the blocks of a parameter; None if it is better kept in float32.

    Args:
      stacked: leading dimensions that are stacks.
      gathered: the dimension that the mesh cuts finest; blocks lie along the other one if they can.
    """
    found = []
    for dim in range(max(stacked, len(shape) - 2), len(shape)):
        part = shape[dim] // WAYS if shape[dim] % WAYS == 0 else shape[dim]
        size = max(n for n in range(1, min(BLOCK, part) + 1) if part % n == 0)
        if size < SMALLEST_BLOCK and part != shape[dim]:  # better cut by a mesh than too small
            size = max(n for n in range(1, min(BLOCK, shape[dim]) + 1) if shape[dim] % n == 0)
        found.append((size >= SMALLEST_BLOCK, dim != gathered, size, dim))
    if not found or not max(found)[0]:
        return None
    return max(found)[3], max(found)[2]


def empty(name: str, shape: Shape, block: tuple[int, int], signed: bool) -> Moments:
    """A moment that is zero everywhere, under `name` its codes, under `name_scale` their scales."""
    dims = tuple(range(len(shape)))
    dim, size = block
    scales = (*shape[:dim], shape[dim] // size, *shape[dim + 1 :])
    codes = jnp.zeros(shape, jnp.int8 if signed else jnp.uint8)
    return Moments(
        {name: codes, f"{name}_scale": jnp.ones(scales, jnp.float32)}, ((name, dims), (f"{name}_scale", dims))
    )


def read(moments: Moments, name: str, block: tuple[int, int], signed: bool) -> jax.Array:
    """The moment in float32, of the parameter's shape."""
    codes = moments.arrays[name]
    x = decode(codes, signed)
    return (_cut(x, block) * jnp.expand_dims(moments.arrays[f"{name}_scale"], block[0] + 1)).reshape(codes.shape)


def write(name: str, x: jax.Array, block: tuple[int, int], signed: bool) -> dict[str, jax.Array]:
    cut = _cut(x, block)
    scale = jnp.max(jnp.abs(cut), axis=block[0] + 1, keepdims=True)
    scale = jnp.where(scale == 0, 1.0, scale)
    codes = encode((cut / scale).reshape(x.shape), signed)
    return {name: codes, f"{name}_scale": jnp.squeeze(scale, block[0] + 1)}


def _cut(x: jax.Array, block: tuple[int, int]) -> jax.Array:
    """`[..., blocks, block, ...]`."""
    dim, size = block
    return x.reshape(*x.shape[:dim], x.shape[dim] // size, size, *x.shape[dim + 1 :])


def worth(shape: Shape, stacked: int) -> bool:
    """Whether a tensor is large enough for 8 bits (bitsandbytes' min_8bit_size)."""
    return math.prod(shape[stacked:]) >= 4096
