"""The memory of the train step, as the compiler has it: compiled ahead of time, for shapes, and kept on disk."""

import hashlib
import json
import logging
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import jtune
from jtune.config import Config
from jtune.distributed import processes
from jtune.losses.objective import objective_of, step_key
from jtune.planning.shapes import Shapes, batch_shapes, bytes_by_kind
from jtune.train import program
from jtune.train.optimizer import optimizer_settings
from jtune.train.program import rounding_key_of
from jtune.tuning.unstack import unstack_layers

log = logging.getLogger("jtune")


def measure(config: Config, shapes: Shapes, shape: tuple[int, int, int], capacity: int, target: str) -> dict[str, Any]:
    """Compile the step for a shape of batch; what one device holds while it runs, in bytes.

    Kept on disk: the same step for the same devices is not compiled again. Several processes compile together, and what
    one of them has kept the others may not have.
    """
    training = config.training
    assert isinstance(shapes.mesh, Mesh)
    settings = (training.max_grad_norm, *optimizer_settings(training, config.finetuning))
    objective = objective_of(config.finetuning, training)
    loss = (objective.name, objective.noise_alpha)
    frozen = unstack_layers(shapes.frozen, shapes.module)
    step = (shapes.module, settings, loss, _described(shapes.state), _described(frozen))
    key = fingerprint(step, jax.tree.structure(shapes.params), dict(shapes.mesh.shape), shape, capacity, target)
    root = Path(training.compile_cache_dir) if training.compile_cache_dir else Path.home() / ".cache" / "jtune"
    path = root / "plans" / f"{key}.json"
    if processes.count() == 1:
        try:
            return json.loads(path.read_text()) | {"cached": True}
        except (OSError, ValueError):
            pass
    log.info("compiling the step for [accum, batch, seq] = %s on %d x %s", list(shape), shapes.mesh.size, target)
    began = time.monotonic()
    batch = batch_shapes(shape, shapes.mesh)
    # A kernel in Pallas asks what GPU it is for, which otherwise is the one that is here.
    with jax.sharding.use_abstract_mesh(shapes.mesh.abstract_mesh):
        lowered = program.lower_step(
            shapes.module,
            shapes.tx,
            shapes.state,
            frozen,
            batch,
            shapes.mesh,
            label_capacity=capacity,
            max_grad_norm=training.max_grad_norm,
            dropout_key=step_key(objective, shapes.params, training.seed),
            rounding_key=rounding_key_of(training, config.finetuning),
            objective=objective,
        )
    try:
        found = _sizes(lowered.compile().memory_analysis())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = refused(str(error), sum(bytes_by_kind(shapes, batch).values()))
    found["seconds"] = round(time.monotonic() - began, 2)
    if processes.is_first():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(path)
    return found | {"cached": False}


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
    """What is known of a program that the compiler gave up on, as it needs more memory than the device has.

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
    """Everything about a tree of shapes that a compiled program depends on."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), x.shape, x.dtype.name, str(x.sharding.spec)) for path, x in leaves]


def fingerprint(*parts: Any) -> str:
    """A digest of `parts`, of the versions of everything that compiles, and of jtune's own code."""
    digest = hashlib.sha256(repr(parts).encode())
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        try:
            digest.update(f"{name} {version(name)}".encode())
        except PackageNotFoundError:
            digest.update(name.encode())
    root = Path(jtune.__file__).parent
    for folder in ("models", "tuning", "losses", "train", "sharding"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
