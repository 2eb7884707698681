"""Nodes: what may stand in the place of a kernel, and says itself how it acts, merges, lies on devices and trains.

A way of tuning is one subclass of `Node`; nothing else knows of it. docs/methods.md adds one as an example.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jtune.errors import ConfigError
from jtune.models.families.base import Names
from jtune.models.names import knows
from jtune.models.value_head import VALUE_HEAD

PyTree = Any
Path = tuple[str, ...]
HEADS = ("lm_head", VALUE_HEAD)  # outermost modules that "all" does not mean
Axes = tuple[str | None, ...]


class Node(ABC):
    """Stands in the place of a kernel `[..., in, out]`; a subclass is a frozen dataclass and a pytree.

    Every array of it begins with the kernel's leading axes (layers, experts): layers are scanned, and a stack of them
    may be cut. What a node stands for, an array or another node, is its `base`.
    """

    base: Any
    adapter: ClassVar[tuple[str, ...]] = ()  # the fields that train
    dropout: float = 0.0

    @abstractmethod
    def project(self, x: jax.Array, rng: jax.Array | None, group_sizes: jax.Array | None) -> jax.Array:
        """What `x @ kernel` is, in the dtype of `x`; for the arguments see `jtune.models.kernels.project`."""

    @abstractmethod
    def merged(self, dtype: Any = None) -> jax.Array:
        """The kernel that acts the same, computed in float32, in `dtype` (default: the node's)."""

    def plain(self) -> Any:
        """The kernel before it was adapted, an array or a node."""
        return self.base

    def axes(self, kernel: Axes) -> dict[str, Axes]:
        """The logical axes of the fields but `base`, where they are to be split; what is not named lies everywhere.

        Args:
          kernel: those of the kernel: leading ones, in, out.
        """
        return {}

    def lies(self, kernel: Axes, small: int = 0) -> Any:
        """The logical axes of every array, as a tree like the node.

        Args:
          kernel: those of the kernel.
          small: adapters of fewer elements lie everywhere.
        """
        declared = self.axes(kernel)

        def of(name: str, value: Any) -> Any:
            if name == "base" and value is not None:
                return value.lies(kernel, small) if is_node(value) else kernel
            everywhere = lambda x: name not in declared or (name in self.adapter and x.size < small)
            return jax.tree.map(lambda x: (None,) * x.ndim if everywhere(x) else declared[name], value)

        return map_fields(of, self)

    def describe(self) -> str:
        """What the log says of it."""
        return type(self).__name__

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def size(self) -> int:
        """Its parameters; of a kernel that is held in fewer bits, those of the kernel."""
        sizes: list[int] = []
        map_fields(lambda _, value: sizes.append(count(value)), self)
        return sum(sizes)


def is_node(x: Any) -> bool:
    return isinstance(x, Node)


def is_adapter(x: Any) -> bool:
    """Whether it is a node that has something to train."""
    return is_node(x) and bool(x.adapter)


def count(params: PyTree) -> int:
    """How many parameters there are."""
    return sum(x.size for x in jax.tree.leaves(params, is_leaf=is_node))


def map_fields(f: Callable[[str, Any], Any], node: Node) -> Any:
    """The node with `f(name, value)` in the place of each field that holds arrays."""
    fields, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return jax.tree.unflatten(treedef, [f(path[0].name, value) for path, value in fields])


def adapter_mask(params: PyTree) -> PyTree:
    """True for what trains of adapters, False for everything else."""

    def of(x: Any) -> Any:
        if not is_node(x):
            return False
        return map_fields(lambda name, v: jax.tree.map(lambda _: True, v) if name in x.adapter else adapter_mask(v), x)

    return jax.tree.map(of, params, is_leaf=is_node)


def kernels(params: PyTree) -> Iterator[tuple[Path, Any]]:
    """Every kernel, plain or a node, with the path of its module: (("layers", "self_attn", "q_proj"), kernel)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_node):
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        if names[-1] == "kernel":
            yield names[:-1], leaf


def select(params: PyTree, targets: Sequence[str] | str, names: Names | None = None) -> tuple[Path, ...]:
    """The modules that `targets` name, in the order of the tree.

    Args:
      targets: names of modules (`q_proj`), or the ends of their paths (`self_attn.q_proj`); `all`: every linear module
        but the heads, and not those of a mixture's experts and router, which must be named. A string may have commas.
      names: what the model's family calls its modules (`jtune.models.families.module_names`): its words count as well.

    Raises:
      ConfigError: a name that matches nothing, with the names that would.
    """
    found = tuple(dict.fromkeys(path for path, _ in kernels(params)))
    chosen: set[Path] = set()
    unmatched = []
    names = names or Names()
    for target in [name.strip() for name in targets.split(",")] if isinstance(targets, str) else targets:
        if target == "all":
            match = {p for p in found if p[0] not in HEADS and "experts" not in p and p[-1] != "gate"}
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
        if target.split(".")[-1] == "lm_head":
            hint = "; its head is its embedding: train that whole with additional_target: embed_tokens"
        lines.append(f"lora_target: {target!r} matches no module of this model{hint}")
    return "\n".join(lines) + f"\nThere are: all, {', '.join(names)}"


def replace(params: PyTree, modules: Sequence[Path], make: Callable[[str, Path, Any], Any]) -> PyTree:
    """`make(where, module, kernel)` in the place of each kernel of `modules` (see `select`).

    >>> replace(params, select(params, "q_proj"), lambda where, module, kernel: Scaled(kernel))    # doctest: +SKIP

    `where` names one leaf, and no other: of the same module in several stacks, each has its own.
    """
    chosen = set(modules)

    def one(path: Any, kernel: Any) -> Any:
        module = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))[:-1]
        if module not in chosen or path[-1].key != "kernel":
            return kernel
        return make(jax.tree_util.keystr(path), module, kernel)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_node)


def merge(params: PyTree) -> PyTree:
    """Replace every node by the kernel that acts the same."""
    merged = jax.jit(lambda node: node.merged())
    return jax.tree.map(lambda x: merged(x) if is_node(x) else x, params, is_leaf=is_node)


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """(base, adapters): the parameters without adapters, and a tree of the adapters alone, their base None.

    `jax.tree.map` over both puts them together again; see `combine` in jtune.tuning for how.
    """
    without = lambda name, value: None if name == "base" else value
    base = jax.tree.map(lambda x: x.plain() if is_adapter(x) else x, params, is_leaf=is_node)
    adapters = jax.tree.map(lambda x: map_fields(without, x) if is_adapter(x) else None, params, is_leaf=is_node)
    return base, adapters


def has_dropout(params: PyTree) -> bool:
    return any(is_node(x) and x.dropout > 0 for x in jax.tree.leaves(params, is_leaf=is_node))


def in_float32(kernel: Any) -> jax.Array:
    """A kernel, plain or a node, as one float32 array."""
    return kernel.merged(jnp.float32) if is_node(kernel) else kernel.astype(jnp.float32)
