"""Kernels in 4 or 8 bits: what QLoRA (arXiv:2305.14314) keeps in the place of a frozen base.

quantize.apply(params, Form("nf4", double=True))    kernels of the layers -> Quantized nodes
lora.merge(params)                                  nodes -> kernels

Stored is what bitsandbytes stores: its tables of 16 values, its blocks, its rule. It lies otherwise: blocks run along
`in`, so that every array of a node is split over devices as the kernel was, and codes are unpacked without a shuffle.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jtune.errors import ConfigError
from jtune.models import DecoderConfig
from jtune.models.names import Path
from jtune.sharding import constrain
from jtune.tuning.axes import declared_axes
from jtune.tuning.nodes import Axes, Node, is_node

PyTree = Any
Kind = Literal["nf4", "fp4", "int8", "fp8"]

BLOCK = 64  # inputs that share a scale, in 4 bits
GROUP = 256  # scales that share a scale
# In order: a code is how many of the midpoints between them a number is above.
TABLES: Mapping[str, tuple[float, ...]] = {
    # Quantiles of a normal distribution (appendix E of the paper).
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # A sign, two bits of exponent, one of fraction, over 12, the largest; with one zero.
    "fp4": tuple(x / 12 for x in (-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12)),
}  # fmt: skip
# 8 bits: how codes are stored, and the largest. A scale for each output.
WIDE = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}


class Form(NamedTuple):
    """How kernels are kept."""

    kind: Kind
    double: bool = False  # quantise the scales, too; 4 bits only

    def __str__(self) -> str:
        return f"{self.kind}, {'double quantised' if self.double else 'float32 scales'}"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "spread", "centre"],
    meta_fields=["kind", "block", "group", "stored", "place"],
)
@dataclasses.dataclass(frozen=True)
class Quantized(Node):
    """Stands in the place of a kernel `[..., in, out]` that does not train; computed from its codes when it is used.

    Attributes:
      codes: 4 bits: uint8 `[..., in/2, out]`; of a block, the first half of its inputs is in the low bits and the
        second half in the high bits. 8 bits: int8 or float8 `[..., in, out]`.
      absmax: what codes are multiplied by, `[..., in/block, out]`: float32, or int8 of the group's values.
      spread, centre: None, or float32 `[..., in/block, out/group]`: `absmax * spread + centre` is the scale.
      block: inputs that share a scale.
      group: outputs whose scales share `spread` and `centre`; 0 without.
      stored: dtype of the kernel that it was.
      place: the mesh, and the logical axes of one layer's kernel; None: nothing is said of where it is computed.
    """

    codes: Any
    absmax: Any
    spread: Any
    centre: Any
    kind: Kind
    block: int
    group: int
    stored: str
    place: tuple[Mesh, Axes] | None = None

    def project(self, x: jax.Array, rng: jax.Array | None, group_sizes: jax.Array | None) -> jax.Array:
        # Inside `jax.shard_map`, where `x` may be the same on devices that have different parts of the kernel: then its
        # gradient is a sum over them, which this says.
        apart = tuple(_varying(self.codes) - _varying(x))
        return _apply(jax.lax.pcast(x, apart, to="varying") if apart else x, self, group_sizes)

    def merged(self, dtype: Any = None) -> jax.Array:
        return dequantize(self, jnp.dtype(dtype or self.stored))

    def plain(self) -> jax.Array:
        return self.merged()

    def gathered(self) -> "Quantized":
        """One layer's, said to be whole where it is used but for what a product splits: so its codes travel, a quarter
        of the bytes of what they stand for."""
        if self.place is None:
            return self
        mesh, kernel = self.place
        names = [None if name == "embed" else name for name in kernel]
        return jax.tree.map(lambda x: constrain(x, mesh, *names), self)

    def axes(self, kernel: Axes) -> dict[str, Axes]:
        return dict.fromkeys(("codes", "absmax", "spread", "centre"), kernel)

    def describe(self) -> str:
        return f"{self.kind} in blocks of {self.block}"

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, outputs = self.codes.shape
        return (*lead, rows * (2 if self.kind in TABLES else 1), outputs)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.stored)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


# ---------------------------------------------------------------------- numbers


@partial(jax.jit, static_argnums=1)
def quantize(kernel: jax.Array, form: Form) -> Quantized:
    """The node of a kernel `[..., in, out]`.

    4 bits: each block of 64 inputs (or of the largest power of two below that divides them) is divided by its largest
    magnitude, and each number becomes the nearest of the table. `double`: of 256 outputs (or the most that divide
    them), each scale is the nearest of 255 even steps from their smallest to their largest. (The paper has 8-bit floats
    around the mean of all: a larger error, and one that depends on the order in which devices sum.) 8 bits: each output
    is divided by its largest magnitude over the largest code.

    Raises:
      ConfigError: 4 bits, and an odd number of inputs.
    """
    *lead, inputs, outputs = kernel.shape
    block = inputs if form.kind in WIDE else next((b for b in (64, 32, 16, 8, 4, 2) if inputs % b == 0), 0)
    if not block:
        raise ConfigError(
            f"quantization_bit: 4 packs inputs in pairs, and a kernel has {inputs}, an odd number: quantization_bit: 8"
        )
    group = next(g for g in range(min(GROUP, outputs), 0, -1) if outputs % g == 0) if form.double else 0
    make = partial(Quantized, kind=form.kind, block=block, group=group, stored=kernel.dtype.name)
    blocks = kernel.astype(jnp.float32).reshape(*lead, inputs // block, block, outputs)
    absmax = jnp.max(jnp.abs(blocks), axis=-2)
    if form.kind in WIDE:
        dtype, most = WIDE[form.kind]
        absmax = absmax / most
        codes = blocks / jnp.where(absmax == 0, 1.0, absmax)[..., None, :]
        codes = (jnp.round(codes) if dtype == jnp.int8 else codes).astype(dtype)
        return make(codes.reshape(kernel.shape), absmax, None, None)
    table = np.array(TABLES[form.kind], np.float32)
    scaled = blocks * (1 / jnp.where(absmax == 0, 1.0, absmax))[..., None, :]
    codes = sum((scaled > middle).astype(jnp.uint8) for middle in (table[1:] + table[:-1]) / 2)
    low, high = jnp.split(jnp.asarray(codes), 2, axis=-2)
    packed = (low | (high << 4)).reshape(*lead, inputs // 2, outputs)
    if not form.double:
        return make(packed, absmax, None, None)
    groups = absmax.reshape(*lead, inputs // block, outputs // group, group)
    least, most = jnp.min(groups, axis=-1), jnp.max(groups, axis=-1)
    spread, centre = (most - least) / 254, (most + least) / 2
    steps = (groups - centre[..., None]) / jnp.where(spread == 0, 1.0, spread)[..., None]
    return make(packed, jnp.round(steps).astype(jnp.int8).reshape(absmax.shape), spread, centre)


@partial(jax.jit, static_argnums=1)
def dequantize(node: Quantized, dtype: Any) -> jax.Array:
    """The kernel that a node stands for: elementwise from its codes, so that it is computed where it is read; by one
    program, so that no copy in float32 or int32 is on the way.

    Raises:
      ConfigError: the codes are split over devices where their scales cannot be.
    """
    *lead, inputs, outputs = node.shape
    if node.kind in WIDE:  # however the inputs are split, the scale is that of all
        return (node.codes.astype(jnp.float32) * node.absmax).astype(dtype)
    expected = (*lead, inputs // node.block, outputs)
    if node.absmax.shape != expected or (node.group and node.spread.shape[-1] * node.group != outputs):
        raise ConfigError(
            f"mesh_tensor splits experts of {inputs} inputs inside of a block of {node.block}, or of {outputs} outputs "
            f"inside of a group of {node.group}: a smaller mesh_tensor, or double_quantization: false"
        )
    absmax = node.absmax
    if node.group:
        groups = absmax.astype(jnp.float32).reshape(*lead, -1, outputs // node.group, node.group)
        absmax = (groups * node.spread[..., None] + node.centre[..., None]).reshape(expected)
    packed = node.codes.astype(jnp.int32).reshape(*lead, -1, 1, node.block // 2, outputs)
    codes = packed >> jnp.array([0, 4], jnp.int32)[:, None, None]
    values = _entries(TABLES[node.kind], codes) * absmax[..., None, None, :]
    return values.astype(dtype).reshape(node.shape)


def _varying(x: jax.Array) -> frozenset[str]:
    """Inside `jax.shard_map`: the mesh axes along which devices may have different parts of it."""
    return jax.typeof(x).manual_axis_type.varying


def _entries(table: Sequence[float], codes: jax.Array) -> jax.Array:
    """Entries of a table by the low four bits of codes, float32."""
    return jax.lax.platform_dependent(
        codes, cuda=partial(_read, table), rocm=partial(_read, table), default=lambda codes: _look_up(table, codes, 3)
    )


def _read(table: Sequence[float], codes: jax.Array) -> jax.Array:
    """On GPUs from memory. Of selects, in a loop over layers, XLA would take each constant out as an array of the
    kernel's size, and read them all back."""
    return jnp.asarray(table, jnp.float32).at[codes & 15].get(mode="promise_in_bounds")


def _look_up(table: Sequence[float], codes: jax.Array, bit: int) -> Any:
    """Entries of a table, by the bits of the codes from `bit` down: a tree of selects, as processors of vectors have no
    quick look-up."""
    if len(table) == 1:
        return jnp.float32(table[0])
    half = 2**bit
    if len(table) <= half:
        return _look_up(table, codes, bit - 1)
    low, high = _look_up(table[:half], codes, bit - 1), _look_up(table[half:], codes, bit - 1)
    return jnp.where((codes & half) != 0, high, low)


# ---------------------------------------------------------------------- the product


@jax.custom_vjp
def _apply(x: jax.Array, node: Quantized, group_sizes: jax.Array | None) -> jax.Array:
    """`x @ kernel`. What the backward pass keeps is the codes; from them the kernel is computed again."""
    return _apply_forward(x, node, group_sizes)[0]


def _apply_forward(x, node, group_sizes):  # the product is here, where a remat policy sees it
    kernel = dequantize(_in_turn(node, x).gathered(), x.dtype)
    y = x @ kernel if group_sizes is None else jax.lax.ragged_dot(x, kernel, group_sizes)
    return y, (node, group_sizes)


def _apply_backward(residuals, dy):
    node, group_sizes = residuals
    kernel = jnp.swapaxes(dequantize(_in_turn(node, dy).gathered(), dy.dtype), -1, -2)
    return dy @ kernel if group_sizes is None else jax.lax.ragged_dot(dy, kernel, group_sizes), None, None


def _in_turn(node: Quantized, x: jax.Array) -> Quantized:
    """The node; but on TPUs, only when `x` is there.

    Layers are unrolled elsewhere, and XLA would compute the kernels of all of them before it needs any, and keep them
    for the backward pass; barriers against that it drops. What is added is 0 unless `x` is no number, which it cannot
    know.
    """
    wrong = lambda x: (x != x).astype(jnp.uint8)
    added = jax.lax.platform_dependent(x.ravel()[0], tpu=lambda x: wrong(x) * jnp.uint8(0), default=wrong)
    return dataclasses.replace(node, codes=(node.codes.view(jnp.uint8) + added).view(node.codes.dtype))


_apply.defvjp(_apply_forward, _apply_backward)


# ---------------------------------------------------------------------- trees


def form_of(bit: int | None, kind: str, double: bool) -> Form | None:
    """What `quantization_bit`, `quantization_type` and `double_quantization` ask for."""
    if bit is None:
        return None
    return Form("int8") if bit == 8 else Form(kind, double)  # type: ignore[arg-type]


def chosen(keys: Path) -> bool:
    """Whether the leaf at a path is quantised: kernels of the layers, but not those that choose experts."""
    return keys[0] == "layers" and keys[-1] == "kernel" and keys[-2] not in ("gate", "shared_expert_gate")


def apply(params: PyTree, form: Form | None) -> PyTree:
    """`Quantized` nodes in the place of the kernels that `chosen` names; for arrays, and inside of `jax.eval_shape`.

    `jtune.interop.hf.load_params` does the same while it reads, a piece at a time.
    """
    if form is None:
        return params

    def one(path: Any, leaf: Any) -> Any:
        keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return quantize(leaf, form) if chosen(keys) and not is_node(leaf) else leaf

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_node)


def placed(params: PyTree, decoder: DecoderConfig, mesh: Mesh | None) -> PyTree:
    """The tree, its quantised kernels told where their layers are computed (`Quantized.place`).

    Experts are not: they gather what they need themselves (`jtune.models.moe`).
    """
    if mesh is None or mesh.size == 1:
        return params
    axes = declared_axes(decoder)

    def one(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Quantized) or jax.tree_util.DictKey("experts") in path:
            return leaf
        return dataclasses.replace(leaf, place=(mesh, axes(path)[1:]))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda x: isinstance(x, Quantized))
