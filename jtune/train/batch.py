"""The batch of an update, on the devices."""

import jax
from jax.sharding import Mesh

from jtune.data import Plan
from jtune.sharding import arrays, batch_sharding, replicated


def place_batch(index: int, plan: Plan, mesh: Mesh) -> dict[str, jax.Array]:
    """The batch of a 0-based update, on the devices: rows split, the scalar everywhere.

    Of several processes each reads and lays out the rows of its own devices only.
    """
    rows, everywhere = batch_sharding(mesh, accumulated=True), replicated(mesh)
    shape = plan.shape(index)
    first, stop = arrays.own_rows(rows, shape, axis=1)
    host = plan.update(index, (first, stop))
    divisor = host.pop("divisor")
    if (first, stop) == (0, shape.batch):
        batch = {key: arrays.put(x, rows) for key, x in host.items()}
    else:
        batch = {key: arrays.put_rows(x, first, shape, 1, rows) for key, x in host.items()}
    return batch | {"divisor": arrays.put(divisor, everywhere)}
