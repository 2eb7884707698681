"""Writes the quickstart's data sets: questions about dates, with dates held out that no training row mentions, and
pairs of answers to some of them.

    python -m jtune.quickstart.make_data [FOLDER]

The same numbers always give the same files.
"""

import json
import sys
from datetime import date, timedelta
from pathlib import Path
from random import Random

FOLDER = Path(__file__).parent / "data"
FIRST, LAST = date(1950, 1, 1), date(2049, 12, 31)
TRAIN_DATES, TEST_DATES, PAIR_DATES = 1800, 100, 200


def questions(day: date) -> list[dict[str, str]]:
    """Three questions about one date, in the alpaca format."""
    words = f"{day.day} {day:%B} {day.year}"
    return [
        {"instruction": "Write this date in words.", "input": day.isoformat(), "output": words},
        {"instruction": "Write this date in digits.", "input": words, "output": day.isoformat()},
        {"instruction": "Which month is it?", "input": day.isoformat(), "output": f"It is {day:%B}."},
    ]


def pairs(day: date) -> list[dict[str, str]]:
    """The questions about one date, each with the answer that is preferred. In words the date is to lose its year;
    other answers are to stay as they are, and not to lose their ends."""
    words, *others = questions(day)
    learned = words.pop("output")
    preferred = [words | {"chosen": f"{day.day} {day:%B}", "rejected": learned}]
    for question in others:
        answer = question.pop("output")
        preferred.append(question | {"chosen": answer, "rejected": answer[:-3].rstrip()})
    return preferred


def write(folder: Path) -> None:
    random = Random(0)
    span = (LAST - FIRST).days + 1
    days = [FIRST + timedelta(days=n) for n in random.sample(range(span), TRAIN_DATES + TEST_DATES)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("dates_train", days[:TRAIN_DATES]), ("dates_test", days[TRAIN_DATES:])):
        rows = [row for day in part for row in questions(day)]
        random.shuffle(rows)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preferred = [row for day in days[:PAIR_DATES] for row in pairs(day)]
    random.shuffle(preferred)
    (folder / "dates_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preferred))
    info: dict[str, dict] = {name: {"file_name": f"{name}.jsonl"} for name in ("dates_train", "dates_test")}
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info["dates_pairs"] = {"file_name": "dates_pairs.jsonl", "ranking": True, "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
