"""jtune on one GPU beside transformers and PEFT, on the same weights and packed rows, and beside LLaMA-Factory.

    python scripts/bench/gpu.py [--only "1B lora"] [--lf /path/to/llamafactory-cli] [--updates 25]
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
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import machine
import numpy as np
from cpu import append, commit, largest_difference
from make import ROOT, template_of
from measure import Failed, OutOfMemory, Run, measure
from shapes import SHAPES, TINY, operations, peak_of

SKIPPED = 5  # updates that are not timed
RANK = 16
FAILED = "failed"  # in the place of a result


class Cell(NamedTuple):
    shape: str
    method: str  # lora, full
    rows: int  # of one update
    data: str = "packed"  # packed: many examples in a row; long: each fills one

    @property
    def name(self) -> str:
        return f"{self.shape} {self.method} {self.data}"


CELLS = [
    *(
        Cell(shape, method, rows)
        for shape, rows in (("Qwen2.5-0.5B", 16), ("Llama-3.2-1B", 8), ("Llama-3.1-8B", 4))
        for method in ("lora", "full")
    ),
    Cell("Llama-3.1-8B", "lora", 4, "long"),
]
TINY_CELLS = [
    *(Cell(shape, method, 4) for shape in TINY for method in ("lora", "full")),
    Cell("tiny llama", "lora", 2, "long"),
]


class Setting(NamedTuple):
    """How a side fits an update into memory: tried in this order until one does."""

    micro: int  # rows at a time
    recompute: bool

    def __str__(self) -> str:
        return f"{self.micro} rows at a time, {'layers recomputed' if self.recompute else 'nothing recomputed'}"


def settings(rows: int, largest: int) -> list[Setting]:
    """From the fastest to the smallest."""
    sizes = [rows // cut for cut in (1, 2, 4, 8, 16) if rows % cut == 0 and rows // cut <= largest]
    return [Setting(micro, recompute) for recompute in (False, True) for micro in sizes]


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
    peers = {}
    if args.only_jtune or args.from_scratch:
        pass
    elif all(find_spec(name) for name in ("torch", "peft")):
        peers["transformers + PEFT"] = partial(torch_cell, liger=False)
        if find_spec("liger_kernel") and not args.dry_run:  # its kernels are Triton's
            peers["transformers + PEFT + Liger"] = partial(torch_cell, liger=True)
    else:
        print("torch and peft are not installed: they are not measured")
    if args.lf and not args.from_scratch:
        peers |= {f"LLaMA-Factory, {how}": partial(lf_cell, how=how) for how in ("tuned", "as it comes")}
    work = args.work.resolve()
    cells = [c for c in (TINY_CELLS if args.dry_run else CELLS) if all(word in c.name for word in args.only.split())]
    lines, failed = [], False
    for cell in cells:
        folder = work / cell.name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        inputs(work, cell, environment(args), "shape" if args.from_scratch else "weights")
        results: dict[str, Result | str] = {}
        for name, side in {"jtune": jtune_cell, **peers}.items():
            results[name] = attempt(side, cell, work, folder, args)
            print(rows_of(cell, results, folder / "rows")[-1], flush=True)
            if isinstance(results["jtune"], str):  # there are no rows for the others
                break
        lines += rows_of(cell, results, folder / "rows")
        failed |= FAILED in results.values()
        for file in (folder / "out").rglob("*.safetensors"):  # trained models are large
            file.unlink()
    text = "\n".join([*heading(args), "", *HEAD, *lines]) + "\n"
    print("\n" + text)
    if not args.dry_run:
        append(text, args.report)
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU; nothing is appended")
    parser.add_argument("--only", default="", help="parts of the names of the cells to run, such as '1B lora'")
    parser.add_argument("--lf", type=Path, help="llamafactory-cli of LLaMA-Factory 0.9.5")
    parser.add_argument("--only-jtune", action="store_true", help="leave the others out")
    parser.add_argument(
        "--from-scratch", action="store_true", help="only jtune, which draws its weights: none are written"
    )
    parser.add_argument(
        "--profile", action="store_true", help="trace the last two updates of jtune, which are not timed"
    )
    parser.add_argument("--micro", type=int, default=16, help="rows at a time, at most (default: as many as fit)")
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


def inputs(work: Path, cell: Cell, env: dict[str, str], what: str = "weights") -> None:
    """Weights, adapter and data, made once by jtune's own code; in a process of its own, which frees the GPU again."""
    model = work / "models" / cell.shape.replace(" ", "-")
    if (model.with_name(model.name + "-lora") / "adapter_config.json").exists():  # written last
        return
    code = (
        "import sys; from pathlib import Path; from make import *; from shapes import *\n"
        "name, model, data = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])\n"
        "write_tokenizer(model, reference('tokenizer'))\n"
        "write_model(model, (SHAPES | TINY)[name], weights=sys.argv[4] == 'weights')\n"
        "write_rows(data / 'packed', make_rows(3000, mean=45, question=45))\n"
        "write_rows(data / 'long', make_long_rows(200, words=5000))\n"
        f"if sys.argv[4] == 'weights': write_adapter(model.with_name(model.name + '-lora'), model, rank={RANK})\n"
    )
    command = [sys.executable, "-c", code, cell.shape, str(model), str(work / "data"), what]
    subprocess.run(command, check=True, env=env | {"PYTHONPATH": str(Path(__file__).parent)})


def attempt(side, cell: Cell, work: Path, folder: Path, args: argparse.Namespace) -> Result | str:
    """The first setting that fits; if there is none, why."""
    for setting in settings(cell.rows, args.micro):
        try:
            return side(cell, setting, work, folder, args)
        except OutOfMemory:
            print(f"{cell.name}: out of memory with {setting}", flush=True)
        except Failed as error:
            print(f"{cell.name}: {error}", flush=True)
            return FAILED
    return "out of memory with every setting"


def case_of(cell: Cell, setting: Setting, work: Path, args: argparse.Namespace) -> dict:
    """What jtune and LLaMA-Factory both read."""
    model = work / "models" / cell.shape.replace(" ", "-")
    case = {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": cell.method,
        "disable_shuffling": True,  # so that it is plain which rows an update holds
        "dataset": "rows",
        "dataset_dir": str(work / "data" / cell.data),
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
    }
    if cell.method == "lora":
        case |= {"lora_rank": RANK, "lora_target": "all"}
    if args.from_scratch:
        case["train_from_scratch"] = True
    elif cell.method == "lora":
        case["adapter_name_or_path"] = f"{model}-lora"
    return case


def jtune_cell(cell: Cell, setting: Setting, work: Path, folder: Path, args: argparse.Namespace) -> Result:
    output_dir, result = folder / "out" / "jtune", folder / "jtune.json"
    shutil.rmtree(output_dir, ignore_errors=True)
    case = case_of(cell, setting, work, args) | {
        "remat": "full" if setting.recompute else "none",
        "compile_cache_dir": str(folder / "compiled"),  # empty: compile seconds are those of a first run
        "output_dir": str(output_dir),
    }
    if args.profile:
        case["profile_steps"] = f"{args.updates - 1}-{args.updates}"
    path = write_json(folder / "case.yaml", case)  # JSON is YAML
    command = [sys.executable, script("gpu_jtune.py"), str(path), str(folder / "rows"), str(result)]
    run = measure(command, environment(args), output_dir)
    if args.profile:
        shutil.copytree(output_dir / "profile", folder / "profile", dirs_exist_ok=True)
        run = run._replace(seconds={u: s for u, s in run.seconds.items() if u < args.updates - 1})
    found = json.loads(result.read_text())
    return Result(run, setting, found["device"], found["peak_bytes"], found["compile_seconds"], "")


def torch_cell(
    cell: Cell, setting: Setting, work: Path, folder: Path, args: argparse.Namespace, *, liger: bool
) -> Result:
    model = work / "models" / cell.shape.replace(" ", "-")
    name = "liger" if liger else "torch"
    output_dir, result = folder / "out" / name, folder / f"{name}.json"
    shutil.rmtree(output_dir, ignore_errors=True)
    case = {
        "model": str(model),
        "adapter": f"{model}-lora",
        "method": cell.method,
        "rows": str(folder / "rows"),
        "micro": setting.micro,
        "recompute": setting.recompute,
        "liger": liger,
        "learning_rate": 1e-5,
        "updates": args.updates,
        "output_dir": str(output_dir),
        "result": str(result),
    }
    path = write_json(folder / "torch-case.json", case)
    run = measure([sys.executable, script("gpu_torch.py"), str(path)], environment(args), output_dir)
    found = json.loads(result.read_text())
    return Result(run, setting, found["device"], found["peak_bytes"], None, f"attention: {found['attention']}")


def lf_cell(
    cell: Cell, setting: Setting, work: Path, folder: Path, args: argparse.Namespace, *, how: str
) -> Result | None:
    """LLaMA-Factory on its own pipeline. Tuned: the packed rows of the others, fused kernels, the first setting that
    fits. As it comes: rows padded to the longest of four, layers recomputed.
    """
    output_dir = folder / "out" / f"lf-{how.replace(' ', '-')}"
    shutil.rmtree(output_dir, ignore_errors=True)
    case = case_of(cell, setting, work, args) | {"output_dir": str(output_dir), "overwrite_output_dir": True}
    if how == "tuned":
        case |= {"disable_gradient_checkpointing": not setting.recompute, "enable_liger_kernel": not args.dry_run}
    else:
        setting = Setting(4, True)
        case |= {"packing": False, "neat_packing": False}
        case |= {"per_device_train_batch_size": setting.micro, "gradient_accumulation_steps": 2 * cell.rows}
    if args.dry_run:
        case["use_cpu"] = True
    path = write_json(folder / f"{output_dir.name}.yaml", case)
    env = environment(args) | {"DISABLE_VERSION_CHECK": "1"}
    del env["PYTHONPATH"]
    held = MemoryWatch()
    try:
        run = measure([str(args.lf), "train", str(path)], env, output_dir)
    except Failed as error:
        if "out of memory" not in str(error).lower():
            raise
        raise OutOfMemory(path) from error
    finally:
        peak = held.stop()
    if how != "tuned":
        run = run._replace(tokens=tokens_of(path, args))
    return Result(run, setting, device_name(args), peak, None, "memory: all that its process held")


def tokens_of(case: Path, args: argparse.Namespace) -> dict[int, int]:
    """Of each update without packing, where rows come in their order."""
    content = json.loads(case.read_text())
    rows = content["per_device_train_batch_size"] * content["gradient_accumulation_steps"]
    command = [sys.executable, "-m", "jtune.cli.main", "data", str(case), "--json", "--rows", str(rows * args.updates)]
    env = environment(args) | {"JAX_PLATFORMS": "cpu"}
    shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    lengths = [len(json.loads(line)["input_ids"]) for line in shown.splitlines() if line.startswith("{")]
    return {update + 1: sum(lengths[rows * update : rows * (update + 1)]) for update in range(args.updates)}


class MemoryWatch:
    """The most memory that the GPU had in use, as nvidia-smi says it twice a second."""

    def __init__(self):
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "500"]
        there = shutil.which("nvidia-smi")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True) if there else None

    def stop(self) -> int | None:
        if self.process is None:
            return None
        self.process.terminate()
        found = [int(line) for line in self.process.communicate()[0].split() if line.isdigit()]
        return max(found) * 2**20 if found else None


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


def rows_of(cell: Cell, results: dict[str, Result | str], rows: Path) -> list[str]:
    lines, speed = [], {}
    for side, result in results.items():
        if isinstance(result, str):
            lines.append(f"| {cell.name} | {side} | {result} |" + " |" * 7)
            continue
        run = result.run
        updates = [update for update in run.seconds if update > SKIPPED]
        timed = {} if side.endswith("as it comes") else {update: contents(rows, update) for update in updates}
        tokens = {update: held.tokens for update, held in timed.items()} or run.tokens
        speed[side] = sum(tokens[u] for u in updates) / sum(run.seconds[u] for u in updates)
        peak = peak_of(result.device)
        config = (SHAPES | TINY)[cell.shape]
        work = sum(operations(config, cell.method, rank=RANK, **held._asdict()) for held in timed.values())
        rate = work / sum(run.seconds[u] for u in updates)
        shown = [
            cell.name,
            side,
            f"{speed[side]:,.0f}",
            f"{rate / peak:.1%}" if peak and timed else "",
            f"{speed['jtune'] / speed[side]:.2f}x" if side != "jtune" else "",
            f"{result.peak_bytes / 2**30:.1f} GiB" if result.peak_bytes else "",
            f"{result.compile_seconds:.0f} s" if result.compile_seconds is not None else "",
            f"{run.seconds[1]:.0f} s",
            f"{largest_difference(results['jtune'].run, run):.1e}" if side != "jtune" and timed else "",
            "; ".join(filter(None, [str(result.setting), result.note])),
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return lines


def heading(args: argparse.Namespace) -> list[str]:
    what = "tiny models on the CPU, float32" if args.dry_run else f"one GPU, bf16: {gpu_name()}"
    names = ("jtune-llm", "jax", "jaxlib", "torch", "transformers", "peft")
    lines = [
        f"## {what}, {time.strftime('%Y-%m-%d')}",
        "",
        f"- machine: {machine.describe()}",
        f"- versions: {machine.versions(names)}, commit {commit()}",
        f"- packed rows of {args.length}, {args.updates} updates, timed from update {SKIPPED + 1} on",
        f"- LoRA of rank {RANK} on all linear layers; made-up rows of log-normal length (packed), or each as long as a "
        "row (long)",
    ]
    return [*lines, "- **a dry run**: only the losses mean something, not the times"] if args.dry_run else lines


def device_name(args: argparse.Namespace) -> str:
    return "cpu" if args.dry_run else gpu_name()


def gpu_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
