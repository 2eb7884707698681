"""Choose the attention kernel for a model on a device."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtune.models.attention.dispatch import attend
from jtune.models.attention.flash import power_of_two
from jtune.models.config import DecoderConfig

WIDEST_FLASH_HEAD = 256


def choose(
    flash_attn: str,
    platform: str,
    config: DecoderConfig | None = None,
    dtype: Any = jnp.bfloat16,
    device: Any = None,
) -> tuple[str, str]:
    """(backend, why) for LLaMA-Factory's `flash_attn` on a platform ("cpu", "gpu", "tpu").

    It never chooses a kernel that cannot compute the model of `config`.

    Args:
      dtype: of activations.
      device: test the GPU kernel on it before choosing it; None: assume that it works.

    >>> choose("auto", "tpu")[0], choose("auto", "gpu")[0], choose("auto", "cpu")[0], choose("disabled", "tpu")[0]
    ('splash', 'flash', 'blocks', 'xla')
    """
    if flash_attn in ("disabled", "sdpa"):
        return "xla", f"flash_attn: {flash_attn}"
    if config is not None and config.alibi is not None:
        return "xla", "all scores at once, because the other kernels cannot add biases (alibi)"
    if platform == "tpu" and config is not None and config.sinks:
        return "blocks", "one block of queries at a time, because the TPU kernel has no attention sinks"
    if platform == "tpu":
        return "splash", "the fused TPU kernel: segments, windows and soft-caps, no scores in memory"
    why = "one block of queries at a time, so that only the scores of one block are in memory"
    if platform == "gpu":
        head_dim = 128 if config is None else config.widest_head
        obstacle = _flash_obstacle(jnp.dtype(dtype), head_dim, config and config.attention_softcap, device)
        if obstacle is None:
            return "flash", "a fused GPU kernel: segments, windows, soft-caps and sinks, no scores in memory"
        why += f"; the GPU kernel does not fit: {obstacle}"
    return "blocks", why


def _flash_obstacle(dtype: jnp.dtype, head_dim: int, softcap: float | None, device: Any) -> str | None:
    """Why the GPU kernel cannot be used, or None."""
    if dtype.itemsize != 2:
        return f"it computes in 16 bits, but activations are {dtype.name} (set bf16: true)"
    if head_dim > WIDEST_FLASH_HEAD:
        return f"heads have {head_dim} dimensions, it takes at most {WIDEST_FLASH_HEAD}"
    return None if device is None else gpu_kernel_failure(device, dtype, power_of_two(head_dim), softcap)


@lru_cache
def gpu_kernel_failure(device: Any, dtype: jnp.dtype, head_dim: int, softcap: float | None) -> str | None:
    """The fault of the GPU kernels on a device, or None: they must compile for it (which takes seconds) and equal plain
    attention. So no run starts with a kernel that is wrong on its device."""
    q, k, v = (
        jax.random.normal(jax.random.key(i), (1, 512, heads, head_dim), dtype) for i, heads in enumerate((2, 1, 1))
    )
    segment_ids = jnp.asarray(np.repeat(np.arange(1, 4), (100, 30, 382))[None], jnp.int32)
    options = {"scale": head_dim**-0.5, "softcap": softcap}

    def gradients(backend: str, q, k, v):
        out = lambda q, k, v: attend(q, k, v, segment_ids, backend=backend, **options).astype(jnp.float32)
        return jax.jit(jax.grad(lambda q, k, v: jnp.sum(out(q, k, v) ** 2), argnums=(0, 1, 2)))(q, k, v)

    with jax.default_device(device):
        try:
            ours = gradients("flash", q, k, v)
        except Exception as error:  # compilers and drivers raise many kinds
            return f"it fails on {device.device_kind} ({type(error).__name__}: {str(error)[:200]})"
        exact = gradients("xla", *(x.astype(jnp.float32) for x in (q, k, v)))
    off = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(ours, exact))
    return None if off < 0.02 else f"its gradients are off by {off:.1%} on {device.device_kind}"
