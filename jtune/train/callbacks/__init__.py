"""Callbacks: what listens to a run. Each is a subscriber of `jtune.train.events`."""

import logging
import sys
from pathlib import Path

from jtune.config import TrainingArguments
from jtune.distributed import processes
from jtune.train.callbacks.logs import log_file, samples_file
from jtune.train.callbacks.profile import profile
from jtune.train.callbacks.tensorboard import tensorboard
from jtune.train.callbacks.terminal import progress_bar, progress_lines
from jtune.train.events import Subscriber

log = logging.getLogger("jtune")


def subscribers(training: TrainingArguments, output_dir: Path, start: int, max_steps: int) -> list[Subscriber]:
    """Those that `report_to` and the terminal ask for; on the first of several processes."""
    if not processes.is_first():
        return []
    found = [log_file(output_dir / "trainer_log.jsonl", start)]
    if training.eval_samples:
        found.append(samples_file(output_dir / "eval_samples.jsonl", start))
    if training.profile_steps is not None:
        first, last = map(int, training.profile_steps.split("-"))
        found.append(profile(output_dir / "profile", first, last, start))
    if {"tensorboard", "all"} & set(training.report_to):
        found.append(tensorboard(Path(training.logging_dir or output_dir / "runs")))
    if sys.stdout.isatty() and not training.disable_tqdm:
        found.append(progress_bar(start, max_steps))
    else:
        found.append(progress_lines(start))
    return found
