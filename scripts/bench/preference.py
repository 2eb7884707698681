"""jtune beside LLaMA-Factory on two CPU cores in the stages of preferences: pairs, or answers with a mark, a second.

    python scripts/bench/preference.py [--lf /path/to/llamafactory-cli] [--runs 3] [--quick]

What is compared and how is said in scripts/bench/README.md.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import machine
from cpu import (
    CORES,
    MAX_OTHERS,
    Side,
    append,
    begin,
    commit,
    cost,
    jtune_side,
    largest_difference,
    lf_side,
    lf_versions,
    make_inputs,
    run_alternately,
)
from make import ROOT, make_rows, reference, template_of
from measure import Failed, Run

SKIPPED = 2  # updates at the start of each run that are not timed
MODEL = "22M"


class Cell(NamedTuple):
    """One YAML."""

    name: str
    goal: float | None  # times LLaMA-Factory's speed
    changes: dict[str, Any]
    anchored: bool = True  # has a reference


LORA = {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
DPO = {"stage": "dpo", "dataset": "dpo_en_demo", "pref_beta": 0.1, "pref_loss": "sigmoid"}
KTO = {"stage": "kto", "dataset": "kto_en_demo", "pref_beta": 0.1}
ORPO = DPO | {"pref_loss": "orpo", "finetuning_type": "full"}
KEPT = {"disable_gradient_checkpointing": True}
CELLS = [
    Cell("dpo lora", 3.0, DPO | LORA),
    Cell("dpo lora gc-off", None, DPO | LORA | KEPT),
    Cell("kto lora", 3.5, KTO | LORA),
    Cell("orpo full", 2.0, ORPO, anchored=False),
]


def main() -> int:
    args = parse()
    noise, lf = begin(args.lf)
    work = args.work.resolve()
    make_inputs(work, MODEL, reference("tokenizer"))
    data = preferences(work)
    jtune = jtune_side(work)
    in_step = Side("jtune, reference in the step", with_words(jtune, "precompute_ref_log_probs=false"), jtune.env)
    theirs = [lf_side(lf, work)] if lf else []
    cells = [cell for cell in CELLS if set(args.only.split()) <= set(cell.name.split())]
    results = []
    for cell in cells[:1] if args.quick else cells:
        case = write_case(work, data, cell, args)
        sides = [jtune, in_step, *theirs] if cell.anchored else [jtune, *theirs]
        runs = run_alternately(sides, case, work / "out" / cell.name.replace(" ", "-"), args.runs)
        results.append((cell, runs))
        print("\n".join(table(results[-1:], args)), flush=True)
    text = render(results, noise, lf, args) + memory(work, data, jtune, args)
    print("\n" + text)
    if not args.quick:
        append(text, args.report)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lf", type=Path, help="llamafactory-cli of LLaMA-Factory 0.9.5 (default: from the PATH)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side; they alternate (default 3)")
    parser.add_argument("--updates", type=int, default=8, help="updates in a run (default 8)")
    parser.add_argument("--batch", type=int, default=2, help="pairs of a microbatch (default 2)")
    parser.add_argument("--accumulation", type=int, default=2, help="microbatches of an update (default 2)")
    parser.add_argument("--cutoff", type=int, default=1024, help="cutoff_len (default 1024)")
    parser.add_argument("--quick", action="store_true", help="see that it works: one YAML, one run, 4 updates")
    parser.add_argument("--only", default="", help="words of the YAMLs to run, such as 'dpo lora'")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench-preference", help="where all is written")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "benchmarks.md", help="what is appended to")
    args = parser.parse_args()
    if args.quick:
        args.runs, args.updates = 1, SKIPPED + 2
    if args.updates <= SKIPPED:
        parser.error(f"--updates must be above {SKIPPED}: so many are not timed")
    return args


# ---------------------------------------------------------------------- what runs


def preferences(work: Path) -> Path:
    """A dataset_dir with `dpo_en_demo` and `kto_en_demo`: LLaMA-Factory's where they are at hand, else made up."""
    if demo := reference("data"):
        return demo
    folder = work / "preferences"
    folder.mkdir(parents=True, exist_ok=True)
    good, bad = make_rows(300, mean=200, question=100), make_rows(300, mean=200, seed=1)
    pairs = [
        {"instruction": g["instruction"], "chosen": g["output"], "rejected": b["output"]} for g, b in zip(good, bad)
    ]
    marked = [g | {"kto_tag": i % 2 == 0} for i, g in enumerate(good)]
    (folder / "dpo.json").write_text(json.dumps(pairs))
    (folder / "kto.json").write_text(json.dumps(marked))
    info = {
        "dpo_en_demo": {
            "file_name": "dpo.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        },
        "kto_en_demo": {"file_name": "kto.json", "columns": {"kto_tag": "kto_tag"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def with_words(side: Side, *words: str) -> Callable[[Path, Path], list[str]]:
    """The command of a side with more words after it."""
    return lambda case, output_dir: [*side.command(case, output_dir), *words]


def units_of(args: argparse.Namespace) -> int:
    """Pairs, or marked answers, of an update."""
    return args.batch * args.accumulation


def write_case(work: Path, data: Path, cell: Cell, args: argparse.Namespace) -> Path:
    """A LLaMA-Factory YAML, which both sides read."""
    content = {
        "model_name_or_path": work / "model",
        "do_train": True,
        "disable_shuffling": True,
        "dataset_dir": data,
        "template": template_of(work / "model"),
        "cutoff_len": args.cutoff,
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": args.accumulation,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "max_steps": args.updates,
        "max_samples": args.updates * units_of(args),  # so that a reference is computed of what is trained on, once
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "overwrite_output_dir": True,
        **cell.changes,
    }
    if content["finetuning_type"] == "lora":  # from disk, as each side would draw another one
        content["adapter_name_or_path"] = work / "adapter"
    path = work / "cases" / f"{cell.name.replace(' ', '-')}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    scalar = lambda x: json.dumps(str(x) if isinstance(x, Path) else x)
    path.write_text("".join(f"{key}: {scalar(value)}\n" for key, value in content.items()))
    return path


def memory(work: Path, data: Path, jtune: Side, args: argparse.Namespace) -> str:
    """What the steps take of memory, beside supervised ones on the same rows."""
    lines = ["", "| YAML | batch | recomputed | peak, MiB | supervised, MiB | ratio |", "|---|---|---|---|---|---|"]
    for cell in (CELLS[0], CELLS[-1]):
        case = write_case(work, data, cell, args)
        other = write_case(work, data, supervised(cell), args)
        script = Path(__file__).with_name("preference_memory.py")
        done = subprocess.run([sys.executable, script, case, other], env=jtune.env, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"{script.name} {case}: {done.stderr[-1000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        for policy in ("none", "full"):
            ours, theirs = found[policy]["preferences"], found[policy]["supervised"]
            sizes = f"{ours / 2**20:,.1f} | {theirs / 2**20:,.1f} | {ours / theirs:.4f}"
            lines.append(f"| {cell.name} | {found['shape']} | {policy} | {sizes} |")
    return "\n".join(lines) + "\n"


def supervised(cell: Cell) -> Cell:
    """The same method without preferences; its rows are not read."""
    kept = {key: value for key, value in cell.changes.items() if not key.startswith("pref_")}
    return cell._replace(name=f"{cell.name} supervised", changes=kept | {"stage": "sft"})


# ---------------------------------------------------------------------- what comes out


def speeds(run: Run, units: int) -> list[float]:
    """Units a second of each timed update."""
    return [units / seconds for update, seconds in run.seconds.items() if update > SKIPPED]


def table(results: list[tuple[Cell, dict[str, list[Run]]]], args: argparse.Namespace) -> list[str]:
    rows = [
        "| YAML | side | pairs/s | of single runs | s/update | CPU s/pair | jtune's speed over it | by CPU time | goal "
        "| first update after | largest loss difference |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, sides in results:
        speed = {s: median(x for run in runs for x in speeds(run, units_of(args))) for s, runs in sides.items()}
        spent = {s: cost(runs, dict.fromkeys(runs[0].seconds, 1000 * units_of(args))) for s, runs in sides.items()}
        for side, runs in sides.items():
            single = [median(speeds(run, units_of(args))) for run in runs]
            is_other = side != "jtune"
            ratio = f"{speed['jtune'] / speed[side]:.2f}x" if is_other else ""
            by_cpu = f"{spent[side] / spent['jtune']:.2f}x" if is_other else ""
            versus = max(largest_difference(j, run) for j in sides["jtune"] for run in runs)
            goal = f"{cell.goal}x" if cell.goal and side == "LLaMA-Factory" else ""
            rows.append(
                f"| {cell.name} | {side} | {speed[side]:.2f} | {min(single):.2f} to {max(single):.2f} "
                f"| {units_of(args) / speed[side]:.2f} | {spent[side]:.2f} | {ratio} "
                f"| {by_cpu} | {goal} | {runs[-1].seconds[1]:.1f} s | {f'{versus:.1e}' if is_other else ''} |"
            )
    return rows


def render(
    results: list[tuple[Cell, dict[str, list[Run]]]], noise: str | None, lf: Path | None, args: argparse.Namespace
) -> str:
    others = max(run.others for _, sides in results for runs in sides.values() for run in runs)
    beside = lf_versions(lf) if lf else "LLaMA-Factory is not installed: only jtune was measured"
    head = [
        f"## Preferences, {CORES} cores, float32, {time.strftime('%Y-%m-%d')}",
        "",
        f"- machine: {machine.describe()}; pinned to {CORES} cores, OMP_NUM_THREADS={CORES}",
        f"- versions: {machine.versions(('jtune-llm', 'jax', 'jaxlib', 'numpy'))}, commit {commit()}",
        f"- beside: {beside}",
        f"- Llama of {MODEL}, random weights; {args.batch} x {args.accumulation} pairs (kto: answers) an update, "
        f"cutoff_len {args.cutoff}, {args.updates} updates; the sides in turn, runs of each: {args.runs}; medians over "
        f"updates {SKIPPED + 1} to {args.updates} of all runs",
    ]
    head += [f"- **not sound**: {noise}"] if noise else []
    if others > MAX_OTHERS:
        head.append(f"- **not sound**: other processes kept up to {others:.2f} of {CORES} cores busy in a run")
    return "\n".join([*head, "", *table(results, args)]) + "\n"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        sys.exit(f"a run failed: {error}")
