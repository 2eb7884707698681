"""jtune beside LLaMA-Factory on two CPU cores: the same YAML, model, data and thread count, in float32.

    python scripts/bench/cpu.py [--lf /path/to/llamafactory-cli] [--runs 3] [--quick]

What is compared and how is said in scripts/bench/README.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import machine
from make import ROOT, SHAPES, reference, template_of
from measure import Failed, Run, measure

CORES = 2
BATCH = 4  # rows in an update
MAX_OTHERS = 0.1  # cores that other processes may keep busy during a run
SKIPPED = 3  # updates at the start of each run that are not timed: compilation, first touch of memory
REPORT = ROOT / "docs" / "benchmarks.md"


class Cell(NamedTuple):
    """One YAML."""

    method: str  # lora, full
    packed: bool
    recompute: bool  # gradient checkpointing, LLaMA-Factory's default

    @property
    def name(self) -> str:
        return f"{self.method} {'packed' if self.packed else 'unpacked'} gc-{'on' if self.recompute else 'off'}"


CELLS = [Cell(m, p, r) for m in ("lora", "full") for p in (True, False) for r in (True, False)]


class Side(NamedTuple):
    name: str
    command: Callable[[Path, Path], list[str]]  # (YAML, output_dir) -> command line
    env: dict[str, str]


def begin(given: Path | None) -> tuple[str | None, Path | None]:
    """Keep to the cores: why times will not be sound, if so, and where LLaMA-Factory is, both said."""
    machine.pin(CORES)
    noise = machine.noise()
    if noise:
        print(f"note: {noise}: the times will not be sound")
    lf = find(given)
    if lf is None:
        print("LLaMA-Factory is not installed (no llamafactory-cli on the PATH, none given with --lf): only jtune runs")
    return noise, lf


def main() -> int:
    args = parse()
    noise, lf = begin(args.lf)
    work = args.work.resolve() / args.model
    make_inputs(work, args.model, args.tokenizer)
    sides = [jtune_side(work)] + ([lf_side(lf, work)] if lf else [])

    results = []
    cells = [cell for cell in CELLS if all(word in cell.name.split() for word in args.only.split())]
    for cell in cells[:1] + [c for c in cells if not c.packed][:1] if args.quick else cells:
        case = write_case(work, cell, updates=args.updates)
        runs = run_alternately(sides, case, work / "out" / cell.name.replace(" ", "-"), args.runs)
        check_tokens(cell, case, runs["jtune"], sides[0])
        results.append((cell, runs))
    text = render(results, heading(noise, lf, args))
    print("\n" + text)
    if not args.quick:
        append(text, args.report)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lf", type=Path, help="llamafactory-cli of LLaMA-Factory 0.9.5 (default: from the PATH)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side; they alternate (default 3)")
    parser.add_argument("--updates", type=int, default=12, help="updates in a run (default 12)")
    parser.add_argument("--quick", action="store_true", help="see that it works: two YAMLs, one run, 5 updates")
    parser.add_argument("--only", default="", help="words of the YAMLs to run, such as 'lora packed' or 'full gc-off'")
    parser.add_argument("--model", choices=SHAPES, default="22M", help="parameters (default 22M; see make.py)")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench-cpu", help="where everything is written")
    parser.add_argument("--tokenizer", type=Path, default=reference("tokenizer"), help="folder of a tokenizer")
    parser.add_argument("--report", type=Path, default=REPORT, help="what the table is appended to")
    args = parser.parse_args()
    if args.quick:
        args.runs, args.updates = 1, SKIPPED + 2
    if args.updates <= SKIPPED:
        parser.error(f"--updates must be above {SKIPPED}: so many are not timed")
    return args


def find(given: Path | None) -> Path | None:
    found = shutil.which(str(given or "llamafactory-cli"))
    return Path(found).absolute() if found else None


# ---------------------------------------------------------------------- what runs


def make_inputs(work: Path, model: str, tokenizer: Path | None) -> None:
    """Model, adapter and data; in a process of its own, so that this one has no threads while it measures."""
    if (work / "data" / "dataset_info.json").exists():  # written last
        return
    options = ["--tokenizer", str(tokenizer)] if tokenizer else []
    make = [sys.executable, str(Path(__file__).with_name("make.py")), str(work), "--model", model, *options]
    subprocess.run(make, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def jtune_side(work: Path) -> Side:
    def command(case: Path, output_dir: Path) -> list[str]:
        own = [f"output_dir={output_dir}", f"compile_cache_dir={work / 'compiled'}"]
        return [sys.executable, "-m", "jtune.cli.main", "train", str(case), *own]

    return Side("jtune", command, environment(work) | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)})


def lf_side(cli: Path, work: Path) -> Side:
    command = lambda case, output_dir: [str(cli), "train", str(case), f"output_dir={output_dir}"]
    env = environment(work) | {"DISABLE_VERSION_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""}
    return Side("LLaMA-Factory", command, env)


def environment(work: Path) -> dict[str, str]:
    """The same for both: two threads, no network, no flags of the caller's, no other checkout's packages."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH", "JAX_NUM_CPU_DEVICES")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(CORES))
    return kept | threads | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "TOKENIZERS_PARALLELISM": "false"}


def write_case(work: Path, cell: Cell, *, updates: int) -> Path:
    """A LLaMA-Factory YAML, which both sides read."""
    content = {
        "model_name_or_path": work / "model",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": cell.method,
        "disable_shuffling": True,  # so that it is plain which rows an update holds
        "dataset": "rows",
        "dataset_dir": work / "data",
        "template": template_of(work / "model"),
        "cutoff_len": 512,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "max_steps": updates,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "overwrite_output_dir": True,
    }
    if cell.method == "lora":
        content |= {"adapter_name_or_path": work / "adapter", "lora_rank": 8, "lora_target": "all"}
    if cell.packed:
        content |= {"packing": True, "neat_packing": True}
    if not cell.recompute:
        content |= {"disable_gradient_checkpointing": True}
    path = work / "cases" / f"{cell.name.replace(' ', '-')}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    scalar = lambda x: json.dumps(str(x) if isinstance(x, Path) else x)
    path.write_text("".join(f"{key}: {scalar(value)}\n" for key, value in content.items()))
    return path


def run_alternately(sides: list[Side], case: Path, folder: Path, count: int) -> dict[str, list[Run]]:
    """J, L, J, L, ...: what changes slowly on the machine meets both."""
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    for i in range(count):
        for side in sides:
            output_dir = folder / f"{side.name}-{i}"
            shutil.rmtree(output_dir, ignore_errors=True)
            run = measure(side.command(case, output_dir), side.env, output_dir)
            runs[side.name].append(run)
            seconds = " ".join(f"{s:.2f}" for s in run.seconds.values())
            print(f"{case.stem} run {i + 1} {side.name}: seconds {seconds}; others {run.others:.2f} cores", flush=True)
    return runs


def check_tokens(cell: Cell, case: Path, runs: list[Run], jtune: Side) -> None:
    """Raise unless the tokens that jtune's log counts are those of the encoded rows, update by update. Which rows are
    in an update is plain without packing; packed runs are held against each other.
    """
    if any(run.tokens != runs[0].tokens for run in runs):
        raise Failed(f"{case}: two runs of jtune count other tokens in the same update")
    if cell.packed:
        return
    rows = BATCH * len(runs[0].tokens)
    command = [sys.executable, "-m", "jtune.cli.main", "data", str(case), "--json", "--rows", str(rows)]
    shown = subprocess.run(command, env=jtune.env, capture_output=True, text=True, check=True).stdout
    lengths = [len(json.loads(line)["input_ids"]) for line in shown.splitlines() if line.startswith("{")]
    for update, tokens in runs[0].tokens.items():
        encoded = sum(lengths[BATCH * (update - 1) : BATCH * update])
        if encoded != tokens:
            raise Failed(f"{case}: update {update} has {encoded} tokens in its encoded rows, jtune's log says {tokens}")


# ---------------------------------------------------------------------- what comes out


def timed(run: Run) -> list[int]:
    return [update for update in run.seconds if update > SKIPPED]


def speeds(run: Run, tokens: dict[int, int]) -> list[float]:
    """Real tokens per second of each timed update."""
    return [tokens[update] / run.seconds[update] for update in timed(run)]


def cost(runs: Iterable[Run], tokens: dict[int, int]) -> float:
    """CPU seconds of 1,000 real tokens, median over updates: other processes disturb it less than the time."""
    return median(1000 * run.cpu_seconds[u] / tokens[u] for run in runs for u in timed(run))


def largest_difference(one: Run, other: Run) -> float:
    pairs = [(one.losses[u], other.losses[u]) for u in one.losses if u in other.losses]
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


def table(results: list[tuple[Cell, dict[str, list[Run]]]]) -> list[str]:
    rows = [
        "| YAML | side | tokens/s | of single runs | s/update | CPU s/1,000 tokens | ratio | first update after "
        "| largest loss difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, sides in results:
        tokens = sides["jtune"][0].tokens
        speed = {side: median(s for run in runs for s in speeds(run, tokens)) for side, runs in sides.items()}
        for side, runs in sides.items():
            single = [median(speeds(run, tokens)) for run in runs]
            seconds = median(run.seconds[u] for run in runs for u in timed(run))
            first = f"{runs[0].seconds[1]:.1f} s" + (f", then {runs[-1].seconds[1]:.1f} s" if len(runs) > 1 else "")
            versus = ""
            ratio = f"{speed['jtune'] / speed[side]:.2f}x" if side != "jtune" else ""
            if side != "jtune":
                versus = f"{max(largest_difference(j, other) for j in sides['jtune'] for other in runs):.1e}"
            rows.append(
                f"| {cell.name} | {side} | {speed[side]:,.0f} | {min(single):,.0f} to {max(single):,.0f} "
                f"| {seconds:.3f} | {cost(runs, tokens):.2f} | {ratio} | {first} | {versus} |"
            )
    return rows


def losses(results: list[tuple[Cell, dict[str, list[Run]]]]) -> list[str]:
    rows = []
    for cell, sides in results:
        rows += [
            f"{cell.name:22} {side:14} " + " ".join(f"{x:.6f}" for x in r[0].losses.values())
            for side, r in sides.items()
        ]
    return ["```", *rows, "```"]


def heading(noise: str | None, lf: Path | None, args: argparse.Namespace) -> list[str]:
    shape = SHAPES[args.model]
    lines = [
        f"## CPU, {CORES} cores, float32, {time.strftime('%Y-%m-%d')}",
        "",
        f"- machine: {machine.describe()}; pinned to {CORES} cores, OMP_NUM_THREADS={CORES}",
        f"- versions: {machine.versions(('jtune-llm', 'jax', 'jaxlib', 'flax', 'numpy'))}, commit {commit()}",
        f"- beside: {lf_versions(lf) if lf else 'LLaMA-Factory is not installed: only jtune was measured'}",
        f"- model: Llama of {args.model}, hidden {shape['hidden_size']}, {shape['num_hidden_layers']} layers, "
        f"vocabulary {shape['vocab_size']}, random weights; "
        f"{args.updates} updates of {BATCH} rows, cutoff_len 512; the sides in turn, runs of each: {args.runs}; "
        f"medians over updates {SKIPPED + 1} to {args.updates} of all runs",
    ]
    if noise:
        lines.append(f"- **not sound**: {noise}")
    return lines


def render(results: list[tuple[Cell, dict[str, list[Run]]]], head: list[str]) -> str:
    others = max(run.others for _, sides in results for runs in sides.values() for run in runs)
    if others > MAX_OTHERS:
        head = [*head, f"- **not sound**: other processes kept up to {others:.2f} of {CORES} cores busy in a run"]
    notes = ["", "ratio: jtune's tokens/s over the side's. Losses of the first run of each side, update by update:", ""]
    return "\n".join([*head, "", *table(results), *notes, *losses(results)]) + "\n"


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def lf_versions(cli: Path) -> str:
    """Asked of the Python that the command belongs to."""
    names = ("llamafactory", "torch", "transformers", "peft", "accelerate")
    code = f"from importlib.metadata import version as v; print(', '.join(n + ' ' + v(n) for n in {names}))"
    unknown = f"{cli}, whose versions could not be asked"
    if not (python := cli.with_name("python")).exists():  # a wrapper somewhere else
        return unknown
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip() or unknown


def append(text: str, report: Path) -> None:
    report.parent.mkdir(parents=True, exist_ok=True)
    if not report.exists():
        report.write_text("# Measured\n\nHow, and how to measure again: [scripts/bench](../scripts/bench/README.md).\n")
    with report.open("a") as file:
        file.write("\n" + text)
    print(f"appended to {report}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        sys.exit(f"a run failed: {error}")
