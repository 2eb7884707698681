"""Arrays over several processes: each process writes and reads only the shards of its own devices."""

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
    """`x`, which every process has whole, as an array of this sharding; each process puts the shards of its devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return x if x.sharding.is_equivalent_to(sharding, x.ndim) else _placed(sharding)(x)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def put_rows(x: Any, first: int, shape: tuple[int, ...], axis: int, sharding: Any) -> Any:
    """An array of `shape`; this process only has the rows `x` along `axis`, from row `first` on."""
    return jax.make_array_from_callback(shape, sharding, lambda index: x[shifted(index, first, shape, axis)])


def shifted(index: Any, first: int, shape: tuple[int, ...], axis: int) -> tuple[slice, ...]:
    """`index` into an array of `shape`, as an index into its rows from `first` on.

    >>> shifted((slice(None), slice(6, 8)), 4, (3, 8), axis=1)
    (slice(None, None, None), slice(2, 4, None))
    """
    start, stop, _ = index[axis].indices(shape[axis])
    return (*index[:axis], slice(start - first, stop - first), *index[axis + 1 :])


def own_rows(sharding: Any, shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """The rows along `axis` that this process's devices need: (first, stop)."""
    shards = sharding.addressable_devices_indices_map(shape).values()
    return span([shard[axis] for shard in shards], shape[axis])


def span(shards: list[slice], size: int) -> tuple[int, int]:
    """The smallest range that covers all `shards` of `size` rows.

    >>> span([slice(2, 4), slice(0, 2), slice(2, 4)], 8), span([slice(None)], 8)
    ((0, 4), (0, 8))
    """
    bounds = [shard.indices(size)[:2] for shard in shards]
    return min(start for start, _ in bounds), max(stop for _, stop in bounds)


def whole(x: Any, at: tuple[int, ...] = ()) -> Any:
    """All-gather `x[at]`, so that this process can read all of it. All processes call it: their devices send shards.

    Call it for one layer at a time: a stack of layers may be larger than the memory of a device.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x[at] if at else x
    sharding: Any = x.sharding
    piece = _gather(sharding.mesh)(x, *(np.int32(i) for i in at))
    piece.block_until_ready()  # otherwise a process that does not write would request all layers at once
    return piece


def agreement(mesh: Mesh) -> Callable[[bool], bool]:
    """`agree(mine)`: whether any process passed True. All call it once per update, and get the same answer.

    The answer is that of the previous update: a small reduction over all devices, dispatched and read like the metrics
    of the step, so nobody waits for it. In one process the answer is `mine`.
    """
    if processes.count() == 1:
        return bool
    split = NamedSharding(mesh, P(mesh.axis_names))
    flags = [put(np.full(mesh.size, value, np.int32), split) for value in (0, 1)]
    any_of = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
    pending: deque[Any] = deque()

    def agree(mine: bool) -> bool:
        pending.append(any_of(flags[mine]))
        return len(pending) > 1 and bool(np.asarray(pending.popleft()))

    return agree


@cache
def _placed(sharding: NamedSharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=sharding)


@cache
def _gather(mesh: Mesh) -> Any:
    return jax.jit(lambda x, *at: x[at], out_shardings=NamedSharding(mesh, P()))
