"""The batch of an update, on the devices."""

import jax
import numpy as np
from jax.sharding import Mesh

from jtune.data import Plan
from jtune.losses.batch import sharding_of
from jtune.sharding import arrays, batch_sharding, replicated


def place_batch(index: int, plan: Plan, mesh: Mesh) -> dict[str, jax.Array]:
    """The batch of a 0-based update, on the devices: rows and their units split, the scalar everywhere.

    Of several processes each reads and lays out the rows of its own devices only.
    """
    rows, everywhere = batch_sharding(mesh, accumulated=True), replicated(mesh)
    shape = plan.shape(index)
    first, stop = arrays.own_rows(rows, shape, axis=1)
    host = plan.update(index, (first, stop))
    divisor = arrays.put(host.pop("divisor"), everywhere)
    if (first, stop) == (0, shape.batch):
        return {name: arrays.put(x, sharding_of(name, mesh)) for name, x in host.items()} | {"divisor": divisor}
    return {name: _put_part(name, x, (first, stop), shape.batch, mesh) for name, x in host.items()} | {
        "divisor": divisor
    }


def _put_part(name: str, x: np.ndarray, rows: tuple[int, int], batch: int, mesh: Mesh) -> jax.Array:
    """An array of a batch, of which this process has the part that belongs to `rows` of `batch` rows."""
    of_all = x.shape[1] * batch // (rows[1] - rows[0])
    whole = (x.shape[0], of_all, *x.shape[2:])
    return arrays.put_rows(x, rows[0] * of_all // batch, whole, 1, sharding_of(name, mesh))
