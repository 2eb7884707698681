"""The sums of a reference on disk: neither a resumed run nor another one runs the same model over the same rows."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from jtune.config import Config
from jtune.data import UnitSet
from jtune.distributed import exchange, processes
from jtune.evaluation.units import Reference
from jtune.files import atomic_write
from jtune.models import CausalLM
from jtune.train.digest import fingerprint

log = logging.getLogger("jtune")


def folder_of(config: Config) -> Path:
    """Where the sums of references are kept."""
    folder = config.training.compile_cache_dir
    return (Path(folder) if folder else Path.home() / ".cache" / "jtune") / "references"


def key_of(module: CausalLM, weights: str, units: UnitSet) -> str:
    """A name for the sums of a model over a set: of everything that they depend on but how rows are laid out, and the
    mesh, which change their last digits.

    Args:
      weights: the digest of its parameters.
    """
    of_model = module.config, module.dtype.name, module.attention, jax.default_backend()
    return fingerprint(weights, of_model, [content_digest(x) for x in (units, units.mismatched) if x is not None])


def content_digest(units: UnitSet) -> str:
    """A digest of all tokens of a set, with what counts of them."""
    content = xxhash.xxh3_128()
    for index in range(len(units)):
        for segment in units.segments(index):
            for name in sorted(segment):
                values = np.ascontiguousarray(segment[name])
                content.update(f"{name} {len(values)} ".encode())
                content.update(values.data)
    return content.hexdigest()


def kept(config: Config, name: str, key: str, units: UnitSet, compute: Callable[[], Reference]) -> Reference:
    """What `compute()` gives, from the disk if it is there under `key`.

    Several processes read it if all of them have the same, and else all of them compute it; the first writes.

    Args:
      name: of the set, for the log.
    """
    path = folder_of(config) / f"{key}.npz"
    found = None if config.data.overwrite_cache else read(path, units)
    digest = (
        "none" if found is None else xxhash.xxh3_128_hexdigest(b"".join(x.tobytes() for x in found if x is not None))
    )
    everywhere = set(exchange.all_gather("sums of the reference", digest))
    if found is not None and len(everywhere) == 1:
        log.info("reference: log-probabilities of %d rows (%s), from %s", len(units), name, path)
        return found
    log.info("reference: log-probabilities of %d rows (%s)", len(units), name)
    made = compute()
    if processes.is_first():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.savez(file, **{field: x for field, x in made._asdict().items() if x is not None})
    return made


def read(path: Path, units: UnitSet) -> Reference | None:
    """The sums in a file; None if it is not there, or does not hold them whole."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = Reference(file["first"], file["other"] if units.mismatched is not None else None)
    except Exception:  # of several libraries: no file, no zip archive, a wrong checksum, an array that is not there
        return None
    fits = lambda x, units: x.dtype == np.float32 and x.shape == (*units.counts.shape, 2) and np.isfinite(x).all()
    pairs: list[tuple[Any, UnitSet | None]] = [(found.first, units), (found.other, units.mismatched)]
    return found if all(units is None or fits(x, units) for x, units in pairs) else None
