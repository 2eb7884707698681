"""The memory of the train step by the compiler: compiled ahead of time, for shapes; the result is kept on disk."""

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jtune.config import Config
from jtune.data import Sizes
from jtune.distributed import processes
from jtune.files import atomic_write
from jtune.planning.shapes import batch_shapes, bytes_by_kind
from jtune.train import program as train_program
from jtune.train.digest import fingerprint
from jtune.train.optimizer import optimizer_settings
from jtune.train.program import Program, unstacked

log = logging.getLogger("jtune")


def measure(config: Config, program: Program, shape: tuple[int, int, int], sizes: Sizes, target: str) -> dict[str, Any]:
    """Compile the step for a shape of batch, and return the bytes that one device holds while it runs.

    The result is kept on disk: the same step for the same devices is not compiled again. Several processes always
    compile, since one may have a result on its disk that the others lack.
    """
    assert isinstance(program.mesh, Mesh)
    settings = (program.max_grad_norm, *optimizer_settings(config.training, config.finetuning))
    loss = (program.objective.name, program.objective.noise_alpha)
    program = unstacked(program)
    step = (program.module, program.second, settings, loss, _described(program.state), _described(program.constants))
    key = fingerprint(step, jax.tree.structure(program.params), dict(program.mesh.shape), shape, sizes, target)
    path = plans_folder(config) / f"{key}.json"
    if processes.count() == 1:
        try:
            return json.loads(path.read_text()) | {"cached": True}
        except (OSError, ValueError):
            pass
    log.info("compiling the step for [accum, batch, seq] = %s on %d x %s", list(shape), program.mesh.size, target)
    began = time.monotonic()
    batch = batch_shapes(shape, sizes, program.mesh)
    # A Pallas kernel asks for the kind of GPU that it is compiled for; without this it finds the GPU of this machine.
    with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
        lowered = train_program.lower_step(program, batch, sizes)
    try:
        found = _sizes(lowered.compile().memory_analysis())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = refused(str(error), sum(bytes_by_kind(program, batch).values()))
    found["seconds"] = round(time.monotonic() - began, 2)
    if processes.is_first():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(found))
    return found | {"cached": False}


def plans_folder(config: Config) -> Path:
    """Where measured plans are kept."""
    folder = config.training.compile_cache_dir
    return (Path(folder) if folder else Path.home() / ".cache" / "jtune") / "plans"


def _sizes(stats: Any) -> dict[str, Any]:
    found = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "output": stats.output_size_in_bytes,
        "alias": stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    peak = sum(found.values()) - 2 * found["alias"]  # what is donated is argument and output at once
    return found | {"peak": peak, "refused": None}


def refused(message: str, arguments: int) -> dict[str, Any]:
    """The sizes of a program that the compiler refused because it needs more memory than the device has.

    >>> refused("Ran out of memory in memory space hbm. Used 29.50G of 15.75G hbm.", 2**30)["peak"] / 2**30
    29.5
    >>> refused("memory required for HLO temporaries (41.00G) exceeds available HBM (15.75G)", 2**30)["peak"] / 2**30
    42.0
    """
    sized = r"([\d.]+)([KMGT]?)"
    size = lambda m: int(float(m[1]) * 1024 ** " KMGT".index(m[2] or " "))
    needed = re.search(rf"HLO temporaries \({sized}\)", message)
    used = re.search(rf"Used {sized} of", message)
    temporaries = size(needed) if needed else max(0, size(used) - arguments) if used else 0
    said = " ".join(message.split("\n\n")[0].split())
    peak = arguments + temporaries
    known = {"arguments": arguments, "temporaries": temporaries, "peak": peak, "refused": said}
    return {"output": 0, "alias": 0, "code": 0, **known}


def _described(tree: Any) -> list[Any]:
    """All properties of a tree of shapes that a compiled program depends on."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), x.shape, x.dtype.name, str(x.sharding.spec)) for path, x in leaves]
