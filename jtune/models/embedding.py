"""Tables of which each token takes a row.

Shape suffixes: B batch, T tokens, D embed, V vocab, Z devices that hold other columns.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jtune.models.kernels import matmul, parameter
from jtune.sharding import divides, spec


class Embedding(nn.Module):
    """A table `[vocab, embed]`: the input of the layers and, when tied, the head."""

    vocab: int
    features: int
    mesh: Mesh | None = None

    def setup(self):
        shape, axes = (self.vocab, self.features), ("vocab", "embed")
        self.embedding = parameter(self, "embedding", nn.initializers.normal(0.02), shape, axes)

    def __call__(self, input_ids: jax.Array, dtype: Any) -> jax.Array:
        return look_up(self.embedding, input_ids, dtype, self.mesh)

    def attend(self, x: jax.Array) -> jax.Array:
        return matmul(x, self.embedding.astype(x.dtype).T)


def look_up(table_VD: jax.Array, ids_BT: jax.Array, dtype: Any, mesh: Mesh | None) -> jax.Array:
    """The rows `ids` of the table, `[batch, seq, embed]` in `dtype`.

    On a mesh the table stays in place. A device looks up its columns for all devices with other columns, and an
    all-to-all exchanges them, which costs as much as moving the result once. The gradient does the same in reverse.
    """
    if mesh is None or mesh.size == 1:
        return jnp.take(table_VD, ids_BT, axis=0).astype(dtype)
    table = spec(("vocab", "embed"), table_VD.shape, mesh)
    rows, columns = table
    tokens = spec(("batch", "sequence"), ids_BT.shape, mesh)

    # Where the mesh does not divide the tokens (few prompts, one token each), devices repeat the same work, and
    # shard_map cannot infer that their results are equal.
    each_its_own = divides(tokens, mesh)

    @partial(jax.shard_map, mesh=mesh, in_specs=(table, tokens), out_specs=P(*tokens, None), check_vma=each_its_own)
    def local(table_VD, ids_BT):
        ids_ZBT = ids_BT[None] if columns is None else jax.lax.all_gather(ids_BT, columns)
        if rows is None:
            x_ZBTD = jnp.take(table_VD, ids_ZBT, axis=0).astype(dtype)
        else:
            ids_ZBT -= jax.lax.axis_index(rows) * table_VD.shape[0]
            mine_ZBT = (ids_ZBT >= 0) & (ids_ZBT < table_VD.shape[0])
            x_ZBTD = jnp.take(table_VD, jnp.where(mine_ZBT, ids_ZBT, 0), axis=0).astype(dtype)
            x_ZBTD = jnp.where(mine_ZBT[..., None], x_ZBTD, 0)
        if columns is not None:
            x_ZBTD = jax.lax.all_to_all(x_ZBTD, columns, split_axis=0, concat_axis=3, tiled=True)
        return x_ZBTD[0] if rows is None else jax.lax.psum(x_ZBTD[0], rows)

    return local(table_VD, ids_BT)
