"""Memory and time of reading a checkpoint of several files onto virtual CPU devices.

    python scripts/bench/load.py [--layers 32] [--devices 8,1] [--work FOLDER] [--keep]

The checkpoint has the shape of Llama-3.1-8B, or as many of its layers as are asked for, and random weights. It is
written a tensor at a time, dropped from the page cache, and read in a process of its own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import machine
import numpy as np
from cpu import append, commit
from make import ROOT
from shapes import SHAPES

REPORT = ROOT / "docs" / "benchmarks.md"
GB = 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of the 32 that Llama-3.1-8B has")
    parser.add_argument("--devices", default="8", help="numbers of devices, each a line of the table (default 8)")
    parser.add_argument("--shard-gb", type=float, default=2.0, help="of one file (default 2)")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench-load", help="where it is written")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there, for the next time")
    parser.add_argument("--report", type=Path, default=REPORT, help="what the table is appended to")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # the process that reads
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(args.read)))
        return 0
    noise, folder = machine.noise(), args.work.resolve() / f"layers-{args.layers}"
    if not (folder / "config.json").exists():
        write(folder, SHAPES["Llama-3.1-8B"] | {"num_hidden_layers": args.layers}, args.shard_gb)
    runs = {int(count): measured(folder, int(count)) for count in args.devices.split(",")}
    if not args.keep:
        shutil.rmtree(folder)
    text = report(args.layers, runs, noise)
    print("\n" + text)
    append(text, args.report)
    return 0


# ---------------------------------------------------------------------- the checkpoint


def write(folder: Path, config: dict, shard_gb: float) -> None:
    import jax

    from jtune.interop.weights import write_weights
    from jtune.models import abstract_params
    from jtune.models.families import decoder_config
    from jtune.models.names import located, tensors

    decoder = decoder_config(config)
    shapes = {}
    for keys, leaf, layers in located(abstract_params(decoder)):
        for part in tensors(keys, decoder, layers):
            shape = leaf.shape[len(part.index) :]
            shapes[part.name] = shape[::-1] if part.transposed else shape
    # A layer's tensors lie together, as they do in published checkpoints.
    order = sorted(shapes, key=lambda name: (name.split(".")[2].zfill(3) if ".layers." in name else name, name))
    shapes = {name: shapes[name] for name in order}
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    bfloat16 = jax.numpy.dtype("bfloat16")
    write_weights(folder, shapes, bfloat16, drawn(shapes, bfloat16), int(shard_gb * GB))
    (folder / "config.json").write_text(json.dumps(config))
    print(f"{folder}: {size_of(folder) / GB:.2f} GB in {time.monotonic() - started:.0f} s", flush=True)


def drawn(shapes: dict, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Random bfloat16 between 2^-7 and 2^-6, of either sign: bits are drawn, which is fast, but for the exponent."""
    rng = np.random.default_rng(0)
    for shape in shapes.values():
        bits = rng.integers(0, 2**16, shape, np.uint16)
        yield ((bits & 0x807F) | 0x3C00).view(dtype)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# ---------------------------------------------------------------------- reading it


def measured(folder: Path, devices: int) -> dict:
    """What `read` prints, in a process of its own; the files come from the disk, not from the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, __file__, "--read", str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{devices} devices: {found}", flush=True)
    return found


def read(folder: Path) -> dict:
    """Load it, split over all devices. Bytes are of the process: `*_before` when all is imported, then the peaks."""
    import jax

    from jtune.interop import hf
    from jtune.models import abstract_params, logical_axes
    from jtune.models.families import decoder_config
    from jtune.sharding import make_mesh, tree_shardings

    decoder = decoder_config(hf.read_config(folder))
    shardings = tree_shardings(logical_axes(decoder), abstract_params(decoder), make_mesh())
    jax.block_until_ready(jax.numpy.zeros(()))
    peaks, before, over = {}, status(), threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            for key, value in status().items():
                peaks[key] = max(peaks.get(key, 0), value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    params = jax.block_until_ready(hf.load_params(folder, decoder, shardings=shardings))
    seconds = time.monotonic() - started
    over.set()
    watcher.join()
    return {
        "files": size_of(folder),
        "params": sum(x.nbytes for x in jax.tree.leaves(params)),
        "seconds": seconds,
        **{key: peaks[key] - before[key] for key in ("RssAnon", "VmRSS")},
        "VmHWM": status()["VmHWM"] - before["VmRSS"],
    }


def status() -> dict[str, int]:
    """Bytes: RssAnon is memory that is no file's, VmRSS counts the mapped pages of files too, VmHWM is its peak."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {row[0][:-1]: int(row[1]) * 1024 for row in lines if row[0] in ("RssAnon:", "VmRSS:", "VmHWM:")}


def report(layers: int, runs: dict[int, dict], noise: str | None) -> str:
    head = [
        f"## Loading, {time.strftime('%Y-%m-%d')}",
        "",
        f"- machine: {machine.describe()}",
        f"- versions: {machine.versions(('jtune-llm', 'jax', 'numpy', 'safetensors'))}, commit {commit()}",
        f"- {layers} of the 32 layers of Llama-3.1-8B in bfloat16, random weights, files of 2 GB, not in the page "
        "cache; memory above what the process had before and above the parameters, which are in the same memory",
        *([f"- **not sound**: {noise}"] if noise else []),
        "",
        "| devices | files, GB | parameters, GB | peak above: no file's (RssAnon) | all (VmHWM) | of the files' size "
        "| s | GB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for devices, run in runs.items():
        anon, everything = run["RssAnon"] - run["params"], run["VmHWM"] - run["params"]
        head.append(
            f"| {devices} | {run['files'] / GB:.2f} | {run['params'] / GB:.2f} | {anon / GB:.2f} GB "
            f"| {everything / GB:.2f} GB | {everything / run['files']:.1%} | {run['seconds']:.1f} "
            f"| {run['files'] / GB / run['seconds']:.2f} |"
        )
    return "\n".join(head) + "\n"


if __name__ == "__main__":
    sys.exit(main())
