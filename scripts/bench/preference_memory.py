"""What a step of preferences takes of memory, beside a supervised one on the same rows, by the compiler.

    python preference_memory.py PREFERENCES.yaml SUPERVISED.yaml

Both YAMLs have the same model and method; the second's rows are not read: its step is compiled for the batch of the
first, with as many labelled tokens. Prints a JSON object: of each policy of recomputation the bytes of both.
"""

import json
import sys

import jax
import make  # noqa: F401  this checkout, also where another one is installed

from jtune.config import load_config
from jtune.data import Sizes
from jtune.loading.model import with_remat
from jtune.loading.source import fetch_model
from jtune.planning.compile import measure
from jtune.planning.plan import Case, planned_source, read_rows, updates
from jtune.planning.shapes import abstract_program
from jtune.sharding import batch_shards
from jtune.sharding.mesh import mesh_of

POLICIES = ("none", "full")


def main(preferences: str, supervised: str) -> None:
    config = load_config([preferences], command="train")
    devices = jax.devices()
    source, _ = planned_source(config, fetch_model(config.model, weights=False))
    splits, why = read_rows(config, source)
    shards = batch_shards(mesh_of(config.training, devices))
    batches = updates(config, Case(source, splits, why, devices, "cpu", 0, 0), shards)
    shape, sizes = batches.shapes[0], batches.sizes[0]
    found = {"shape": list(shape), "labelled": sizes.labelled}
    for policy in POLICIES:
        of = {"preferences": (config, sizes), "supervised": (load_config([supervised], command="train"), None)}
        found[policy] = {
            name: measured(one, shape, of_one or Sizes(sizes.labelled), policy) for name, (one, of_one) in of.items()
        }
    print(json.dumps(found))


def measured(config, shape, sizes, policy):
    mesh = mesh_of(config.training, jax.devices())
    source, _ = planned_source(config, fetch_model(config.model, weights=False))
    program = abstract_program(source.config, source, mesh, platform="cpu")
    program = program._replace(module=with_remat(program.module, policy, "cpu"))
    return measure(config, program, shape, sizes, "cpu")["peak"]


if __name__ == "__main__":
    main(*sys.argv[1:])
