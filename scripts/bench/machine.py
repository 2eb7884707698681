"""What a benchmark ran on, and whether anything else was running."""

import os
import platform
from importlib import metadata
from pathlib import Path

QUIET = 0.5  # load average of a minute, above which timings of a small machine are not to be trusted


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu_name()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def versions(names: tuple[str, ...]) -> str:
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def noise() -> str | None:
    """A sentence when the machine is not quiet, else None."""
    load = os.getloadavg()[0]
    if load < QUIET:
        return None
    return f"the machine is not quiet (load average {load:.2f}, expected below {QUIET})"


def pin(cores: int) -> None:
    """Keep this process, and those it starts, on so many cores; XLA and OpenMP then make as many threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def busy_seconds() -> float:
    """CPU seconds that the cores of this process have been busy since the machine started, whoever used them; not a
    number where /proc does not say."""
    try:
        mine = {f"cpu{i}" for i in os.sched_getaffinity(0)}
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        # user, nice, system, (idle, iowait,) irq, softirq, steal
        ticks = sum(sum(map(int, [*row[1:4], *row[6:9]])) for row in rows if row[0] in mine)
    except (OSError, AttributeError, ValueError):
        return float("nan")
    return ticks / os.sysconf("SC_CLK_TCK")
