"""How parameters are declared and how kernels are applied.

A kernel is an array `[..., in, out]`, or a node that stands in its place and knows how it is applied (a LoRA adapter, a
quantised kernel). Nothing else in the decoder knows of nodes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp


@runtime_checkable
class Kernel(Protocol):
    """What may stand in the place of a kernel; a pytree whose first leaf is what it stands for."""

    def project(self, x: jax.Array, rng: jax.Array | None, group_sizes: jax.Array | None) -> jax.Array: ...

    def lies(self, kernel: tuple[str | None, ...]) -> Any:
        """The logical axes of every array, as a tree like it; `kernel`: those of the kernel."""
        ...


def project(
    x: jax.Array, kernel: jax.Array | Kernel, rng: jax.Array | None = None, group_sizes: jax.Array | None = None
) -> jax.Array:
    """`x @ kernel` in the dtype of `x`: `[..., in]` -> `[..., out]`.

    Args:
      rng: key for dropout, of nodes that have it; None: no dropout.
      group_sizes: int32 `[experts]`, for kernels `[experts, in, out]`: `x`, `[tokens, in]`, is sorted by expert, and
        this is how many rows each has.
    """
    if isinstance(kernel, Kernel):
        return kernel.project(x, rng, group_sizes)
    kernel = kernel.astype(x.dtype)
    return matmul(x, kernel) if group_sizes is None else jax.lax.ragged_dot(x, kernel, group_sizes)


def recomputed(function: Callable) -> Callable:
    """`function`, of whose work the backward pass keeps what it was given and nothing else: for what goes element by
    element, and is as soon done again as read back."""
    return jax.checkpoint(function, prevent_cse=False)  # where nothing keeps XLA from merging the two, it knows better


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel`, `[..., in]` and `[in, out]`.

    Its gradients are those of any product, but for a hint to XLA on CPUs. The gradient by the kernel takes `x`
    transposed, and XLA likes to compute `x` a second time for it, transposed: an element at a time, across the cache.
    """
    return x @ kernel


def _matmul_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _matmul_backward(residuals, dy):
    x, kernel = residuals
    rows_x, rows_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # By platform when lowered, not by where this runs: `jtune plan` compiles for others.
    hold = lambda *x: jax.lax.optimization_barrier(x)
    rows_x, rows_dy = jax.lax.platform_dependent(rows_x, rows_dy, cpu=hold, default=lambda *x: x)
    return dy @ kernel.T, rows_x.T @ rows_dy


matmul.defvjp(_matmul_forward, _matmul_backward)


def parameter(module: nn.Module, name: str, init: Callable, shape: Sequence[int], axes: Sequence[str | None]) -> Any:
    """The parameter `name` of a module, with its shape, initialiser and logical axes: its one declaration.

    What is there is taken as it is. Linen would compare its shape with the declared one, which a node does not have.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, nn.with_partitioning(init, tuple(axes)), tuple(shape), jnp.float32)


class Linear(nn.Module):
    """`x @ kernel + bias`; kernel `[in, out]`, or `[experts, in, out]` with `group_sizes`."""

    features: int
    axes: tuple[str | None, str | None]  # logical names of in and out
    use_bias: bool = False
    experts: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, group_sizes: jax.Array | None = None) -> jax.Array:
        shape, axes = (x.shape[-1], self.features), self.axes
        if self.experts:
            shape, axes = (self.experts, *shape), ("experts", *axes)
        kernel = parameter(self, "kernel", nn.initializers.normal(0.02), shape, axes)
        rng = self.make_rng("dropout") if self.has_rng("dropout") else None
        y = project(x, kernel, rng, group_sizes)
        if not self.use_bias:
            return y
        lead, lead_axes = ((self.experts,), ("experts",)) if self.experts else ((), ())
        bias = parameter(self, "bias", nn.initializers.zeros, (*lead, self.features), (*lead_axes, self.axes[1]))
        if self.experts:  # each row has that of its expert
            assert group_sizes is not None
            bias = jnp.repeat(bias, group_sizes, axis=0, total_repeat_length=x.shape[0])
        return y + bias.astype(y.dtype)
