"""Rows read, tokenised and packed per second, what packing wastes, memory by the number of rows, time of a seek.

    python scripts/bench/data.py [--lf /path/to/llamafactory-cli] [--rows 20000] [--scale 10000,1000000] [--runs 3]

Both sides read the same YAML and the same file of alpaca rows, with the same tokenizer, and start without a cache.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
from cpu import CORES, append, commit, find, lf_versions
from make import ROOT, make_rows, reference, template_of, write_tokenizer

REPORT = ROOT / "docs" / "benchmarks.md"
CUTOFF = 2048


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lf", type=Path, help="llamafactory-cli of LLaMA-Factory 0.9.5 (default: from the PATH)")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the comparison (default 20000)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side; they alternate (default 3)")
    parser.add_argument("--scale", default="10000,1000000", help="numbers of rows of which memory is measured")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench-data", help="where everything is written")
    parser.add_argument("--tokenizer", type=Path, default=reference("tokenizer"), help="folder of a tokenizer")
    parser.add_argument("--report", type=Path, default=REPORT, help="what the table is appended to")
    args = parser.parse_args()
    machine.pin(CORES)
    noise = machine.noise()
    lf, work = find(args.lf), args.work.resolve()
    if lf is None:
        print("LLaMA-Factory is not installed (no llamafactory-cli on the PATH, none given with --lf): only jtune runs")
    write_tokenizer(work / "tokenizer", args.tokenizer)
    (work / "tokenizer" / "config.json").write_text(json.dumps({"model_type": "llama"}))

    sides: dict[str, list[dict[str, Any]]] = {}
    for run in range(args.runs):
        for workers in (None, CORES):
            case = write_case(work, args.rows, workers)
            commands = {
                "jtune": jtune(case),
                "jtune and gigatoken": [*jtune(case), "tokenizer_backend=gigatoken"],
                "LLaMA-Factory": lf and llamafactory(lf, case),
            }
            for name, command in commands.items():
                if command:
                    key = f"{name}, {workers} workers" if workers else f"{name}, as it comes"
                    sides.setdefault(key, []).append(measured(command, work))
                    print(f"run {run + 1} {key}: {sides[key][-1]}", flush=True)
    scale = {}
    for rows in filter(None, args.scale.split(",")):
        scaled = [*jtune(write_case(work, int(rows), CORES, mean=20)), "tokenizer_backend=gigatoken"]
        scale[int(rows)] = [
            measured(scaled, work),
            measured([*scaled, "overwrite_cache=false"], work, keep=True),
        ]
        print(f"{rows} rows: {scale[int(rows)]}", flush=True)
        shutil.rmtree(work / "cache", ignore_errors=True)

    names = ("jtune-llm", "datasets", "transformers", "tokenizers", "pyarrow")
    head = [
        f"## Data, {CORES} cores, {time.strftime('%Y-%m-%d')}",
        "",
        f"- machine: {machine.describe()}",
        f"- versions: {machine.versions(names)}, {commit()}",
        f"- beside: {lf_versions(lf) if lf else 'LLaMA-Factory is not installed: only jtune was measured'}",
        f"- {args.rows} alpaca rows: {'LLaMA-Factory demo sets, again and again' if reference('data') else 'made up'}; "
        f"cutoff_len {CUTOFF}, packed; both start without a cache, imports not counted; the sides in turn, medians of "
        f"{args.runs} runs",
        *([f"- **not sound**: {noise}"] if noise else []),
    ]
    text = "\n".join([*head, "", *speeds(sides, args.rows), "", *scales(scale)]) + "\n"
    print("\n" + text)
    append(text, args.report)
    return 0


def real_rows() -> list[dict[str, str]]:
    """LLaMA-Factory's English and Chinese demo sets where they are at hand, else made-up rows."""
    files = [reference(f"data/alpaca_{language}_demo.json") for language in ("en", "zh")]
    return [row for file in files if file for row in json.loads(file.read_text())] or make_rows(2000)


def write_case(work: Path, rows: int, workers: int | None, *, mean: int | None = None) -> Path:
    """A YAML that both sides read, its data written if it is not there: rows of `mean` words, or the real ones."""
    folder = work / f"rows-{rows}-{mean or 'real'}"
    if not (folder / "dataset_info.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        block = real_rows() if mean is None else make_rows(min(rows, 50_000), mean=mean)
        with (folder / "rows.jsonl").open("w") as file:
            for i in range(rows):
                row = block[i % len(block)]
                file.write(json.dumps(row | {"instruction": f"{i} {row['instruction']}"}) + "\n")
        (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl"}}))
    case = folder / f"case-{workers}.yaml"
    content = {
        "model_name_or_path": str(work / "tokenizer"),
        "template": template_of(work / "tokenizer"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "cutoff_len": CUTOFF,
        "packing": True,
        "neat_packing": True,
        "overwrite_cache": True,
        "output_dir": str(work / "out"),
        "report_to": "none",
        "use_cpu": True,
    } | ({"preprocessing_num_workers": workers} if workers else {})
    case.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in content.items()))
    return case


def jtune(case: Path) -> list[str]:
    side = Path(__file__).with_name("data_jtune.py")
    return [sys.executable, str(side), str(case), "neat_packing=false", "num_train_epochs=1"]


def llamafactory(cli: Path, case: Path) -> list[str]:
    return [str(cli.with_name("python")), str(Path(__file__).with_name("data_lf.py")), str(case)]


def measured(command: list[str], work: Path, *, keep: bool = False) -> dict[str, Any]:
    """The figures that a side prints on its last line. Its cache of data sets is its own, and empty at first."""
    if not keep:
        shutil.rmtree(work / "cache", ignore_errors=True)
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TOKENIZERS_PARALLELISM")}
    env = kept | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache"), "JAX_PLATFORMS": "cpu"}
    env |= {"DISABLE_VERSION_CHECK": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def speeds(sides: dict[str, list[dict[str, Any]]], rows: int) -> list[str]:
    lines = [
        "| side | rows/s | s | of single runs | times LLaMA-Factory | tokens | packing waste |",
        "|---|---|---|---|---|---|---|",
    ]
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in sides.items()}
    for name, runs in sides.items():
        other = seconds.get(f"LLaMA-Factory, {name.split(', ')[1]}")
        ratio = f"{other / seconds[name]:.2f}x" if other and not name.startswith("LLaMA") else ""
        single = ", ".join(f"{run['seconds']:.1f}" for run in runs)
        lines.append(
            f"| {name} | {rows / seconds[name]:,.0f} | {seconds[name]:.2f} | {single} | {ratio} "
            f"| {runs[0]['tokens']:,} | {runs[0]['waste']:.2%} |"
        )
    return lines


def scales(scale: dict[int, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| rows | tokens | rows/s | packed in | waste | memory at most, MiB | of it imports | again, from the cache, s "
        "| memory, MiB | the batch in the middle, ms | the next, ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for rows, (first, again) in scale.items():
        lines.append(
            f"| {rows:,} | {first['tokens']:,} | {rows / first['encode']:,.0f} | {first['pack']:.1f} s "
            f"| {first['waste']:.2%} | {first['peak']:,.0f} | {first['imported']:,.0f} | {again['encode']:.1f} "
            f"| {again['peak']:,.0f} | {again['seek'] * 1e3:.0f} | {again['next'] * 1e3:.1f} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
