"""Fixtures shared by all tests: eight virtual CPU devices, tiny checkpoints, the reference data where it is present."""

import logging
import os
from importlib.metadata import version
from pathlib import Path

import pytest

# Before jax is imported anywhere: sharding is tested on eight virtual devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
XLA_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    # The devices share the cores: on a busy machine one may come to a collective long after the others, and XLA, which
    # aborts after 40 seconds of waiting, is to wait longer.
    "--xla_cpu_collective_call_terminate_timeout_seconds=200",
    "--xla_cpu_collective_timeout_seconds=200",
    # Tiny models are compiled a thousand times and run a few: without what makes programs fast, a step compiles in a
    # third of the time and a fifth of the CPU time.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones end a process that names it
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(XLA_FLAGS))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"


LOGGER = logging.getLogger("jtune")
AT_FIRST = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate


@pytest.fixture(autouse=True)
def logger_as_at_first():
    """A command sets up jtune's logger for its process; in tests it must not stay so for the next one. Not as it was
    before the test: a fixture of its module may have run a command."""
    yield
    LOGGER.handlers[:], LOGGER.propagate = AT_FIRST[0], AT_FIRST[2]
    LOGGER.setLevel(AT_FIRST[1])


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of recorded reference runs; tests that need it are skipped on a machine without it."""
    if not REFERENCE.is_dir():
        pytest.skip("the recorded reference runs are not on this machine")
    return REFERENCE


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(family)`: the folder of a tiny checkpoint that transformers wrote, made once."""
    pytest.importorskip("torch")
    import tiny

    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tiny.write(tmp_path_factory.mktemp("checkpoints") / family, family)
        return made[family]

    return of
