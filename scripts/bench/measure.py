"""Runs a training command, and takes the time of each update from outside.

Both jtune and LLaMA-Factory append a line to `trainer_log.jsonl` when an update is done (`logging_steps: 1`). The
times in it are whole seconds, so the file is watched, and a line's time is when it was seen: the same clock and the
same method for both, with an error of some milliseconds.
"""

import json
import os
import resource
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from machine import busy_seconds

WATCH = 0.005  # seconds between two looks at the file: costs nothing, and is little against an update


class Run(NamedTuple):
    """What was seen of one run. Update numbers are from 1."""

    seconds: dict[int, float]  # update -> seconds since the update before; of the first: since the start
    cpu_seconds: dict[int, float]  # the same in CPU time of all threads; not a number where /proc does not say
    losses: dict[int, float]
    tokens: dict[int, int]  # update -> tokens in it, padding not counted; empty if the log does not say
    wall: float  # of the whole command
    others: float  # cores that other processes kept busy meanwhile; not a number where /proc does not say


class Failed(Exception):
    """A command did not end well."""


class OutOfMemory(Failed):
    """It has ended with OUT_OF_MEMORY."""


OUT_OF_MEMORY = 9  # exit status by which the scripts of gpu.py say so


def measure(command: list[str], env: dict[str, str], output_dir: Path) -> Run:
    """Run `command`, which trains into `output_dir`.

    Raises:
      Failed: it did not exit with 0, or logged nothing; with the end of what it printed.
    """
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    log, console = output_dir / "trainer_log.jsonl", output_dir.with_suffix(".txt")
    busy, own, started = busy_seconds(), _children_seconds(), time.monotonic()
    with console.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        lines = _watch(process, log)
    wall = time.monotonic() - started
    if process.returncode == 0 and lines:
        others = (busy_seconds() - busy - (_children_seconds() - own)) / wall
        return _per_update(lines, started, wall, max(0.0, others))
    if process.returncode == OUT_OF_MEMORY:
        raise OutOfMemory(console)
    tail = "\n".join(console.read_text(errors="replace").splitlines()[-15:])
    raise Failed(f"{' '.join(command)}\nexit status {process.returncode}; the end of {console}:\n{tail}")


def _watch(process: subprocess.Popen, log: Path) -> list[tuple[float, float, str]]:
    """(when it was seen, CPU seconds of the process by then, line) for each line of the log, until the process ends."""
    lines: list[tuple[float, float, str]] = []
    file, partial, running = None, "", True
    while running:
        running = process.poll() is None  # asked before the file is read: what was written last is still seen
        if file is None and log.exists():
            file = log.open()
        new = file.read() if file else ""
        if new:
            now, cpu = time.monotonic(), _cpu_seconds(process.pid)
            *whole, partial = (partial + new).split("\n")
            lines += [(now, cpu, line) for line in whole]
        time.sleep(WATCH)
    if file:
        file.close()
    return lines


def _per_update(lines: list[tuple[float, float, str]], started: float, wall: float, others: float) -> Run:
    run = Run({}, {}, {}, {}, wall, others)
    last_time, last_cpu, last_tokens = started, 0.0, 0
    for when, cpu, line in lines:
        record = json.loads(line)
        if record.get("loss") is None:  # the line that ends a run
            continue
        step = record["current_steps"]
        run.seconds[step], run.cpu_seconds[step] = when - last_time, cpu - last_cpu
        run.losses[step] = record["loss"]
        if "total_tokens" in record:
            run.tokens[step] = record["total_tokens"] - last_tokens
            last_tokens = record["total_tokens"]
        last_time, last_cpu = when, cpu
    return run


def _cpu_seconds(pid: int) -> float:
    """CPU seconds of all threads of a process; not a number where /proc does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
