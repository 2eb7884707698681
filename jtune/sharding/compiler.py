"""Settings of XLA: the cache of compiled programs, and the compiler options of a step."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh


def use_compile_cache(folder: str | None) -> None:
    """Keep compiled programs on disk, so that the second run of a shape compiles nothing.

    Compiled programs are code, so only the user can read the folder. Several CPU devices do not use the cache before
    jax 0.12: in a program that XLA reads from the disk, collectives lose their order, and devices would wait for each
    other forever.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1 and jax.__version_info__ < (0, 12):
        jax.config.update("jax_enable_compilation_cache", False)
        return
    path = Path(folder) if folder else Path.home() / ".cache" / "jtune" / "compiled"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """The compiler options of a step, besides XLA's defaults.

    On GPUs, cuBLAS computes all matrix products: it adds the adapter's product while it writes the kernel's, and needs
    no autotuning. XLA's own products, in Triton, are as fast only for a short time, on a cool card.
    """
    return {"xla_gpu_enable_triton_gemm": False} if mesh.devices.flat[0].platform == "gpu" else None
