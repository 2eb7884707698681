"""`jtune quickstart [FOLDER] [key=value ...]`: train a small model from nothing, and show what it has learned."""

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import which

from jtune.commands.train import train
from jtune.config import load_config
from jtune.data import get_template, load_tokenizer
from jtune.generation import Sampling, generate
from jtune.loading.inference import load_model
from jtune.quickstart.make_data import FOLDER as DATA
from jtune.quickstart.make_model import FOLDER as MODEL

log = logging.getLogger("jtune")

SHOWN = 5  # answers printed at the end
LONGEST = 32  # tokens of an answer


def quickstart(words: Sequence[str] = ()) -> None:
    """Write a YAML, evaluate, train, evaluate again, and print answers before what to try next.

    Args:
      words: the folder to write to (default: `out/quickstart`), and arguments that replace those of the YAML.
    """
    began = time.monotonic()
    folder, overrides = split_folder(words)
    case = folder / "quickstart.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    preferring = folder / "dpo.yaml"
    run = {"model_name_or_path": MODEL, "dataset_dir": DATA, "output_dir": folder / "run"}
    case.write_text(_with_paths(DATA.with_name("quickstart.yaml").read_text(), run))
    then = run | {"model_name_or_path": folder / "run", "output_dir": folder / "preferring"}
    preferring.write_text(_with_paths(DATA.with_name("dpo.yaml").read_text(), then))
    log.info("the case: %s", case)

    log.info("\nbefore training:")
    untrained = ["do_train=false", "do_eval=true", "eval_strategy=no", f"output_dir={folder / 'before'}"]
    before = train(load_config([str(case), *overrides, *untrained], command="train"))
    log.info("\ntraining:")
    config = load_config([str(case), *overrides], command="train")
    after = train(config)

    output, questions = Path(config.training.output_dir), DATA / "dates_test.jsonl"
    # As it was typed, so that a line can be pasted: jtune may be in a virtual environment that is not active.
    jtune = "jtune" if which("jtune") or Path(sys.argv[0]).name != "jtune" else sys.argv[0]
    log.info("\nquestions about unseen dates, and the answers of the model:")
    show_answers(output, questions)
    number = len(questions.read_text().splitlines())
    exact = [100 * results["eval_exact_match"] for results in (before, after)]
    lines = [
        f"\nexact match on {number} unseen questions: {exact[0]:.0f}% before, {exact[1]:.0f}% after, "
        f"in {time.monotonic() - began:.0f} seconds",
        f"the loss:      {output / 'training_loss.png'}",
        f"the model:     {output}, which transformers loads too",
        f"the case:      {case}",
        f"look at it:    {jtune} data {case}",
        f"talk to it:    {jtune} chat {case}",
        f"change it:     {jtune} train {case} num_train_epochs=3 output_dir=out/shorter",
        f"prefer:        {jtune} train {preferring}   (dates in words without a year; then {jtune} chat {preferring})",
        "your own data: see README.md",
    ]
    log.info("%s", "\n".join(lines))


def split_folder(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder among the words, and the other words.

    >>> split_folder(["max_steps=2", "out/a", "--seed", "1"])
    (PosixPath('out/a'), ['max_steps=2', '--seed', '1'])
    """
    rest, after_flag = list(words), False
    for i, word in enumerate(words):
        is_argument = "=" in word or word.startswith("--")
        if not is_argument and not after_flag:
            return Path(rest.pop(i)), rest
        after_flag = word.startswith("--") and "=" not in word
    return Path("out/quickstart"), rest


def _with_paths(yaml: str, paths: Mapping[str, Path]) -> str:
    """The YAML with its paths filled in."""
    lines = []
    for line in yaml.splitlines():
        key = line.split(":")[0]
        lines.append(f"{key}: {paths[key]}" if key in paths else line)
    return "\n".join(lines) + "\n"


def show_answers(model_folder: Path, questions: Path) -> None:
    """Print the first few questions of a file, the model's answers, and what was expected where they differ."""
    model, params = load_model(str(model_folder))
    tokenizer = load_tokenizer(str(model_folder))
    template = get_template("chatml", tokenizer)
    rows = [json.loads(line) for line in questions.read_text().splitlines()[:SHOWN]]
    asked = [[{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}] for row in rows]
    greedy = Sampling(max_new_tokens=LONGEST, eos_ids=template.stop_ids)
    answers = generate(model, params, [template.prompt(messages) for messages in asked], greedy)
    for row, answer in zip(rows, map(tokenizer.decode, answers)):
        verdict = "" if answer == row["output"] else f"   (expected: {row['output']})"
        log.info("  %-34s %-12s -> %s%s", row["instruction"], row["input"], answer, verdict)
