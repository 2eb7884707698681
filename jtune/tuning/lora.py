"""LoRA (arXiv:2106.09685) and its relatives: nodes that hold a kernel and two thin matrices.

lora.add(params, ("q_proj", "v_proj"))    kernels -> LoRA nodes
lora.merge(params)                        nodes -> kernels
lora.split(params)                        -> (parameters without adapters, adapters alone)
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jtune.errors import ConfigError
from jtune.models.families.base import Names
from jtune.models.kernels import project
from jtune.models.names import knows
from jtune.tuning.nodes import Axes, Node, Path, in_float32, is_adapter, merge, replace, select, split

__all__ = ["AdapterOptions", "DoRA", "LoRA", "PiSSA", "add", "merge", "split"]

PyTree = Any
LORA = ("base", "a", "b")


@partial(jax.tree_util.register_dataclass, data_fields=[*LORA], meta_fields=["scale", "dropout"])
@dataclasses.dataclass(frozen=True)
class LoRA(Node):
    """Stands in the place of a kernel `base` `[..., in, out]` and acts as `base + scale * a @ b`.

    Attributes:
      base: a kernel, or a node: an adapter may stand on another.
      a: `[..., in, rank]`.
      b: `[..., rank, out]`, zero at the start.
      scale: alpha / rank, or alpha / sqrt(rank) (arXiv:2312.03732).
      dropout: probability with which an input of `a` is dropped, when there is a key for it.
    """

    base: Any
    a: Any
    b: Any
    scale: float
    dropout: float = 0.0

    adapter = ("a", "b")

    def project(self, x: jax.Array, rng: jax.Array | None, group_sizes: jax.Array | None) -> jax.Array:
        dropped = drop(x, self.dropout, rng)
        if dropped is x and group_sizes is None and fuse_lora(x, self.base):
            return folded(x, self.base, self.a, self.b, self.scale)
        return project(x, self.base, rng, group_sizes) + self.delta(dropped, group_sizes)

    def delta(self, x: jax.Array, group_sizes: jax.Array | None) -> jax.Array:
        """`scale * x @ a @ b`."""
        thin = project(x, self.a, None, group_sizes) * self.scale  # here, where it is thin
        return project(thin, self.b, None, group_sizes)

    def merged(self, dtype: Any = None) -> jax.Array:
        return (in_float32(self.base) + self.scale * product(self.a, self.b)).astype(dtype or self.dtype)

    def axes(self, kernel: Axes) -> dict[str, Axes]:
        """`a` lies along `in` as the kernel does, `b` along `out`; each is split along its other dimension where the
        first is not."""
        *lead, inputs, outputs = kernel
        return {"a": (*lead, inputs, "rank"), "b": (*lead, "rank", outputs)}

    def describe(self) -> str:
        return f"{type(self).__name__} of rank {self.a.shape[-1]}, scale {self.scale:g}"


@partial(jax.tree_util.register_dataclass, data_fields=[*LORA, "magnitude"], meta_fields=["scale", "dropout"])
@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """Acts as `magnitude * W / |W|` with `W = base + scale * a @ b`, `|W|` the norms of its columns (arXiv:2402.09353).

    The norms count as constants in the backward pass (section 4.3 there). They come from thin products, so that no
    matrix of the kernel's size is formed: with B a column of `b`,
    `|W|^2 = |base|^2 + 2 scale <a^T base, B> + scale^2 <a^T a B, B>`.

    Attributes:
      magnitude: `[..., out]`; at the start the norms of the columns of `base`.
    """

    magnitude: Any = None

    adapter = ("a", "b", "magnitude")

    def project(self, x: jax.Array, rng: jax.Array | None, group_sizes: jax.Array | None) -> jax.Array:
        stretch = (self.magnitude / jax.lax.stop_gradient(self.norms())).astype(x.dtype)
        if group_sizes is not None:  # each row has that of its expert
            stretch = jnp.repeat(stretch, group_sizes, axis=0, total_repeat_length=x.shape[0])
        dropped = drop(x, self.dropout, rng)
        if dropped is x and group_sizes is None and fuse_lora(x, self.base):
            return jnp.asarray(folded(x, self.base, self.a, self.b, self.scale)) * stretch
        y = project(x, self.base, rng, group_sizes)
        if dropped is x:
            return (y + self.delta(x, group_sizes)) * stretch
        # As PEFT has it: what is dropped is missing in all that training may change, and nowhere else.
        y_dropped = project(dropped, self.base, rng, group_sizes)
        return y + (stretch - 1) * y_dropped + stretch * self.delta(dropped, group_sizes)

    def norms(self) -> jax.Array:
        """Of the columns of `base + scale * a @ b`, float32 `[..., out]`."""
        base, a, b = in_float32(self.base), self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        thin = jnp.swapaxes(a, -1, -2) @ base
        square = jnp.sum(base * base, -2) + 2 * self.scale * jnp.sum(thin * b, -2)
        square += self.scale**2 * jnp.sum((jnp.swapaxes(a, -1, -2) @ a @ b) * b, -2)
        return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))

    def merged(self, dtype: Any = None) -> jax.Array:
        kernel = super().merged(jnp.float32)
        stretch = self.magnitude.astype(jnp.float32) / jnp.linalg.norm(kernel, axis=-2)
        return (kernel * stretch[..., None, :]).astype(dtype or self.dtype)

    def axes(self, kernel: Axes) -> dict[str, Axes]:
        return super().axes(kernel) | {"magnitude": (*kernel[:-2], kernel[-1])}


@partial(jax.tree_util.register_dataclass, data_fields=[*LORA, "a0", "b0"], meta_fields=["scale", "dropout"])
@dataclasses.dataclass(frozen=True)
class PiSSA(LoRA):
    """LoRA that starts from the kernel's largest singular values, which its base lacks (arXiv:2404.02948).

    Attributes:
      base: what is left of the kernel, `kernel - scale * a0 @ b0`.
      a0, b0: `a` and `b` as they started; they do not train. With them the adapter is also a plain one, of twice the
        rank, on the kernel as it was.
    """

    a0: Any = None
    b0: Any = None

    def plain(self) -> Any:
        return (in_float32(self.base) + self.scale * product(self.a0, self.b0)).astype(self.dtype)

    def axes(self, kernel: Axes) -> dict[str, Axes]:
        mine = super().axes(kernel)
        return mine | {"a0": mine["a"], "b0": mine["b"]}


def drop(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """`x` itself without a key or a rate."""
    if rng is None or rate == 0:
        return x
    kept = jax.random.bernoulli(rng, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def product(a: Any, b: Any) -> jax.Array:
    """`a @ b` in float32, as exact on TPUs, which would round both to bfloat16."""
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")


def fuse_lora(x: jax.Array, base: Any) -> bool:
    """Whether `base + scale * a @ b` is formed before it is applied: in float32, where nothing of it is rounded away.

    One large product then takes the place of one large and two thin ones, which run far below the speed of the machine
    (on CPUs a LoRA step spends a third of its time in them). In bfloat16 the adapter's part would vanish in the sum.
    """
    return isinstance(base, jax.Array) and base.dtype == x.dtype == jnp.float32


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def folded(x: jax.Array, base: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """`x @ (base + scale * a @ b)`; its gradients for `a` and `b` never pass through one of the size of `base`."""
    return x @ (base + scale * (a @ b))


def _folded_forward(x, base, a, b, scale):
    kernel = base + scale * (a @ b)
    return x @ kernel, (x, kernel, a, b)


def _folded_backward(scale, residuals, dy):
    x, kernel, a, b = residuals
    rows_x, rows_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    da = scale * (rows_x.T @ (rows_dy @ b.T))
    db = scale * ((rows_x @ a).T @ rows_dy)
    return dy @ kernel.T, rows_x.T @ rows_dy, da, db  # the second is computed only if someone asks for it


folded.defvjp(_folded_forward, _folded_backward)


class AdapterOptions(NamedTuple):
    """How adapters are made.

    Attributes:
      alpha: default 2 * rank.
      form: `LoRA`, `DoRA` or `PiSSA`.
      svd_iterations: PiSSA: of the randomised decomposition; -1: an exact one, which takes far longer.
      rank_pattern, alpha_pattern: a rank or an alpha of their own for the modules that a name means, as in `targets`;
        the first that fits counts. An alpha that is not given stays as it is, as in PEFT.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    form: Literal["lora", "dora", "pissa"] = "lora"
    svd_iterations: int = 16
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None


def add(
    params: PyTree,
    targets: Sequence[str] | str = ("all",),
    *,
    key: jax.Array | None = None,
    names: Names | None = None,
    **options: Any,
) -> PyTree:
    """Put an adapter on each kernel that `targets` select; the model computes the same as before.

    >>> params = lora.add(params, ("q_proj", "v_proj"), rank=16)                               # doctest: +SKIP

    Args:
      targets: see `jtune.tuning.nodes.select`; a string may have commas.
      key: of the random `a`, uniform in +-1/sqrt(in) as PEFT draws it; default `jax.random.key(0)`. The draw of a
        kernel depends on the key and its path only.
      options: fields of `AdapterOptions`.

    Raises:
      ConfigError: a name that matches nothing; DoRA for experts.
    """
    how = AdapterOptions(**options)
    names = names or Names()
    chosen = select(params, targets, names)
    key = jax.random.key(0) if key is None else key
    alpha = 2 * how.rank if how.alpha is None else how.alpha
    ranks, alphas = how.rank_pattern or {}, how.alpha_pattern or {}
    _check_patterns(chosen, [*ranks, *alphas], names)

    def adapt(where: str, module: Path, kernel: Any) -> Node:
        if is_adapter(kernel):
            raise ValueError(f"{'.'.join(module)} has an adapter already; merge it first")
        r = next((value for name, value in ranks.items() if knows(module, name, names)), how.rank)
        its_alpha = next((value for name, value in alphas.items() if knows(module, name, names)), alpha)
        scale = its_alpha / math.sqrt(r) if how.use_rslora else its_alpha / r
        mine = jax.random.fold_in(key, zlib.crc32(where.encode()))
        if how.form == "pissa":
            return principal(kernel, r, scale, how.dropout, how.svd_iterations, mine)
        *lead, inputs, outputs = kernel.shape
        bound = 1 / math.sqrt(inputs)
        a = jax.random.uniform(mine, (*lead, inputs, r), jnp.float32, -bound, bound)
        b = jnp.zeros((*lead, r, outputs), jnp.float32)
        if how.form == "lora":
            return LoRA(kernel, a, b, scale, how.dropout)
        if "experts" in module:
            raise ConfigError("use_dora: experts have no DoRA: leave them out of lora_target, or use plain LoRA")
        return DoRA(kernel, a, b, scale, how.dropout, jnp.linalg.norm(in_float32(kernel), axis=-2))

    return replace(params, chosen, adapt)


def _check_patterns(chosen: Sequence[Path], patterns: Sequence[str], names: Names) -> None:
    for name in patterns:
        if not any(knows(module, name, names) for module in chosen):
            there = ", ".join(dict.fromkeys(module[-1] for module in chosen))
            raise ConfigError(f"rank_pattern, alpha_pattern: {name!r} is no module that gets an adapter: {there}")


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def principal(kernel: Any, rank: int, scale: float, dropout: float, iterations: int, key: jax.Array) -> PiSSA:
    """The node of a kernel's `rank` largest singular values: `a = U sqrt(S / scale)`, `b = sqrt(S / scale) V^T`.

    Args:
      iterations: of the randomised decomposition (arXiv:0909.4061, algorithm 5.1 after 4.4); -1: an exact one.
    """
    whole = in_float32(kernel)

    def largest(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        if iterations < 0:
            u, s, vt = jnp.linalg.svd(w, full_matrices=False)
        else:
            width = min(rank + 8, *w.shape)
            q = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], width)))[0]
            for _ in range(iterations):
                q = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])[0]
            u, s, vt = jnp.linalg.svd(q.T @ w, full_matrices=False)
            u = q @ u
        root = jnp.sqrt(s[:rank] / scale)
        return u[:, :rank] * root, root[:, None] * vt[:rank]

    *lead, inputs, outputs = whole.shape
    # One after the other: a stack's intermediate matrices would take its memory many times.
    a, b = jax.lax.map(largest, whole.reshape(-1, inputs, outputs))
    a, b = a.reshape(*lead, inputs, -1), b.reshape(*lead, -1, outputs)
    rest = (whole - scale * product(a, b)).astype(kernel.dtype)
    return PiSSA(rest, a, b, scale, dropout, a, b)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def taken_out(
    kernel: jax.Array, how: Literal["pissa", "olora"], rank: int, scale: float, each: tuple[tuple[int, float], ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(rest, a0, b0): a kernel `[..., in, out]` without the start of an adapter, and the start, as PEFT has them.

    `rest` is `kernel - scale * a0 @ b0`, in the kernel's dtype; a0 and b0 are float32.

    Args:
      how: the largest singular values ("pissa"), or the first rows of a QR decomposition ("olora").
      each: rank and scale of each kernel of the stack; what is beyond its rank is zero.
    """
    *lead, inputs, outputs = kernel.shape
    whole = in_float32(kernel).reshape(-1, inputs, outputs)

    def start(w: jax.Array, r: jax.Array, its_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        if how == "pissa":
            u, s, vt = jnp.linalg.svd(w.T, full_matrices=False)  # of the kernel as files have it
            root = jnp.sqrt(s[:rank] / scale)
            a, b = vt[:rank].T * root, root[:, None] * u[:, :rank].T
        else:
            q, upper = jnp.linalg.qr(w.T)
            a, b = upper[:rank].T, q[:, :rank].T * (its_scale / scale)
        return a * (jnp.arange(a.shape[1]) < r), b

    ranks, scales = (jnp.asarray(column) for column in zip(*each, strict=True))
    a, b = jax.lax.map(lambda x: start(*x), (whole, ranks, scales))
    a, b = a.reshape(*lead, inputs, -1), b.reshape(*lead, -1, outputs)
    return (in_float32(kernel) - scale * product(a, b)).astype(kernel.dtype), a, b
