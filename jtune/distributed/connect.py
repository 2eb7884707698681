"""Connect the processes of a run."""

import importlib.util
import logging
import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from jtune.distributed import shutdown
from jtune.distributed.command import add_words, how_to_go_on, remember_command
from jtune.distributed.processes import count, index, is_first
from jtune.errors import ConfigError, DataError, PeerLost

PORT = 29500  # default port of the coordinator, as in torchrun


class Address(NamedTuple):
    """The place of a process in its run."""

    coordinator: str  # host:port that process 0 listens on
    processes: int
    process: int


def find_address(env: Mapping[str, str]) -> Address | None:
    """The address in the environment, in jtune's or LLaMA-Factory's variables; None: no address, or only one process.

    >>> find_address({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"})
    Address(coordinator='10.0.0.1:29500', processes=2, process=1)

    Raises:
      ConfigError: some of the variables are missing, or are not numbers.
    """
    names = ("JTUNE_COORDINATOR", "JTUNE_NUM_PROCESSES", "JTUNE_PROCESS_ID")
    given = {name: env[name] for name in names if env.get(name)}
    if given:
        if len(given) < len(names):
            missing = ", ".join(name for name in names if name not in given)
            raise ConfigError(
                f"{', '.join(given)} is set, but not {missing}: each process of a run needs the address of process 0 "
                "(host:port), the number of processes, and its own number, counted from 0"
            )
        coordinator, count, own = given.values()
    elif env.get("NNODES", "1") != "1":
        if not env.get("MASTER_ADDR") or not env.get("NODE_RANK"):
            missing = ", ".join(name for name in ("MASTER_ADDR", "NODE_RANK") if not env.get(name))
            raise ConfigError(f"NNODES={env['NNODES']}, but {missing} is not set")
        coordinator = f"{env['MASTER_ADDR']}:{env.get('MASTER_PORT') or PORT}"
        count, own, names = env["NNODES"], env["NODE_RANK"], ("MASTER_ADDR:MASTER_PORT", "NNODES", "NODE_RANK")
    else:
        return None
    if not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise ConfigError(f"{names[0]}={coordinator}: expected host:port of process 0, as in 10.0.0.1:{PORT}")
    for name, value in zip(names[1:], (count, own)):
        if not value.isdecimal():
            raise ConfigError(f"{name}={value}: expected a whole number")
    if int(own) >= int(count):
        raise ConfigError(f"{names[2]}={own}: the numbers of {count} processes are 0 to {int(count) - 1}")
    return Address(coordinator, int(count), int(own)) if int(count) > 1 else None


def in_cluster(env: Mapping[str, str]) -> bool:
    """Whether jax finds the other processes itself: on a TPU pod, in SLURM, in an indexed Kubernetes job, under MPI.

    Without a sign of one of these, jax is not imported, so one process on one machine starts at once.
    """
    signs = {"SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "OMPI_MCA_ess_base_jobid", "JOB_COMPLETION_INDEX"}
    if not signs & env.keys() and importlib.util.find_spec("libtpu") is None:
        return False
    from jax._src.clusters import ClusterEnv

    for kind in ClusterEnv._cluster_types:
        if "K8s" in kind.__name__ and "JOB_COMPLETION_INDEX" not in env:
            continue  # a single pod: jax would look for its job, and fail
        if not kind.opt_in_only_method and kind.is_env_present():
            return kind.get_process_count() > 1
    return False


def own_gpus(env: Mapping[str, str]) -> list[int] | None:
    """The GPUs of its host that a SLURM task takes: all, if it is alone on the host (jax would take only the first).

    >>> own_gpus({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "2"})
    [0, 1]

    None: jax decides, one GPU for each task.
    """
    alone = re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if alone and gpus.isdecimal() else None


def connect(
    address: Address | None = None,
    *,
    command: str = "",
    without: Iterable[str] = (),
    wait: int | None = None,
    lost: int | None = None,
):
    """Join the other processes, if there are any. Call it once, before anything asks jax for its devices.

    Args:
      address: default: that of the environment (`find_address`), or the one that jax finds (`in_cluster`).
      command: the command that was typed, for messages about how to resume.
      without: names of the secret arguments that `command` lacks.
      wait: seconds to wait for the other processes; default: JTUNE_INIT_TIMEOUT, or 300.
      lost: seconds without a heartbeat after which a process counts as lost; default: JTUNE_HEARTBEAT_TIMEOUT, or 60.

    Raises:
      ConfigError: the address is not valid.
      DataError: the processes cannot connect at it.
    """
    remember_command(command, without)
    address = address or find_address(os.environ)
    if address is None and not in_cluster(os.environ):
        return
    import jax

    wait = wait or int(os.environ.get("JTUNE_INIT_TIMEOUT", 300))
    lost = lost or int(os.environ.get("JTUNE_HEARTBEAT_TIMEOUT", 60))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM itself; see `agreement`
    where: dict[str, Any] = {"local_device_ids": own_gpus(os.environ)} if address is None else {}
    if address is not None:
        where = {
            "coordinator_address": address.coordinator,
            "num_processes": address.processes,
            "process_id": address.process,
            "cluster_detection_method": "deactivate",
        }
        host = address.coordinator.rsplit(":", 1)[0]
        if host in ("127.0.0.1", "localhost"):  # the coordinator asks for no password: keep it local
            where["coordinator_bind_address"] = address.coordinator
    who = f"process {address.process} of {address.processes}" if address else "a process of this cluster"
    at = address.coordinator if address else "the address of the cluster"
    shutdown.on_abort(
        f"{who} waited {wait} s for the others at {at}, and some did not connect. Does the command run on every host, "
        "with the same address and number of processes, and can all hosts reach this port? JTUNE_INIT_TIMEOUT sets the "
        "seconds to wait",
        DataError.exit_code,
    )
    try:
        jax.distributed.initialize(
            **where, initialization_timeout=wait, heartbeat_timeout_seconds=lost, shutdown_timeout_seconds=60
        )
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{who} could not join the others at {at}: {str(error).splitlines()[0]}") from error
    _expect_abort()


def _expect_abort() -> None:
    shutdown.on_abort(
        f"jax aborted process {index()} of {count()}, most often because another process has died (see above).\n"
        + how_to_go_on(),
        PeerLost.exit_code,
    )


def go_on_with(*words: str) -> None:
    """From now on, messages name `words` as also needed to resume: this run has taken over its output folder."""
    add_words(*words)
    if count() > 1:
        _expect_abort()


def quiet(logger: logging.Logger) -> None:
    """On all processes but the first, log only warnings, each with the number of the process."""
    if is_first():
        return
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        handler.setFormatter(_Numbered(handler.formatter, index()))


class _Numbered(logging.Formatter):
    def __init__(self, inner: logging.Formatter | None, process: int):
        super().__init__()
        self.format = partial(self._numbered, inner or logging.Formatter("%(message)s"), process)

    @staticmethod
    def _numbered(inner: logging.Formatter, process: int, record: logging.LogRecord) -> str:
        return "\n".join(f"[process {process}] {line}" for line in inner.format(record).splitlines())
