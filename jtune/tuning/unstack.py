"""Frozen kernels as lists of layers, for steps whose layers are unrolled."""

from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jtune import tuning
from jtune.models import CausalLM
from jtune.models.decoder import is_unstacked


def unstack_layers(frozen: Any, module: CausalLM) -> Any:
    """The frozen parameters as unrolled layers take them: where adapters train, kernels in lists, one entry a layer.

    XLA copies what a product needs out of a stack, and keeps the copies. Stacks of arrays are deleted, as memory may
    not hold both.

    Args:
      frozen: arrays, or `jax.ShapeDtypeStruct`s with shardings.
    """
    kernels = [(path, x) for path, x in tuning.kernels(frozen) if path[0] == "layers"]
    if not module.unrolled or not any(tuning.is_adapter(x) for _, x in kernels):
        return frozen

    def cut(stack: Any) -> list[Any]:
        where = NamedSharding(stack.sharding.mesh, P(*stack.sharding.spec[1:]))
        count = stack.shape[0]
        if not isinstance(stack, jax.Array):
            return [jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=where)] * count
        layers = jax.jit(lambda x: [x[i] for i in range(count)], out_shardings=[where] * count)(stack)
        stack.delete()
        return layers

    def of_layers(where: str, path: tuple[str, ...], x: Any) -> Any:
        if tuning.is_adapter(x):
            return tuning.map_fields(lambda name, x: jax.tree.map(cut, x) if name == "base" else x, x)
        return jax.tree.map(cut, x)

    return tuning.replace(frozen, [path for path, _ in kernels], of_layers)


def restacked_shapes(frozen: Any) -> Any:
    """The tree before `unstack_layers`, with `jax.ShapeDtypeStruct`s of stacks in the place of lists."""
    stack = lambda x: jax.ShapeDtypeStruct((len(x), *x[0].shape), x[0].dtype) if is_unstacked(x) else x
    return jax.tree.map(stack, frozen, is_leaf=is_unstacked)
