"""Frozen kernels as lists of layers, for steps whose layers are unrolled."""

from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jtune import tuning
from jtune.losses.reference import WithReference
from jtune.models import CausalLM
from jtune.models.decoder import is_apart


def unstack_layers(frozen: Any, module: CausalLM) -> Any:
    """What the step takes and does not change, as layers that are unrolled take it: their kernels in lists, where
    adapters train (`jtune.models.decoder.is_apart`). Stacks of arrays are deleted, as there is no room for both.

    Args:
      frozen: see `held`; of arrays or of `jax.ShapeDtypeStruct`s with shardings.
    """
    if isinstance(frozen, WithReference):
        return frozen._replace(frozen=unstack_layers(frozen.frozen, module))
    kernels = [(path, x) for path, x in tuning.kernels(frozen) if path[0] == "layers"]
    if not module.unrolled or not any(tuning.is_adapter(x) for _, x in kernels):
        return frozen

    def cut(stack: Any) -> list[Any]:
        where = NamedSharding(stack.sharding.mesh, P(*stack.sharding.spec[1:]))
        count = stack.shape[0]
        if not isinstance(stack, jax.Array):
            return [jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=where)] * count
        parts = jax.jit(lambda x: [x[i] for i in range(count)], out_shardings=[where] * count)(stack)
        stack.delete()
        return parts

    def of_layers(where: str, path: tuple[str, ...], x: Any) -> Any:
        if tuning.is_adapter(x):
            return tuning.map_fields(lambda name, x: jax.tree.map(cut, x) if name == "base" else x, x)
        return jax.tree.map(cut, x)

    return tuning.replace(frozen, [path for path, _ in kernels], of_layers)


def restacked_shapes(frozen: Any) -> Any:
    """What `apart` was given, lists as `jax.ShapeDtypeStruct`s of their stacks."""
    stack = lambda x: jax.ShapeDtypeStruct((len(x), *x[0].shape), x[0].dtype) if is_apart(x) else x
    return jax.tree.map(stack, frozen, is_leaf=is_apart)
