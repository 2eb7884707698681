"""One cell of gpu.py on jtune's side: a whole `jtune train`, in this process, so that it can be asked for its memory.

    python gpu_jtune.py CASE.yaml ROWS_FOLDER RESULT.json

The rows of each update are left in ROWS_FOLDER, for the other side to train on the same.
"""

import json
import logging
import sys
from pathlib import Path

import jax
import numpy as np

from jtune.commands.train import train
from jtune.config import load_config
from jtune.data.batching.train import BatchPlan

OUT_OF_MEMORY = 9  # see measure.py


def keep_rows(folder: Path) -> None:
    """From now on, leave a copy of every update's arrays in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    update = BatchPlan.update

    def kept(self, step, *args, **kwargs):
        arrays = update(self, step, *args, **kwargs)
        np.savez(folder / f"{step}.npz", **arrays)
        return arrays

    BatchPlan.update = kept


def main(case: str, rows: str, result: str) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name.endswith("backend_compile_duration") else None
    )
    keep_rows(Path(rows))
    try:
        train(load_config([case], command="train"))
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return OUT_OF_MEMORY
    device = jax.local_devices()[0]
    memory = device.memory_stats() or {}
    found = {
        "device": device.device_kind,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "compile_seconds": sum(compiled),
    }
    Path(result).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
