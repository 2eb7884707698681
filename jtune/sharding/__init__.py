"""Where arrays live: the device mesh and the table from logical axes to mesh axes."""

from jtune.sharding import hosts, spread
from jtune.sharding.mesh import batch_shards, make_mesh
from jtune.sharding.rules import batch_sharding, replicated, shard_like, tree_shardings

__all__ = [
    "batch_sharding",
    "batch_shards",
    "hosts",
    "make_mesh",
    "replicated",
    "shard_like",
    "spread",
    "tree_shardings",
]
