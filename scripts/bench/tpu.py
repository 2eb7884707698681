"""What a training step takes on TPUs, by compilation with the real TPU compiler: no TPU is needed.

    python scripts/bench/tpu.py [--only "8b full"] [--topologies v5e:4x4,v6e:8x8]

Memory is what the compiler says, beside the floor of arithmetic. Times are not measured: there is nothing to run on.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
from make import ROOT

CASES = {
    "8B lora": "plan_llama3_8b_lora.yaml",
    "8B full": "plan_llama3_8b_full.yaml",
    "70B lora": "plan_llama3_70b_lora.yaml",
}
TOPOLOGIES = "v5e:4x4,v5p:4x4x4,v6e:8x8"
GIB = 2**30
HEAD = (
    "| run | topology | batch | remat | kept | floor | temporaries | peak | usable | above the floor | TFLOP/chip "
    "| s at 40% | compiled in |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words of the runs to compile, such as '8b full'")
    parser.add_argument("--topologies", default=TOPOLOGIES, help=f"with commas (default {TOPOLOGIES})")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "benchmarks.md", help="what is appended to")
    args = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        print("the TPU compiler is not here, nothing is measured: pip install -e '.[tpu]'")
        return 0
    rows = []
    for name, config in CASES.items():
        if not all(word.lower() in name.lower().split() for word in args.only.split()):
            continue
        for topology in args.topologies.split(","):
            rows.append(row(name, topology, plan(config, topology)))
            print(rows[-1], flush=True)
    text = "\n".join(
        [
            f"## TPU, by compilation, {time.strftime('%Y-%m-%d')}",
            "",
            f"- versions: {machine.versions(('jtune-llm', 'jax', 'jaxlib', 'libtpu'))}",
            "- of one device, in GiB; `kept`: parameters, adapters, optimizer state; `floor`: these and the inputs of "
            "layers; random tokens, all labelled, rows of 4,096, one a chip",
            "",
            HEAD,
            *rows,
            "",
        ]
    )
    if rows:
        with args.report.open("a") as file:
            file.write("\n" + text)
        print(f"appended to {args.report}")
    return 0


def plan(config: str, topology: str) -> dict[str, Any]:
    """What `jtune plan --json` says; or `{"error": ...}`."""
    words = ["plan", str(ROOT / "configs" / config), "--topology", topology, "--json"]
    command = [sys.executable, "-m", "jtune.cli.main", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1][:200]}
    return json.loads(done.stdout)


def row(name: str, topology: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"| {name} | {topology} | {found['error']} |" + " |" * 10
    sizes = found["per_device_bytes"]
    kept, floor = sum(sizes["by_kind"].values()), found["floor_bytes"]
    gib = lambda x: f"{x / GIB:.2f}"
    fits = "" if found["fits"] else ", does not fit"
    return (
        f"| {name} | {topology} | {found['batch']['shape']} | {found['remat']} | {gib(kept)} | {gib(floor)} "
        f"| {gib(sizes['temporaries'])} | {gib(sizes['peak'])}{fits} | {gib(found['usable_memory_bytes'])} "
        f"| {sizes['peak'] / floor - 1:+.0%} | {found['flops_per_step'] / found['devices'] / 1e12:,.1f} "
        f"| {found['seconds_per_step']:.2f} | {found['compile_seconds']:.0f} s |"
    )


if __name__ == "__main__":
    sys.exit(main())
