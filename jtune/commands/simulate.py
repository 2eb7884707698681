"""`jtune train CASE.yaml --simulate 2x4`: the processes of a cluster on this machine, with CPU devices.

Only the network differs from real hosts. Try a YAML or a mesh before renting hosts; kill one of the processes to see
what happens when a host dies.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jtune.errors import ConfigError, PeerLost, Preempted

# On few cores one device may reach a collective long after the others. XLA aborts after 40 s by default.
PATIENCE = {"xla_cpu_collective_call_terminate_timeout_seconds": 300, "xla_cpu_collective_timeout_seconds": 300}


def simulate(layout: str, argv: Sequence[str]) -> int:
    """Start the processes, wait for all, and return the most telling exit status (see `worst`).

    Args:
      layout: PROCESSESxDEVICES, devices of each process.
      argv: the words after `jtune train`.

    Raises:
      ConfigError: the layout makes no sense.
    """
    processes, devices = parse(layout)
    command = [sys.executable, "-m", "jtune.cli.main", "train", *argv]
    port = free_port()
    print(f"simulating {processes} processes of {devices} devices each on this machine", flush=True)
    children: list[subprocess.Popen] = []

    def forward(signum, frame):
        for child in children:
            child.send_signal(signum)

    before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        for process in range(processes):
            # Each in its own session: Ctrl-C reaches it once, through `forward`, and not from the terminal as well.
            output: dict[str, Any] = {} if process == 0 else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            env = environment(os.environ, port, processes, devices, process) | {"JTUNE_SIMULATED": layout}
            children.append(subprocess.Popen(command, env=env, start_new_session=True, **output))
        readers = [
            threading.Thread(target=pass_on, args=(child.stdout, process), daemon=True)
            for process, child in enumerate(children)
            if child.stdout is not None
        ]
        for reader in readers:
            reader.start()
        codes = [child.wait() for child in children]
        for reader in readers:
            reader.join(5)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for s, handler in before.items():
            signal.signal(s, handler)
    if any(codes):
        print(f"exit statuses of the processes: {', '.join(map(str, codes))}", file=sys.stderr, flush=True)
    return worst(codes)


def parse(layout: str) -> tuple[int, int]:
    """Processes, and devices of each.

    >>> parse("2x4")
    (2, 4)
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", layout)
    if match is None:
        raise ConfigError(f"--simulate {layout}: expected PROCESSESxDEVICES, devices of each process, as in 2x4")
    return int(match[1]), int(match[2])


def environment(base: Mapping[str, str], port: int, processes: int, devices: int, process: int) -> dict[str, str]:
    """The environment of one process."""
    flags = [f for f in base.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    flags += [f"--{name}={value}" for name, value in PATIENCE.items() if not any(name in f for f in flags)]
    return {
        **base,
        "JTUNE_COORDINATOR": f"127.0.0.1:{port}",
        "JTUNE_NUM_PROCESSES": str(processes),
        "JTUNE_PROCESS_ID": str(process),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
    }


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def pass_on(stream, process: int) -> None:
    """Print the output of a process, with its number before each line."""
    for line in stream:
        text = line.decode(errors="replace").rstrip("\n")
        mark = f"[process {process}] "
        print(text if text.startswith(mark) else mark + text, file=sys.stderr, flush=True)


def worst(codes: Sequence[int]) -> int:
    """The most telling status: a cause before its consequences. A death (a negative status) counts as a lost peer.

    >>> worst([0, 0]), worst([70, -9]), worst([75, 75]), worst([3, 70]), worst([70, 2])
    (0, 70, 75, 3, 2)
    """
    lost, stopped = PeerLost.exit_code, Preempted.exit_code
    rank = {0: 0, stopped: 1, lost: 2}
    return max((lost if code < 0 else code for code in codes), key=lambda code: rank.get(code, 3))
