"""Arrays over several processes: each process gives and sees the parts of its own devices only."""

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jtune.distributed import processes


def put(x: Any, sharding: Any) -> Any:
    """`x`, which every process has whole, as an array of this sharding; each process gives its own devices' parts."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return x if x.sharding.is_equivalent_to(sharding, x.ndim) else _placed(sharding)(x)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def put_rows(x: Any, first: int, shape: tuple[int, ...], axis: int, sharding: Any) -> Any:
    """An array of `shape`, of which this process has only the rows along `axis` from `first` on."""
    return jax.make_array_from_callback(shape, sharding, lambda part: x[shifted(part, first, shape, axis)])


def shifted(part: Any, first: int, shape: tuple[int, ...], axis: int) -> tuple[slice, ...]:
    """Where `part` of an array of `shape` is in what begins at row `first` of it.

    >>> shifted((slice(None), slice(6, 8)), 4, (3, 8), axis=1)
    (slice(None, None, None), slice(2, 4, None))
    """
    start, stop, _ = part[axis].indices(shape[axis])
    return (*part[:axis], slice(start - first, stop - first), *part[axis + 1 :])


def own_rows(sharding: Any, shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """From which row along `axis` up to which this process's devices need any."""
    parts = sharding.addressable_devices_indices_map(shape).values()
    return span([part[axis] for part in parts], shape[axis])


def span(parts: list[slice], size: int) -> tuple[int, int]:
    """The smallest range that holds all `parts` of `size` rows.

    >>> span([slice(2, 4), slice(0, 2), slice(2, 4)], 8), span([slice(None)], 8)
    ((0, 4), (0, 8))
    """
    bounds = [part.indices(size)[:2] for part in parts]
    return min(start for start, _ in bounds), max(stop for _, stop in bounds)


def whole(x: Any, at: tuple[int, ...] = ()) -> Any:
    """`x[at]` where this process can read all of it. All processes call it, as their devices send their parts.

    One layer at a time: a stack of layers may be larger than a device.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x[at] if at else x
    sharding: Any = x.sharding
    piece = _gather(sharding.mesh)(x, *(np.int32(i) for i in at))
    piece.block_until_ready()  # or whoever does not write would ask for all of them at once
    return piece


def agreement(mesh: Mesh) -> Callable[[bool], bool]:
    """`agree(mine)`: whether any process said True. All call it once for every update, and get the same answer.

    The answer is that of the update before: a small sum over all devices, dispatched and read like the metrics of the
    step, so nobody waits for it. In one process it is what was said.
    """
    if processes.count() == 1:
        return bool
    split = NamedSharding(mesh, P(mesh.axis_names))
    flags = [put(np.full(mesh.size, value, np.int32), split) for value in (0, 1)]
    any_of = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
    asked: deque[Any] = deque()

    def agree(mine: bool) -> bool:
        asked.append(any_of(flags[mine]))
        return len(asked) > 1 and bool(np.asarray(asked.popleft()))

    return agree


@cache
def _placed(sharding: NamedSharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=sharding)


@cache
def _gather(mesh: Mesh) -> Any:
    return jax.jit(lambda x, *at: x[at], out_shardings=NamedSharding(mesh, P()))
