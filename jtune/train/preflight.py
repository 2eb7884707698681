"""What several processes must have in common, compared before any weight is read: hosts that differ would wait for
each other in a collective, for ever, or train something that nobody asked for.
"""

import json
import os
import platform
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import xxhash

from jtune.config import Config
from jtune.data import Splits
from jtune.errors import ConfigError, DataError
from jtune.sharding import hosts
from jtune.train.build import data_fingerprint

# Arguments that may differ from host to host: where it keeps what it has fetched and made, and secrets.
OF_THE_HOST = ("cache_dir", "compile_cache_dir", "hf_hub_token", "logging_dir")
SEEN_WITHIN = 10.0  # seconds in which a network file system shows a new file to the others


def check_processes(config: Config, output_dir: Path) -> None:
    """Compare configuration, versions and devices of all processes, and see that they share the output folder.

    Raises:
      ConfigError: an argument differs. Of one process, so that it is clear where to look.
      DataError: something else does.
    """
    if hosts.count() == 1:
        return
    arguments = {k: v for k, v in config.to_dict().items() if k not in OF_THE_HOST}
    differences = compare("arguments", arguments)
    if differences:
        raise ConfigError("the processes were started with different arguments:\n  " + "\n  ".join(differences))
    here = {
        "jtune": version("jtune"),
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
    if hosts.count() == 1:
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


def check_shared(folder: Path) -> None:
    """See that all processes have the same folder under this name.

    Raises:
      DataError: some do not see what process 0 has written there.
    """
    nonce = hosts.from_first("probe", lambda: os.urandom(8).hex())
    probe = folder / f".probe-{nonce}"
    if hosts.is_first():
        probe.write_text(nonce)
    hosts.barrier("probe written")
    end = time.monotonic() + SEEN_WITHIN
    while not probe.exists() and time.monotonic() < end:
        time.sleep(0.2)
    blind = [str(i) for i, seen in enumerate(hosts.exchange("probe seen", str(probe.exists()))) if seen != "True"]
    if hosts.is_first():
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
    if len(set(hosts.exchange(f"digest of {what}", xxhash.xxh3_64_hexdigest(text.encode())))) == 1:
        return []
    return differences([json.loads(x) for x in hosts.exchange(what, text)])


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
