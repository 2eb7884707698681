"""An optimizer as a rule for each parameter: what it keeps of it, and the direction that follows from its gradient.

Layers are stacked `[layers, ...]`, experts `[layers, experts, ...]`: references see each layer's, each expert's tensor
on its own. `lead` says how many dimensions of a leaf are such stacks.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jtune.sharding.rules import named

Path = Any  # of jax.tree_util
Shape = tuple[int, ...]


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["follows"])
@dataclasses.dataclass(frozen=True)
class Moments:
    """What is kept of one parameter.

    Attributes:
      follows: for each array the dimensions of the parameter that its own dimensions lie along, None for one that is
        none of them. A dimension may be shorter than the parameter's, as that of blocks is.
    """

    arrays: dict[str, Any]
    follows: tuple[tuple[str, tuple[int | None, ...]], ...]

    def replace(self, **arrays: jax.Array) -> "Moments":
        return dataclasses.replace(self, arrays=self.arrays | arrays)

    def shardings(self, of_parameter: NamedSharding) -> "Moments":
        """Where the arrays lie: along the parameter, as far as their sizes can be split so."""
        follows = dict(self.follows)
        where = {name: _along(of_parameter, x.shape, follows[name]) for name, x in self.arrays.items()}
        return dataclasses.replace(self, arrays=where)


def _along(sharding: NamedSharding, shape: Shape, dims: tuple[int | None, ...]) -> NamedSharding:
    parts: list[Any] = []
    for size, dim in zip(shape, dims, strict=True):
        axes = () if dim is None or dim >= len(sharding.spec) else named(sharding.spec[dim])
        mine: list[str] = []
        for axis in axes:
            if size % sharding.mesh.shape[axis]:
                break
            mine, size = [*mine, axis], size // sharding.mesh.shape[axis]
        parts.append(tuple(mine) or None)
    return NamedSharding(sharding.mesh, P(*parts))


def zeros(**arrays: tuple[Shape, tuple[int | None, ...]]) -> Moments:
    """Moments in float32: of each its shape and what its dimensions follow."""
    made: dict[str, Any] = {name: jnp.zeros(shape, jnp.float32) for name, (shape, _) in arrays.items()}
    return Moments(made, tuple((name, dims) for name, (_, dims) in arrays.items()))


def joined(*several: Moments) -> Moments:
    arrays = {name: x for one in several for name, x in one.arrays.items()}
    return Moments(arrays, tuple(entry for one in several for entry in one.follows))


class Rule(NamedTuple):
    """How one parameter is updated.

    Attributes:
      init: `(shape) -> Moments`.
      update: `(gradient, parameter, moments, count) -> (direction, moments)`; `count`, int32, is that of the updates
        before this one. The step subtracts the direction times the learning rate.
    """

    init: Callable[[Shape], Moments]
    update: Callable[[jax.Array, jax.Array, Moments, jax.Array], tuple[jax.Array, Moments]]


class LeafwiseState(NamedTuple):
    count: jax.Array  # int32 scalar: updates done
    moments: Any  # tree of Moments, like the parameters


def leafwise(rule_of: Callable[[Path, Shape], Rule]) -> optax.GradientTransformation:
    """The transform that updates each parameter by its own rule.

    Args:
      rule_of: `(path, shape)` of a leaf to its rule.
    """

    def init(params: Any) -> LeafwiseState:
        make = lambda path, p: rule_of(path, p.shape).init(p.shape)
        return LeafwiseState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(make, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, LeafwiseState]:
        leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
        columns = zip(leaves, structure.flatten_up_to(params), structure.flatten_up_to(state.moments), strict=True)
        done = [rule_of(path, g.shape).update(g, p, moments, state.count) for (path, g), p, moments in columns]
        directions, moments = ([pair[i] for pair in done] for i in (0, 1))
        return structure.unflatten(directions), LeafwiseState(state.count + 1, structure.unflatten(moments))

    return optax.GradientTransformation(init, update)


def keys(path: Path) -> tuple[str, ...]:
    """The names of a path: ("layers", "self_attn", "q_proj", "kernel")."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def lead(path: Path) -> int:
    """How many leading dimensions of a leaf are stacks: of layers, of experts."""
    names = keys(path)
    return int(names[:1] == ("layers",)) + int("experts" in names)


AT_WORK = 2**26  # numbers of matrices that a device works on at a time: 256 MiB of float32, a few times over


def whole_matrices(f: Callable[[jax.Array], Any], x: jax.Array, stacked: int, sharding: NamedSharding | None) -> Any:
    """`f` of each matrix of a stack, some at a time; each device takes whole ones of its own, where a mesh splits them.

    A product of a matrix with itself, or its decomposition, needs all of it: done where the pieces lie, each device
    would gather the whole stack. The stack is filled up to what the devices divide.

    Args:
      f: of one matrix `[in, out]`; gives an array.
      x: `[stacks..., in, out]` with `stacked` leading dimensions.
      sharding: of `x`; None, or a mesh of one device: nothing is moved.
    """

    def several(x: jax.Array) -> jax.Array:
        flat = x.reshape(-1, *x.shape[stacked:])
        size = max(1, AT_WORK // max(1, flat[0].size))
        y = jax.vmap(f)(flat) if size >= len(flat) else jax.lax.map(f, flat, batch_size=size)
        return y.reshape(*x.shape[:stacked], *y.shape[1:])

    if sharding is None or sharding.mesh.size == 1 or not stacked:
        return several(x)
    spec = (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))
    kept = [named(part) or None for part in spec[1:stacked]]
    mine = tuple(axis for part in (spec[0], *spec[stacked:]) for axis in named(part))
    devices = math.prod(sharding.mesh.shape[axis] for axis in mine)
    padded = jnp.pad(x, [(0, -len(x) % devices), *[(0, 0)] * (x.ndim - 1)])
    where = P(mine or None, *kept)
    return jax.shard_map(several, mesh=sharding.mesh, in_specs=where, out_specs=where)(padded)[: len(x)]


def by_path(tree: Any, of: Callable[[Any], Any]) -> Mapping[str, Any]:
    """`of` each leaf, under the text of its path."""
    return {jax.tree_util.keystr(path): of(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
