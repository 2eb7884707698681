"""Figures of chips: FLOP/s, memory, links."""

import os
import resource
from pathlib import Path, PurePosixPath
from typing import Any

import jax

from jtune.errors import ConfigError
from jtune.planning.topology import GPUS

GIB = 2**30

# HBM of one device, by a part of jax's name of its kind in lower case; the first match counts. A TPU7x chip shows two
# devices, its cores, with half of its 192 GiB each.
MEMORY = {
    "tpu v4": 32 * GIB,
    "tpu v5 lite": 16 * GIB,
    "tpu v5": 95 * GIB,
    "tpu v6": 32 * GIB,
    "tpu7x": 96 * GIB,
    "tpu v7": 96 * GIB,
}

# The share of it that the compiler keeps from programs, as it says when it refuses one.
RESERVED = {"tpu v5 lite": GIB // 4, "tpu v6": 3 * GIB // 4}

# Bytes a second that a device exchanges with its neighbours over all links, as vendors state them, for the search over
# meshes.
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

# The part of a GPU's memory that programs get with scripts/xla_flags.sh.
GPU_MEMORY_SHARE = 0.9


def device_memory(device: Any) -> int:
    """Bytes that one device has. Virtual devices of a CPU share its memory."""
    kind = device.device_kind.lower()
    for name, size in MEMORY.items():
        if name in kind:
            return size
    if device.platform == "cpu":
        return host_memory() // jax.local_device_count()
    if (limit := _limit(device)) is not None:
        return limit
    for gpu in GPUS.values():
        if gpu.device_kind == device.device_kind:
            return gpu.memory
    raise ConfigError(f"{device.device_kind}: its memory is not in the table (jtune/planning/chips.py)")


def host_memory(proc: Path = Path("/proc/self"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may have: the machine's, or less where a container, a job or `ulimit -v` sets a limit.

    The limits of its control group and of all groups around that one count: above the least of them the kernel kills.

    Args:
      proc: the folder that names the control groups of this process, in a file `cgroup`.
      cgroups: where control groups are mounted, version 2 or 1.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return min(limits)
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the group is mounted as the root, whatever it is called outside: the root is always looked at.
        own = PurePosixPath(group.strip("/"))
        for folder in (root / own, *(root / parent for parent in own.parents), root):
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # no such group here, or "max"
                continue
    return min(limit for limit in limits if limit > 0)


def _limit(device: Any) -> int | None:
    """Bytes that programs get of a device of this machine."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # it is of a topology
        return None


def usable_memory(device: Any) -> int:
    """Bytes of one device that programs get."""
    if device.platform == "gpu" and _limit(device) is None:
        return int(device_memory(device) * GPU_MEMORY_SHARE)
    return device_memory(device) - reserved_memory(device.device_kind)


def reserved_memory(device_kind: str) -> int:
    """Bytes of a device that programs do not get."""
    kind = device_kind.lower()
    return next((size for name, size in RESERVED.items() if name in kind), 0)


def link_speed(device_kind: str) -> float:
    """Bytes a second between devices; a modest figure for kinds that are not in the table."""
    kind = device_kind.lower()
    return next((speed for name, speed in LINKS.items() if name in kind), 50e9)


# Dense bfloat16 FLOP/s of a device, as its vendor states them, by a part of jax's name of its kind in lower case; the
# first match counts. A TPU7x chip shows two devices: half its figure each.
PEAK_FLOPS = {
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v6": 918e12,
    "tpu7x": 2307e12 / 2,
    "tpu v7": 2307e12 / 2,
    "b200": 2250e12,
    "h200": 989e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "gh200": 989e12,
    "a100": 312e12,
    "l40s": 362e12,
    "l4": 121e12,
    "a10g": 125e12,
    "rtx 4090": 165e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device; None for kinds that are not in the table (CPUs).

    >>> peak_flops("TPU v5 lite"), peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("cpu")
    (197000000000000.0, 989000000000000.0, None)
    """
    kind = device_kind.lower()
    return next((flops for name, flops in PEAK_FLOPS.items() if name in kind), None)
