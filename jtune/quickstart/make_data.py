"""Writes the quickstart's data set: questions about dates, with dates held out that no training row mentions.

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
TRAIN_DATES, TEST_DATES = 1800, 100


def questions(day: date) -> list[dict[str, str]]:
    """Three questions about one date, in the alpaca format."""
    words = f"{day.day} {day:%B} {day.year}"
    return [
        {"instruction": "Write this date in words.", "input": day.isoformat(), "output": words},
        {"instruction": "Write this date in digits.", "input": words, "output": day.isoformat()},
        {"instruction": "Which month is it?", "input": day.isoformat(), "output": f"It is {day:%B}."},
    ]


def write(folder: Path) -> None:
    random = Random(0)
    span = (LAST - FIRST).days + 1
    days = [FIRST + timedelta(days=n) for n in random.sample(range(span), TRAIN_DATES + TEST_DATES)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("dates_train", days[:TRAIN_DATES]), ("dates_test", days[TRAIN_DATES:])):
        rows = [row for day in part for row in questions(day)]
        random.shuffle(rows)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = {name: {"file_name": f"{name}.jsonl"} for name in ("dates_train", "dates_test")}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
