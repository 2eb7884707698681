"""LoRA (arXiv:2106.09685) as a transform of the parameter tree: a kernel is replaced by a node that holds it.

lora.add(params, ("q_proj", "v_proj"))    kernels -> LoRA nodes
lora.merge(params)                        LoRA nodes -> kernels
lora.split(params)                        -> (parameters without adapters, adapters alone)
"""

import dataclasses
import difflib
import math
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jtune.errors import ConfigError
from jtune.models.families.base import Names
from jtune.models.kernels import project
from jtune.models.names import knows

PyTree = Any
Path = tuple[str, ...]


@partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale", "dropout"])
@dataclasses.dataclass(frozen=True)
class LoRA:
    """Stands in the place of a kernel `base` `[..., in, out]` and acts as `base + scale * a @ b`.

    Attributes:
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

    def project(self, x: jax.Array, rng: jax.Array | None, group_sizes: jax.Array | None) -> jax.Array:
        drops = self.dropout > 0 and rng is not None
        if folds(x, self.base) and not drops and group_sizes is None:
            return folded(x, self.base, self.a, self.b, self.scale)
        y = project(x, self.base, rng, group_sizes)
        if rng is not None and drops:
            kept = jax.random.bernoulli(rng, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        delta = project(project(x, self.a, None, group_sizes), self.b, None, group_sizes)
        return y + delta * self.scale

    def merged(self) -> jax.Array:
        """The kernel that acts the same, computed in float32, in the dtype of `base`."""
        delta = jnp.matmul(self.a.astype(jnp.float32), self.b.astype(jnp.float32)) * self.scale
        return (self.base.astype(jnp.float32) + delta).astype(self.base.dtype)


def folds(x: jax.Array, base: Any) -> bool:
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


def is_node(x: Any) -> bool:
    return isinstance(x, LoRA)


def has_dropout(params: PyTree) -> bool:
    return any(is_node(x) and x.dropout > 0 for x in jax.tree.leaves(params, is_leaf=is_node))


def is_adapter_leaf(path: Any) -> bool:
    """Whether a path of `jax.tree_util` ends in an adapter's `a` or `b`."""
    return isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name in ("a", "b")


def kernels(params: PyTree) -> Iterator[tuple[Path, Any]]:
    """Every kernel, plain or a node, with the path of its module: (("layers", "self_attn", "q_proj"), kernel)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_node):
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        if names[-1] == "kernel":
            yield names[:-1], leaf


def select(params: PyTree, targets: Sequence[str], names: Names | None = None) -> tuple[Path, ...]:
    """The modules that `targets` name, in the order of the tree.

    Args:
      targets: names of modules (`q_proj`), or the ends of their paths (`self_attn.q_proj`); `all`: every linear module
        of the layers, but not those of a mixture's experts and router, which must be named.
      names: what the model's family calls its modules (`jtune.models.families.names`): its words count as well.

    Raises:
      ConfigError: a name that matches nothing, with the names that would.
    """
    found = tuple(dict.fromkeys(path for path, _ in kernels(params)))
    chosen: set[Path] = set()
    unmatched = []
    names = names or Names()
    for target in targets:
        if target == "all":
            match = {p for p in found if p[0] == "layers" and "experts" not in p and p[-1] != "gate"}
        else:
            match = {p for p in found if knows(p, target, names)}
        if not match:
            unmatched.append(target)
        chosen |= match
    if unmatched:
        raise ConfigError(_no_such_target(unmatched, found, names))
    return tuple(path for path in found if path in chosen)


def _no_such_target(unmatched: Sequence[str], found: Sequence[Path], their: Names) -> str:
    names = list(dict.fromkeys(their.words.get(path[-1], path[-1]) for path in found))
    lines = []
    for target in unmatched:
        near = difflib.get_close_matches(target.split(".")[-1], names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        if target.split(".")[-1] == "embed_tokens":
            hint = "; an embedding has no kernel: train it whole with additional_target: embed_tokens"
        lines.append(f"lora_target: {target!r} matches no module of this model{hint}")
    return "\n".join(lines) + f"\nThere are: all, {', '.join(names)}"


def add(
    params: PyTree,
    targets: Sequence[str] | str = ("all",),
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    use_rslora: bool = False,
    key: jax.Array | None = None,
    names: Names | None = None,
) -> PyTree:
    """Put an adapter on each kernel that `targets` select; the model computes the same as before, as `b` is zero.

    >>> params = lora.add(params, ("q_proj", "v_proj"), rank=16)                               # doctest: +SKIP

    Args:
      targets: see `select`; a string may have commas.
      alpha: default 2 * rank.
      key: of the random `a`, uniform in +-1/sqrt(in) as PEFT draws it; default `jax.random.key(0)`. What a kernel
        gets depends on its path only.
    """
    wanted = targets.split(",") if isinstance(targets, str) else targets
    chosen = set(select(params, [name.strip() for name in wanted], names))
    key = jax.random.key(0) if key is None else key
    alpha = 2 * rank if alpha is None else alpha
    scale = alpha / math.sqrt(rank) if use_rslora else alpha / rank

    def adapt(path: Any, kernel: Any) -> Any:
        module = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))[:-1]
        if module not in chosen or path[-1].key != "kernel":
            return kernel
        if is_node(kernel):
            raise ValueError(f"{'.'.join(module)} has an adapter already; merge it first")
        *lead, inputs, outputs = kernel.shape
        mine = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        bound = 1 / math.sqrt(inputs)
        a = jax.random.uniform(mine, (*lead, inputs, rank), jnp.float32, -bound, bound)
        return LoRA(kernel, a, jnp.zeros((*lead, rank, outputs), jnp.float32), scale, dropout)

    return jax.tree_util.tree_map_with_path(adapt, params, is_leaf=is_node)


def merge(params: PyTree) -> PyTree:
    """Replace every node by the kernel that acts the same."""
    merged = jax.jit(LoRA.merged)
    return jax.tree.map(lambda x: merged(x) if is_node(x) else x, params, is_leaf=is_node)


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """(base, adapters): the parameters without adapters, and a tree of the nodes alone, their base None.

    `jax.tree.map` over both puts them together again; see `combine` in jtune.tuning for how.
    """
    base = jax.tree.map(lambda x: x.base if is_node(x) else x, params, is_leaf=is_node)
    adapters = jax.tree.map(
        lambda x: dataclasses.replace(x, base=None) if is_node(x) else None, params, is_leaf=is_node
    )
    return base, adapters
