"""`jtune quickstart [FOLDER] [key=value ...]`: train a small model from nothing, and show what it has learned."""

import json
import logging
import sys
import time
from collections.abc import Sequence
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


def quickstart(argv: Sequence[str] = ()) -> int:
    """Returns the exit status, 0.

    Args:
      argv: where to write (default `out/quickstart`), and arguments that override the YAML's.
    """
    began = time.monotonic()
    overrides = [word for word in argv if "=" in word]
    folder = Path(next((word for word in argv if "=" not in word), "out/quickstart"))
    case = folder / "quickstart.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    case.write_text(_with_paths(DATA.with_name("quickstart.yaml").read_text(), folder))
    log.info("what is run: %s", case)

    log.info("\nbefore training:")
    untrained = ["do_train=false", "do_eval=true", "eval_strategy=no", f"output_dir={folder / 'before'}"]
    before = train(load_config([str(case), *overrides, *untrained], command="train"))
    log.info("\ntraining:")
    config = load_config([str(case), *overrides], command="train")
    after = train(config)

    output = Path(config.training.output_dir)
    # As it was typed, so that what is printed can be pasted: jtune may lie in a virtual environment that is not active.
    command = "jtune" if which("jtune") or Path(sys.argv[0]).name != "jtune" else sys.argv[0]
    log.info("\nquestions about dates that it has not seen, and its answers:")
    show_answers(output, DATA / "dates_test.jsonl")
    log.info(
        "\nexact match on %d unseen questions: %.0f%% before, %.0f%% after, in %.0f seconds\n"
        "the loss:      %s\n"
        "the model:     %s, which transformers loads too\n"
        "the run:       %s\n"
        "look at it:    %s data %s\n"
        "talk to it:    %s chat %s\n"
        "change it:     %s train %s num_train_epochs=3 output_dir=out/shorter\n"
        "your own data: see README.md",
        len((DATA / "dates_test.jsonl").read_text().splitlines()),
        100 * before["eval_exact_match"],
        100 * after["eval_exact_match"],
        time.monotonic() - began,
        output / "training_loss.png",
        output,
        case,
        command,
        case,
        command,
        case,
        command,
        case,
    )
    return 0


def _with_paths(yaml: str, folder: Path) -> str:
    """The YAML with its three paths filled in."""
    paths = {
        "model_name_or_path": MODEL,
        "dataset_dir": DATA,
        "output_dir": folder / "run",
    }
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
