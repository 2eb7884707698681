"""How much the backward pass recomputes: as little as memory allows."""

import logging
import math
from collections.abc import Callable, Mapping

from jax.sharding import Mesh

from jtune.config import Config
from jtune.data import Sizes
from jtune.loading.model import requested_remat, with_remat
from jtune.planning.compile import measure
from jtune.planning.estimate import MARGIN, MOST_OFF, Rows, estimate, largest
from jtune.train.program import Program

log = logging.getLogger("jtune")


def sound_remat(program: Program, rows: Rows, usable: int, compiled: Callable[[str], float]) -> str:
    """`remat: auto`: the policy that recomputes least, of those that fit.

    The estimate decides where memory is plentiful. Where it is not, the compiler does: a run that ends out of memory
    costs more than recomputed layers.

    Args:
      usable: bytes of a device that programs get.
      compiled: policy -> bytes of a device that the compiled step takes at its peak.
    """
    enough = MARGIN * usable

    def fits(policy: str) -> bool:
        guess = estimate(program._replace(module=program.module.clone(remat=policy)), rows)
        if guess["arguments"] + MOST_OFF * guess["temporaries"] <= enough:
            return True
        return guess["peak"] <= usable and compiled(policy) <= enough

    return next((policy for policy in ("none", "dots", "attention") if fits(policy)), "full")


def fitting_remat(
    config: Config, program: Program, sizes: Mapping[tuple[int, int, int], Sizes], target: str, usable: int
) -> str:
    """The remat policy of a run: the one that `config` names, else as little recomputation as memory allows.

    Args:
      sizes: see `jtune.planning.estimate.largest`.
      target: the name of the topology, or of the kind of device.
      usable: bytes of a device that programs get.
    """
    policy = requested_remat(config.training, config.model)
    if policy != "auto":
        return policy
    assert isinstance(program.mesh, Mesh)
    platform = program.mesh.devices.flat[0].platform
    shape, rows = largest(program, sizes)

    def compiled(policy: str) -> float:
        log.info("remat: does %s fit in %.1f GiB? Asking the compiler", policy, usable / 2**30)
        module = with_remat(program.module, policy, platform)
        found = measure(config, program._replace(module=module), shape, sizes[shape], target)
        return math.inf if found["refused"] else found["peak"]

    policy = sound_remat(program, rows, usable, compiled)
    log.info("remat: %s (auto: a device has %.1f GiB)", policy, usable / 2**30)
    return policy
