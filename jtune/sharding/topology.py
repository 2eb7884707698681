"""Devices that need not be here: TPU topologies by name, and how much memory a device has."""

import importlib.util
import os
import re
from typing import Any

import jax

from jtune.errors import ConfigError

GIB = 2**30

# HBM of one device by jax's name of its kind (lower case, a part of it is enough; the first that matches). TPU7x shows
# the two cores of a chip, with half of its 192 GiB each.
MEMORY = {
    "tpu v4": 32 * GIB,
    "tpu v5 lite": 16 * GIB,
    "tpu v5": 95 * GIB,
    "tpu v6": 32 * GIB,
    "tpu7x": 96 * GIB,
    "tpu v7": 96 * GIB,
}

# What the compiler says is not available of it, when it refuses a program.
RESERVED = {"tpu v5 lite": GIB // 4, "tpu v6": 3 * GIB // 4}

# Bytes a second that a device exchanges with its neighbours, all links together, as vendors state them: what a search
# over meshes weighs communication with.
LINKS = {
    "tpu v4": 300e9,
    "tpu v5 lite": 200e9,
    "tpu v5": 600e9,
    "tpu v6": 448e9,
    "tpu7x": 600e9,
    "h100": 450e9,
    "h200": 450e9,
    "b200": 900e9,
    "a100": 300e9,
}

# Our names of TPU kinds -> libtpu's, and what it must be told of them. A v4 chip's two cores are one device
# (megacore) where programs run, but two unless asked otherwise where they are only compiled.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "v4": ("v4", {"chip_config_name": "megacore"}),
    "v5e": ("v5e", {}),
    "v5p": ("v5p", {}),
    "v6e": ("v6e", {}),
    "v7x": ("tpu7x", {}),
}


def compile_for_tpu_here() -> None:
    """Say to libtpu, before jax looks for devices, that there is no TPU here to be found; and to jax, to not look.

    Raises:
      ConfigError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("--topology compiles with the TPU compiler, which is not here: pip install 'jtune[tpu]'")
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # Of what machine it is and who else is in its slice: asked for and complained about, though nothing depends on it.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")


def topology_devices(name: str) -> list[Any]:
    """The devices of `v5p:4x4x4`, `v5e:4x4` ..., to compile for; none of them can hold an array.

    Raises:
      ConfigError: there is no such topology.
    """
    from jax.experimental import topologies

    kind, _, layout = name.removeprefix("tpu-").partition(":")
    if kind not in KINDS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", layout):
        raise ConfigError(
            f"--topology {name}: expected a kind of TPU ({', '.join(KINDS)}) and how its chips are laid out, "
            "as in v5e:4x4 or v5p:4x4x4"
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


def device_memory(device: Any) -> int:
    """Bytes that one device has. Virtual devices of a CPU share its memory."""
    kind = device.device_kind.lower()
    for name, size in MEMORY.items():
        if name in kind:
            return size
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return stats["bytes_limit"]
        raise ConfigError(f"{device.device_kind}: how much memory it has is not known")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def usable_memory(device: Any) -> int:
    """Bytes of one device that programs get."""
    return device_memory(device) - reserved_memory(device.device_kind)


def reserved_memory(device_kind: str) -> int:
    """Bytes of a device that programs do not get."""
    kind = device_kind.lower()
    return next((size for name, size in RESERVED.items() if name in kind), 0)


def link_speed(device_kind: str) -> float:
    """Bytes a second between devices; of what is not in the table, a modest figure."""
    kind = device_kind.lower()
    return next((speed for name, speed in LINKS.items() if name in kind), 50e9)
