"""Tokens generated per second, jtune and transformers in turn, on a CPU.

    python scripts/bench/generate.py [--model 22M] [--batches 1,8] [--new 128] [--runs 5]

One model of random weights, in float32; prompts of 32 to 64 tokens; greedy, and every answer as long as it may be. Both
sides compile, or warm up, before they are timed. Their answers are compared.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import machine
import numpy as np
from cpu import append, commit
from make import ROOT, SHAPES

REPORT = ROOT / "docs" / "benchmarks.md"
Prompts = list[list[int]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="22M", choices=SHAPES)
    parser.add_argument("--batches", default="1,8", help="prompts that are answered together (default 1,8)")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer (default 128)")
    parser.add_argument("--runs", type=int, default=5, help="of each side (default 5)")
    parser.add_argument("--report", type=Path, default=REPORT, help="what the table is appended to")
    args = parser.parse_args()
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"transformers with torch is what jtune is compared with: {error}")
        return 1
    noise = machine.noise()
    with tempfile.TemporaryDirectory() as folder:
        sides = {"jtune": ours(Path(folder), args.model, args.new), "transformers": theirs(Path(folder), args.new)}
    rows = []
    for batch in map(int, args.batches.split(",")):
        rng = np.random.default_rng(batch)
        vocab = SHAPES[args.model]["vocab_size"]
        prompts = [rng.integers(5, vocab, rng.integers(32, 65)).tolist() for _ in range(batch)]
        seconds, answers = {name: [] for name in sides}, {}
        for run in range(args.runs + 1):
            for name, answer in sides.items():
                started = time.perf_counter()
                answers[name] = answer(prompts)
                if run:  # the first warms up
                    seconds[name].append(time.perf_counter() - started)
        rows.append((batch, seconds, same(*answers.values())))
        print(rows[-1], flush=True)
    text = report(args, rows, noise)
    print("\n" + text)
    append(text, args.report)
    return 0


def ours(folder: Path, shape: str, new: int) -> Callable[[Prompts], Prompts]:
    """Writes the model of random weights into `folder`, too."""
    import jax

    import jtune
    from jtune.interop import hf
    from jtune.models import init_params
    from jtune.models.families import decoder_config

    config = decoder_config(SHAPES[shape])
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    hf.save_model(params, config, SHAPES[shape], folder)
    model, params = jtune.load_model(str(folder))
    sampling = jtune.Sampling(max_new_tokens=new)
    return lambda prompts: jtune.generate(model, params, prompts, sampling, batch_size=len(prompts))


def theirs(folder: Path, new: int) -> Callable[[Prompts], Prompts]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def answer(prompts: Prompts) -> Prompts:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        found = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        return found[:, width:].tolist()

    return answer


def same(ours: Prompts, theirs: Prompts) -> float:
    """The share of answers that are equal, token for token."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def report(args: argparse.Namespace, rows: list, noise: str | None) -> str:
    lines = [
        f"## Generation, {date.today()}",
        "",
        f"- machine: {machine.describe()}",
        f"- versions: {machine.versions(('jtune-llm', 'jax', 'transformers', 'torch'))}, {commit()}",
        f"- {args.model} of `make.py`, random weights, float32; prompts of 32 to 64 tokens, {args.new} new tokens, "
        f"greedy; sides in turn, medians of {args.runs} runs",
        *([f"- **not sound**: {noise}"] if noise else []),
        "",
        "| prompts together | jtune, tokens/s | transformers, tokens/s | times | same answers |",
        "|---|---|---|---|---|",
    ]
    for batch, seconds, agreement in rows:
        speed = {name: batch * args.new / statistics.median(each) for name, each in seconds.items()}
        times = speed["jtune"] / speed["transformers"]
        lines.append(
            f"| {batch} | {speed['jtune']:,.0f} | {speed['transformers']:,.0f} | {times:.2f}x | {agreement:.0%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
