"""Declare parameters and apply kernels.

A kernel is an array `[..., in, out]`, or a node in its place that applies itself (a LoRA adapter, a quantised kernel).
No other part of the decoder knows about nodes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp


@runtime_checkable
class Kernel(Protocol):
    """A node in the place of a kernel: a pytree whose first leaf is the base that it stands for."""

    def project(self, x: jax.Array, rng: jax.Array | None, group_sizes: jax.Array | None) -> jax.Array: ...

    def lies(self, kernel: tuple[str | None, ...]) -> Any:
        """The logical axes of every array, as a tree like the node; `kernel`: those of the kernel."""
        ...


def project(
    x: jax.Array, kernel: jax.Array | Kernel, rng: jax.Array | None = None, group_sizes: jax.Array | None = None
) -> jax.Array:
    """`x @ kernel` in the dtype of `x`: `[..., in]` -> `[..., out]`.

    Args:
      rng: key for the dropout of nodes; None: no dropout.
      group_sizes: int32 `[experts]`, for kernels `[experts, in, out]`: the number of rows of each expert in `x`
        `[tokens, in]`, which is sorted by expert.
    """
    if isinstance(kernel, Kernel):
        return kernel.project(x, rng, group_sizes)
    kernel = kernel.astype(x.dtype)
    return matmul(x, kernel) if group_sizes is None else jax.lax.ragged_dot(x, kernel, group_sizes)


def recomputed(function: Callable) -> Callable:
    """`function`, recomputed from its inputs in the backward pass: for elementwise work, as fast to redo as to read."""
    return jax.checkpoint(function, prevent_cse=False)  # XLA may merge the two computations where that is better


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel`, `[..., in]` and `[in, out]`.

    Its gradients are the usual ones, with a hint to XLA on CPUs. The gradient for the kernel needs `x` transposed, and
    XLA would recompute `x` in transposed order for it: an element at a time, across the cache.
    """
    return x @ kernel


def _matmul_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _matmul_backward(residuals, dy):
    x, kernel = residuals
    rows_x, rows_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # The platform of the lowering counts, not that of this process: `jtune plan` compiles for other platforms.
    hold = lambda *x: jax.lax.optimization_barrier(x)
    rows_x, rows_dy = jax.lax.platform_dependent(rows_x, rows_dy, cpu=hold, default=lambda *x: x)
    return dy @ kernel.T, rows_x.T @ rows_dy


matmul.defvjp(_matmul_forward, _matmul_backward)


def parameter(module: nn.Module, name: str, init: Callable, shape: Sequence[int], axes: Sequence[str | None]) -> Any:
    """The parameter `name` of a module, with its shape, initialiser and logical axes: its only declaration.

    An existing parameter is returned as it is. Linen would compare its shape with the declared shape, and a node has
    another structure.
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
        if self.experts:  # each row gets the bias of its expert
            assert group_sizes is not None
            bias = jnp.repeat(bias, group_sizes, axis=0, total_repeat_length=x.shape[0])
        return y + bias.astype(y.dtype)
