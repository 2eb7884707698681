"""One side of data.py: jtune reads, encodes and packs the training set of a YAML, then seeks; its figures, as JSON."""

import json
import sys
import threading
import time
from pathlib import Path


def anonymous_mib(pid: str = "self") -> float:
    """Memory of a process and of those it started that is no file's, in MiB: what a machine must have."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        own = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    except (OSError, StopIteration):
        return 0.0
    return own + sum(map(anonymous_mib, children.split()))


def watch(peak: list[float]) -> None:
    while True:
        peak[0] = max(peak[0], anonymous_mib())
        time.sleep(0.05)


def main(words: list[str]) -> None:
    from jtune.commands.data import encode_sets
    from jtune.config import load_config
    from jtune.data import load_tokenizer, plan_updates

    config = load_config(words, command="data")
    load_tokenizer(config.model.model_name_or_path)  # imports what it needs
    imported = anonymous_mib()
    peak = [imported]
    threading.Thread(target=watch, args=(peak,), daemon=True).start()
    began = time.perf_counter()
    _, splits = encode_sets(config)
    encoded = splits.train
    assert encoded is not None
    at_encoded = time.perf_counter()
    plan = plan_updates(config, encoded, 1)
    at_packed = time.perf_counter()
    plan.update(plan.max_steps // 2)
    sought = time.perf_counter()
    plan.update(plan.max_steps // 2 + 1)
    print(
        json.dumps(
            {
                "rows": len(encoded),
                "tokens": int(encoded.lengths.sum(dtype="int64")),
                "seconds": at_packed - began,
                "encode": at_encoded - began,
                "pack": at_packed - at_encoded,
                "seek": sought - at_packed,
                "next": time.perf_counter() - sought,
                "waste": plan.padding_share,
                "imported": imported,
                "peak": max(peak[0], anonymous_mib()),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
