"""What XLA is told: where compiled programs are kept, and which options a step is compiled with."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh


def use_compile_cache(folder: str | None) -> None:
    """Keep compiled programs on disk, so that the second run of a shape compiles nothing.

    Compiled programs are code: the folder is the user's own and readable by nobody else. Several devices on CPUs go
    without where XLA, before jax 0.12, forgets in a program read back from disk that its collectives have an order: the
    devices would wait for each other for ever.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1 and jax.__version_info__ < (0, 12):
        jax.config.update("jax_enable_compilation_cache", False)
        return
    path = Path(folder) if folder else Path.home() / ".cache" / "jtune" / "compiled"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """What XLA is told of a step, besides its defaults.

    On GPUs, to leave all matrix products to cuBLAS: it adds an adapter's part while it writes the kernel's product, and
    nothing is tried out first. XLA's own, in Triton, are as fast for a moment, on a card that is cool.
    """
    return {"xla_gpu_enable_triton_gemm": False} if mesh.devices.flat[0].platform == "gpu" else None
