"""Devices of other machines: topologies of TPUs and GPUs by name."""

import importlib.util
import os
import pkgutil
import re
from typing import Any, NamedTuple

import jax

from jtune.errors import ConfigError

# Our names of TPU kinds -> libtpu's, and what it must be told of them. A v4 chip's two cores are one device
# (megacore) where programs run, but two unless asked otherwise where they are only compiled.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "v4": ("v4", {"chip_config_name": "megacore"}),
    "v5e": ("v5e", {}),
    "v5p": ("v5p", {}),
    "v6e": ("v6e", {}),
    "v7x": ("tpu7x", {}),
}


class Gpu(NamedTuple):
    """What XLA must know of a GPU to compile for it: NVIDIA's data sheets and its guide's table of capabilities."""

    device_kind: str  # jax's name
    capability: tuple[int, int]
    memory: int  # bytes, as nvidia-smi says
    bandwidth: float  # of it, bytes a second
    cores: int  # multiprocessors
    ghz: float
    l2: int
    shared: int  # memory of a multiprocessor, bytes; a block gets 1 KiB less


MIB = 2**20
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 81920 * MIB, 2.039e12, 108, 1.41, 40 * MIB, 164 * 1024),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 81559 * MIB, 3.35e12, 132, 1.98, 50 * MIB, 228 * 1024),
    "h200": Gpu("NVIDIA H200", (9, 0), 143771 * MIB, 4.8e12, 132, 1.98, 60 * MIB, 228 * 1024),
}
GPUS_OF_A_HOST = 8


def compile_here_for(topology: str) -> None:
    """Say to jax, before it looks for devices, that those of a topology are not here; and to libtpu, to not look.

    Raises:
      ConfigError: the compiler for them is not installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    if topology.partition(":")[0] in GPUS:
        if not any(module.name.startswith("xla_cuda") for module in _jax_plugins()):
            raise ConfigError(
                f"--topology {topology} compiles with XLA's compiler for GPUs, which is not here: "
                "pip install 'jtune-llm[plan-gpu]' (it needs no GPU and no driver for this)"
            )
        return
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("--topology compiles with the TPU compiler, which is not here: pip install 'jtune-llm[tpu]'")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # Of what machine it is and who else is in its slice: asked for and complained about, though nothing depends on it.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


def _jax_plugins() -> list[pkgutil.ModuleInfo]:
    """The plugins of jax that are installed; they share a namespace package."""
    spec = importlib.util.find_spec("jax_plugins")
    places = spec.submodule_search_locations if spec is not None else None
    return list(pkgutil.iter_modules(places)) if places else []


def topology_devices(name: str) -> list[Any]:
    """The devices of `v5p:4x4x4`, `v5e:4x4`, `h100:8` ..., to compile for; none of them can hold an array.

    Raises:
      ConfigError: there is no such topology.
    """
    from jax.experimental import topologies

    if name.partition(":")[0] in GPUS:
        return _gpu_devices(name)
    kind, _, layout = name.removeprefix("tpu-").partition(":")
    if kind not in KINDS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", layout):
        raise ConfigError(
            f"--topology {name}: expected a kind of TPU ({', '.join(KINDS)}) and how its chips are laid out, "
            f"as in v5e:4x4 or v5p:4x4x4; or a kind of GPU ({', '.join(GPUS)}) and how many, as in h100:8"
        )
    theirs, options = KINDS[kind]
    # libtpu thinks of hosts with 2x2 chips; a slice that these do not fill is one of single chips.
    for more in ({}, {"chips_per_host_bounds": [1, 1, 1]}):
        try:
            found = topologies.get_topology_desc(f"{theirs}:{layout}", platform="tpu", **options, **more)
            return list(found.devices)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
    raise ConfigError(f"--topology {name}: the TPU compiler does not know it: {reason}")


def _gpu_devices(name: str) -> list[Any]:
    """So many GPUs, in hosts of eight where there are more. What XLA tries out where there is a GPU, which algorithm is
    the fastest for a product, it takes for granted here."""
    from jax.experimental import topologies

    kind, _, count = name.partition(":")
    number = int(count) if count.isdecimal() else 0
    if number < 1 or (number > GPUS_OF_A_HOST and number % GPUS_OF_A_HOST):
        raise ConfigError(f"--topology {name}: expected {kind}: and a number of GPUs, whole hosts of eight above eight")
    gpu = GPUS[kind]
    major, minor = gpu.capability
    target = f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.device_kind}"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          device_memory_size: {gpu.memory} memory_bandwidth: {gpu.bandwidth:.0f} l2_cache_size: {gpu.l2}
          core_count: {gpu.cores} clock_rate_ghz: {gpu.ghz} fpus_per_core: {128 if major >= 9 else 64}
          shared_memory_per_core: {gpu.shared} shared_memory_per_block_optin: {gpu.shared - 1024}
          shared_memory_per_block: 49152 threads_per_warp: 32 threads_per_block_limit: 1024
          threads_per_core_limit: 2048 registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}"""
    layout = f"1x{max(1, number // GPUS_OF_A_HOST)}x{min(number, GPUS_OF_A_HOST)}"  # slices, hosts, devices of a host
    try:
        found = topologies.get_topology_desc(gpu.device_kind, platform="cuda", target_config=target, topology=layout)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--topology {name}: {str(error).splitlines()[0]}") from error
    return list(found.devices)
