"""`jtune plan CASE.yaml`: memory and time of a run before it runs, as a table or as JSON."""

import json

from jtune.config import Config
from jtune.planning.plan import plan
from jtune.planning.show import show


def show_plan(config: Config, *, topology: str | None = None, fit: bool = False, as_json: bool = False) -> None:
    """Print what the run of `config` takes on `topology`, or on the devices of this machine.

    Args:
      topology: as `v5p:4x4x4` or `h100:8`; `compile_here_for(topology)` must come before anything else of jax.
      fit: search microbatch, remat and mesh for the fastest setting that fits, and plan that one.

    Raises:
      ConfigError: the topology is unknown, or the mesh does not match it.
      DataError: the model has no config.json, or jtune does not know the model.
    """
    result = plan(config, topology=topology, fit=fit)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
