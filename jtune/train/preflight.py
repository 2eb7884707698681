"""What several processes must have in common, compared before the first update: hosts that differ would wait for each
other in a collective, for ever, or train something that nobody asked for.
"""

import json
import logging
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import xxhash

from jtune import __version__
from jtune.config import Config
from jtune.data import Splits
from jtune.distributed import exchange, processes
from jtune.errors import ConfigError, DataError
from jtune.train.digest import as_read, data_fingerprint, digests, named_leaves

log = logging.getLogger("jtune")

# Arguments that may differ from host to host: where it keeps what it has fetched and made, and secrets.
OF_THE_HOST = ("cache_dir", "compile_cache_dir", "hf_hub_token", "logging_dir", "swanlab_api_key", "swanlab_logdir")
SEEN_WITHIN = 10.0  # seconds in which a network file system shows a new file to the others


def check_processes(config: Config, output_dir: Path) -> None:
    """Compare configuration, versions and devices of all processes, and see that they share the output folder.

    Raises:
      ConfigError: an argument differs. Of one process, so that it is clear where to look.
      DataError: something else does.
    """
    if processes.count() == 1:
        return
    arguments = {k: v for k, v in config.to_dict().items() if k not in OF_THE_HOST}
    differences = compare("arguments", arguments)
    if differences:
        raise ConfigError("the processes were started with different arguments:\n  " + "\n  ".join(differences))
    here = {
        "jtune": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
    }
    differences = compare("versions and devices", here)
    if differences:
        raise DataError("the hosts are not alike:\n  " + "\n  ".join(differences))
    check_shared(output_dir)


def check_data(splits: Splits) -> None:
    """Compare the encoded data of all processes.

    Raises:
      DataError: it differs.
    """
    if processes.count() == 1:
        return
    sets = {f"eval {name}".strip(): rows for name, rows in splits.eval.items()}
    sets |= {} if splits.train is None else {"train": splits.train}
    found = {name: f"{len(rows)} examples, fingerprint {data_fingerprint(rows)}" for name, rows in sets.items()}
    differences = compare("data", found)
    if differences:
        raise DataError(
            "the processes have encoded different data:\n  " + "\n  ".join(differences) + "\n"
            "Do all hosts have the same files, and the same tokenizer? If so: overwrite_cache=true"
        )


def check_model_files(folders: Mapping[str, Path]) -> None:
    """Compare the weights and config.json of all processes, where hosts have copies of their own.

    Files that have the same inode and date everywhere are one file on a network file system: nothing is read. Otherwise
    the first process of each copy reads all of it once, so that the reading that follows finds it in the page cache. A
    disk that is an image of another host's looks like one file system.

    Args:
      folders: of the model and of adapters, under names for messages.

    Raises:
      DataError: a file is missing, of another size, or has another content.
    """
    if processes.count() == 1:
        return
    files = {name: path for role, folder in folders.items() for name, path in _model_files(role, folder)}
    stats = {name: path.stat() for name, path in files.items()}
    sizes = {name: f"{stat.st_size} bytes" for name, stat in stats.items()}
    same = exchange.all_gather("model files", json.dumps([[n, s.st_ino, s.st_mtime_ns] for n, s in stats.items()]))
    found = compare("sizes of model files", sizes)
    if not found and len(set(same)) > 1:
        total = sum(stat.st_size for stat in stats.values())
        log.info("comparing %.1f GB of weights, of which hosts have copies of their own", total / 1e9)
        mine: list[str] = []
        with exchange.working():
            if same.index(same[processes.index()]) == processes.index():
                with ThreadPoolExecutor(4) as pool:
                    mine = list(pool.map(file_digest, files.values()))
        read = [json.loads(x) for x in exchange.all_gather("digests of model files", json.dumps(mine))]
        by_process = [read[same.index(copy)] for copy in same]
        found = differences([dict(zip(files, x)) for x in by_process])
    if found:
        raise DataError(
            "the processes have different model files:\n  " + "\n  ".join(found) + "\n"
            "Copy the model again to the host that differs."
        )


def _model_files(role: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Names that are the same on every host, wherever it keeps its cache."""
    patterns = ("*.safetensors", "config.json", "adapter_config.json")
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        yield f"{role}: {path.name}", path


def file_digest(path: Path) -> str:
    """128-bit digest of a file's content."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def check_weights(params: Any) -> None:
    """Compare what the devices of all processes hold after reading: copies of one array must be equal.

    An array that is split over processes has no copy to compare with; `check_model_files` saw its file.

    Raises:
      DataError: an array of one process has another digest than its copy elsewhere.
    """
    if processes.count() == 1:
        return
    found = compare("weights", digests(named_leaves(as_read(params))))
    if found:
        raise DataError(
            "the processes hold different weights:\n  " + "\n  ".join(found[:8]) + "\n"
            "The files are the same: look at the memory and the disk of the host that differs."
        )


def check_shared(folder: Path) -> None:
    """See that all processes have the same folder under this name.

    Raises:
      DataError: some do not see what process 0 has written there.
    """
    nonce = exchange.from_first("probe", lambda: os.urandom(8).hex())
    probe = folder / f".probe-{nonce}"
    if processes.is_first():
        probe.write_text(nonce)
    exchange.barrier("probe written")
    end = time.monotonic() + SEEN_WITHIN
    while not probe.exists() and time.monotonic() < end:
        time.sleep(0.2)
    blind = [str(i) for i, seen in enumerate(exchange.all_gather("probe seen", str(probe.exists()))) if seen != "True"]
    if processes.is_first():
        probe.unlink(missing_ok=True)
    if blind:
        raise DataError(
            f"output_dir: process {', '.join(blind)} does not see what process 0 has written in {folder.absolute()}. "
            "It must be one folder for all, on a network file system (NFS, Lustre, Filestore), under the same path."
        )


def compare(what: str, mine: dict[str, Any]) -> list[str]:
    """What of `mine` is not the same in all processes: one line for each, which names those who are alone with it.

    Digests go first, so that nothing large is sent in the usual case.
    """
    text = json.dumps(mine, sort_keys=True, default=str)
    if len(set(exchange.all_gather(f"digest of {what}", xxhash.xxh3_64_hexdigest(text.encode())))) == 1:
        return []
    return differences([json.loads(x) for x in exchange.all_gather(what, text)])


def differences(found: list[dict[str, Any]]) -> list[str]:
    """One line for each key whose values are not all equal. The larger group, or else that of process 0, is right.

    >>> differences([{"jax": "0.10.2", "a": 1}, {"jax": "0.10.1", "a": 1}, {"jax": "0.10.2", "a": 1}])
    ['jax: process 1 has 0.10.1, the others have 0.10.2']
    """
    lines = []
    for key in dict.fromkeys(key for values in found for key in values):
        groups: dict[str, list[int]] = defaultdict(list)
        for process, values in enumerate(found):
            groups[str(values.get(key))].append(process)
        if len(groups) > 1:
            usual = max(groups, key=lambda value: len(groups[value]))  # the first of equals
            odd = [f"process {', '.join(map(str, who))} has {value}" for value, who in groups.items() if value != usual]
            others = "process 0 has" if groups[usual] == [0] else "the others have"
            lines.append(f"{key}: {'; '.join(odd)}, {others} {usual}")
    return lines
