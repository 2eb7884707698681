"""jtune beside transformers and PEFT on one GPU: the same weights, the same packed rows, LoRA and full.

    python scripts/bench/gpu.py [--only "1B lora"] [--updates 25]
    python scripts/bench/gpu.py --dry-run        tiny models on the CPU: that it works, and that the losses agree

What is compared and how is said in scripts/bench/README.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

import machine
import numpy as np
from cpu import append, commit, largest_difference
from make import ROOT, template_of
from measure import Failed, OutOfMemory, Run, measure
from shapes import SHAPES, TINY, operations, peak_of

SKIPPED = 5  # updates that are not timed
RANK = 16


class Cell(NamedTuple):
    shape: str
    method: str  # lora, full
    rows: int  # of one update

    @property
    def name(self) -> str:
        return f"{self.shape} {self.method}"


CELLS = [
    Cell(shape, method, rows)
    for shape, rows in (("Qwen2.5-0.5B", 16), ("Llama-3.2-1B", 8), ("Llama-3.1-8B", 4))
    for method in ("lora", "full")
]
TINY_CELLS = [Cell(shape, method, 4) for shape in TINY for method in ("lora", "full")]


class Setting(NamedTuple):
    """How a side fits an update into memory: tried in this order until one does."""

    micro: int  # rows at a time
    recompute: bool

    def __str__(self) -> str:
        return f"{self.micro} rows at a time, {'layers recomputed' if self.recompute else 'nothing recomputed'}"


def settings(rows: int) -> list[Setting]:
    """From the fastest to the smallest."""
    some = max(1, rows // 4)
    return list(dict.fromkeys(Setting(m, r) for r in (False, True) for m in (rows, some, 1)))


class Result(NamedTuple):
    run: Run
    setting: Setting
    device: str
    peak_bytes: int | None
    compile_seconds: float | None
    note: str


def main() -> int:
    args = parse()
    if not args.dry_run and shutil.which("nvidia-smi") is None:
        print("no GPU here (no nvidia-smi): nothing is measured. --dry-run shows that it works, on the CPU.")
        return 0
    peer = all(find_spec(name) for name in ("torch", "peft"))
    if not peer:
        print("torch and peft are not installed: only jtune is measured")
    work = args.work.resolve()
    cells = [c for c in (TINY_CELLS if args.dry_run else CELLS) if all(word in c.name for word in args.only.split())]
    lines = []
    for cell in cells:
        folder = work / cell.name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        inputs(work, cell, environment(args))
        results = {"jtune": attempt(jtune_cell, cell, work, folder, args)}
        if peer and results["jtune"]:
            results["transformers + PEFT"] = attempt(torch_cell, cell, work, folder, args)
        lines += rows_of(cell, results, folder / "rows")
        print("\n".join(lines[-len(results) :]), flush=True)
        shutil.rmtree(folder / "out", ignore_errors=True)  # trained models are large
    text = "\n".join([*heading(args), "", *HEAD, *lines]) + "\n"
    print("\n" + text)
    if not args.dry_run:
        append(text, args.report)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU; nothing is appended")
    parser.add_argument("--only", default="", help="parts of the names of the cells to run, such as '1B lora'")
    parser.add_argument("--updates", type=int, help="updates in a run (default 25; 8 with --dry-run)")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench-gpu", help="where everything is written")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "benchmarks.md", help="appended to")
    args = parser.parse_args()
    args.updates = args.updates or (SKIPPED + 3 if args.dry_run else 25)
    if args.updates <= SKIPPED:
        parser.error(f"--updates must be above {SKIPPED}: so many are not timed")
    args.length = 256 if args.dry_run else 4096
    return args


def environment(args: argparse.Namespace) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH", "JAX_NUM_CPU_DEVICES")}
    kept |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    if args.dry_run:
        return kept | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return kept | {"CUDA_VISIBLE_DEVICES": first, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}


# ---------------------------------------------------------------------- the two sides


def inputs(work: Path, cell: Cell, env: dict[str, str]) -> None:
    """Weights, adapter and data, made once by jtune's own code; in a process of its own, which frees the GPU again."""
    model = work / "models" / cell.shape.replace(" ", "-")
    if (model.with_name(model.name + "-lora") / "adapter_config.json").exists():  # written last
        return
    code = (
        "import sys; from pathlib import Path; from make import *; from shapes import *\n"
        "name, model, data = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])\n"
        "write_tokenizer(model, reference('tokenizer'))\n"
        "write_model(model, (SHAPES | TINY)[name])\n"
        "write_rows(data, make_rows(6000, mean=170))\n"
        f"write_adapter(model.with_name(model.name + '-lora'), model, rank={RANK})\n"
    )
    command = [sys.executable, "-c", code, cell.shape, str(model), str(work / "data")]
    subprocess.run(command, check=True, env=env | {"PYTHONPATH": str(Path(__file__).parent)})


def attempt(side, cell: Cell, work: Path, folder: Path, args: argparse.Namespace) -> Result | None:
    """The first setting that fits; None if none does."""
    for setting in settings(cell.rows):
        try:
            return side(cell, setting, work, folder, args)
        except OutOfMemory:
            print(f"{cell.name}, {side.__name__}: out of memory with {setting}", flush=True)
    return None


def jtune_cell(cell: Cell, setting: Setting, work: Path, folder: Path, args: argparse.Namespace) -> Result:
    model = work / "models" / cell.shape.replace(" ", "-")
    output_dir, result = folder / "out" / "jtune", folder / "jtune.json"
    shutil.rmtree(output_dir, ignore_errors=True)
    case = {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": cell.method,
        "dataset": "rows",
        "dataset_dir": str(work / "data"),
        "template": template_of(model),
        "cutoff_len": args.length,
        "packing": True,
        "neat_packing": True,
        "per_device_train_batch_size": setting.micro,
        "gradient_accumulation_steps": cell.rows // setting.micro,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "max_steps": args.updates,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": not args.dry_run,
        "remat": "full" if setting.recompute else "none",
        "compile_cache_dir": str(folder / "compiled"),  # empty: compile seconds are those of a first run
        "output_dir": str(output_dir),
    }
    if cell.method == "lora":
        case |= {"adapter_name_or_path": f"{model}-lora", "lora_rank": RANK}
    path = write_json(folder / "case.yaml", case)  # JSON is YAML
    command = [sys.executable, script("gpu_jtune.py"), str(path), str(folder / "rows"), str(result)]
    run = measure(command, environment(args), output_dir)
    found = json.loads(result.read_text())
    return Result(run, setting, found["device"], found["peak_bytes"], found["compile_seconds"], "")


def torch_cell(cell: Cell, setting: Setting, work: Path, folder: Path, args: argparse.Namespace) -> Result:
    model = work / "models" / cell.shape.replace(" ", "-")
    output_dir, result = folder / "out" / "torch", folder / "torch.json"
    shutil.rmtree(output_dir, ignore_errors=True)
    case = {
        "model": str(model),
        "adapter": f"{model}-lora",
        "method": cell.method,
        "rows": str(folder / "rows"),
        "micro": setting.micro,
        "recompute": setting.recompute,
        "learning_rate": 1e-5,
        "updates": args.updates,
        "output_dir": str(output_dir),
        "result": str(result),
    }
    path = write_json(folder / "torch-case.json", case)
    run = measure([sys.executable, script("gpu_torch.py"), str(path)], environment(args), output_dir)
    found = json.loads(result.read_text())
    return Result(run, setting, found["device"], found["peak_bytes"], None, f"attention: {found['attention']}")


def script(name: str) -> str:
    return str(Path(__file__).with_name(name))


def write_json(path: Path, value: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))
    return path


# ---------------------------------------------------------------------- what comes out

HEAD = [
    "| cell | side | real tokens/s | MFU | ratio | peak memory | compile | first update after "
    "| largest loss difference | how it fits |",
    "|---|---|---|---|---|---|---|---|---|---|",
]


class Contents(NamedTuple):
    """What an update holds."""

    tokens: int
    labelled: int
    pairs: int  # (token, token that it sees)


def contents(rows: Path, update: int) -> Contents:
    with np.load(rows / f"{update - 1}.npz") as file:
        segment_ids = file["segment_ids"].reshape(-1, file["segment_ids"].shape[-1])
        labelled = int((file["loss_weights"] > 0).sum())
    lengths = np.concatenate([np.bincount(row)[1:] for row in segment_ids]).astype(np.int64)
    return Contents(int(lengths.sum()), labelled, int((lengths * (lengths + 1) // 2).sum()))


def rows_of(cell: Cell, results: dict[str, Result | None], rows: Path) -> list[str]:
    lines, speed = [], {}
    for side, result in results.items():
        if result is None:
            lines.append(f"| {cell.name} | {side} | out of memory with every setting |" + " |" * 7)
            continue
        run = result.run
        timed = {update: contents(rows, update) for update in run.seconds if update > SKIPPED}
        speed[side] = median(held.tokens / run.seconds[update] for update, held in timed.items())
        peak = peak_of(result.device)
        config = (SHAPES | TINY)[cell.shape]
        rates = [operations(config, cell.method, rank=RANK, **h._asdict()) / run.seconds[u] for u, h in timed.items()]
        shown = [
            cell.name,
            side,
            f"{speed[side]:,.0f}",
            f"{median(rates) / peak:.1%}" if peak else "",
            f"{speed['jtune'] / speed[side]:.2f}x" if side != "jtune" else "",
            f"{result.peak_bytes / 2**30:.1f} GiB" if result.peak_bytes else "",
            f"{result.compile_seconds:.0f} s" if result.compile_seconds is not None else "",
            f"{run.seconds[1]:.0f} s",
            f"{largest_difference(results['jtune'].run, run):.1e}" if side != "jtune" else "",
            "; ".join(filter(None, [str(result.setting), result.note])),
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return lines


def heading(args: argparse.Namespace) -> list[str]:
    what = "tiny models on the CPU, float32" if args.dry_run else f"one GPU, bf16: {gpu_name()}"
    names = ("jtune", "jax", "jaxlib", "torch", "transformers", "peft")
    lines = [
        f"## {what}, {time.strftime('%Y-%m-%d')}",
        "",
        f"- machine: {machine.describe()}",
        f"- versions: {machine.versions(names)}, commit {commit()}",
        f"- packed rows of {args.length}, {args.updates} updates, medians over updates {SKIPPED + 1} to {args.updates}",
        f"- LoRA of rank {RANK} on all linear layers; made-up rows of log-normal length",
    ]
    return [*lines, "- **a dry run**: only the losses mean something, not the times"] if args.dry_run else lines


def gpu_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        sys.exit(f"a run failed: {error}")
