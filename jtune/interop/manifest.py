"""`jtune.json`: what a model was made from and with. It lies in the folder of every model that jtune writes.

`run.json` of a run says which run an output folder belongs to and whether it has finished; it changes while the run
goes on. `jtune.json` belongs to the model beside it, goes where that goes, and is written once.
"""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jtune import __version__
from jtune.config import Config
from jtune.config.run_folder import MANIFEST
from jtune.files import atomic_write
from jtune.secrets import redact, words_to_show

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "transformers", "tokenizers", "datasets", "numpy")
# Of a run's identity: digests that were computed anyway.
FINGERPRINTS = ("data", "frozen weights", "base weights", "value head")


def describe(config: Config, base: Path, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of `jtune.json`. It holds no time and no secret: the same run gives the same file.

    Args:
      base: the folder of the model that it was made from.
      identity: of the run, if it was trained (see `run.json`).
    """
    device = jax.devices()[0]
    arguments = config.to_dict()
    return {
        "versions": versions(),
        "devices": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "command": command_line(),
        "stage": config.finetuning.stage,
        "finetuning_type": config.finetuning.finetuning_type,
        "template": config.data.template,
        "base": {
            "model_name_or_path": config.model.model_name_or_path,
            "model_revision": config.model.model_revision,
            **fingerprint_files(base),
        },
        "adapters": list(config.model.adapter_name_or_path),
        "fingerprints": {name: identity[name] for name in FINGERPRINTS if name in identity} if identity else {},
        "arguments": arguments,
    }


def versions() -> dict[str, str]:
    """Of Python, jtune, and what it computes, reads and tokenises with."""
    found = {"python": platform.python_version(), "jtune": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def command_line() -> str | None:
    """The command of this process without its secrets; None where Python code called jtune."""
    if Path(sys.argv[0]).name != "jtune" and Path(sys.argv[0]).parts[-3:] != ("jtune", "cli", "main.py"):
        return None
    return shlex.join(["jtune", *words_to_show(sys.argv[1:])[0]])


def fingerprint_files(folder: Path) -> dict[str, Any]:
    """A cheap identity of a model: the commit, if it is the hub's, the digest of config.json, and the bytes of each
    weight file. Gigabytes are not read again for it.
    """
    config = folder / "config.json"
    return {
        "commit": folder.name if folder.parent.name == "snapshots" else None,
        "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
        "weight_bytes": {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))},
    }


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `jtune.json`, whole or not at all."""
    text = redact(json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False))
    with atomic_write(folder / MANIFEST) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
