"""Encoded sets in a folder, `tokenized_path`: made once, where the rows are, and read wherever the run is.

jtune_data.json     what they were made with, what became of the rows, and which files are a set
parts/*.arrow       rows (see cache/shards.py)
<set>.npy           which of them are examples, where not all are
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jtune.config import DataArguments
from jtune.config.stages import StageRules
from jtune.data.cache.shards import open_shards
from jtune.data.encode.encoded import Encoded
from jtune.data.report import SetReport, report_of
from jtune.data.templates.template import Template
from jtune.errors import DataError
from jtune.files import atomic_write

INDEX = "jtune_data.json"  # written last: a folder without it is not complete
PARTS = "parts"
# Arguments that say how it is done, not what comes out.
NO_MATTER = (
    *("overwrite_cache", "tokenized_path", "preprocessing_num_workers", "max_dropped", "dataset_dir"),
    *("streaming", "buffer_size"),  # what is streamed is kept nowhere
)


def settings_of(
    data_args: DataArguments, stage: StageRules, seed: int, template: Template, *, evaluated: str | None
) -> dict[str, Any]:
    """What encoded sets depend on, as JSON has it.

    Args:
      evaluated: the stage that evaluation sets are encoded for; None: there are none.
    """
    given = {key: value for key, value in asdict(data_args).items() if key not in NO_MATTER}
    made = given | {
        "stage": stage.name,
        "seed": seed,
        "tokenizer and template": template.key,
        "evaluation sets": evaluated,
    }
    return json.loads(json.dumps(made, default=str))


def parts(folder: Path) -> Path:
    """Where the files of encoded rows lie."""
    return folder / PARTS


def save(folder: Path, sets: Mapping[str, tuple[Encoded, SetReport]], settings: Mapping[str, Any]) -> None:
    """Write what the sets are, and what they were made with. Their rows are in `parts(folder)`, or are put there."""
    index: dict[str, Any] = {"settings": settings, "sets": {}}
    used = set()
    for name, (encoded, report) in sets.items():
        files = [Path(file["filename"]) for file in encoded.table.cache_files]
        if encoded.kept is not None:
            np.save(folder / f"{name}.npy", encoded.kept)
        about = {"prefix": encoded.prefix, "all": encoded.kept is None, "report": asdict(report)}
        index["sets"][name] = about | {
            "fingerprint": encoded.table._fingerprint,
            "files": [file.name for file in files],
        }
        used |= {file.name for file in files}
    for file in parts(folder).iterdir():
        if file.name not in used:  # of a run that was cut short, with other settings
            file.unlink()
    with atomic_write(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=1, ensure_ascii=False), encoding="utf-8")


def load(folder: Path, settings: Mapping[str, Any]) -> dict[str, tuple[Encoded, SetReport]] | None:
    """The sets in `folder`; None if it holds none.

    Raises:
      DataError: it holds something else, or they were made with other settings.
    """
    path = folder / INDEX
    if not path.exists():
        if folder.is_dir() and any(file.name != PARTS and file.name[0] != "." for file in folder.iterdir()):
            raise DataError(
                f"tokenized_path {folder} holds something, but no {INDEX}: it was not written by jtune, or not to its "
                "end. Give another folder, or empty it"
            )
        return None
    index = json.loads(path.read_text(encoding="utf-8"))
    then = index["settings"]
    differing = [
        key if "template" in key else f"{key} ({json.dumps(then.get(key))} then, {json.dumps(settings.get(key))} now)"
        for key in sorted({*then, *settings})
        if then.get(key) != settings.get(key)
    ]
    if differing:
        raise DataError(
            f"tokenized_path {folder} was made with other settings: {', '.join(differing)}. Set them back, or give "
            "another folder"
        )
    sets = {}
    for name, about in index["sets"].items():
        kept = None if about["all"] else np.load(folder / f"{name}.npy", allow_pickle=False)
        report = report_of(about["report"])
        table = open_shards([parts(folder) / file for file in about["files"]], about["fingerprint"])
        sets[name] = Encoded(table, kept, about["prefix"]), report
    return sets
