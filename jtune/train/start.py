"""What a start finds in its output folder, and what it does with it: go on, begin, or refuse.

`run.json` says which run the folder belongs to and whether it has finished. It is written when a run begins, after the
last thing that may refuse to start, and once more at its end. So a run that was cut short is known for what it is: the
same command goes on with it, also with `overwrite_output_dir: true`, and also where nothing was saved yet.
"""

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from jtune import __version__
from jtune.config import TrainingArguments
from jtune.config.run_folder import MANIFEST
from jtune.distributed import connect, exchange
from jtune.errors import CheckpointError, ConfigError
from jtune.train import files
from jtune.train.callbacks.trackers import RUNS
from jtune.train.checkpoint_folder import Damaged, find_checkpoints, is_ours, read_meta, saved_by_others, saved_by_us
from jtune.train.identity import Run, changed_arguments, describe_course, differences
from jtune.train.loop import Progress
from jtune.train.results import write_json

log = logging.getLogger("jtune")

# What a finished run leaves. Only a log, and no checkpoint: a run that was cut short before its first one.
_FINISHED = ("trainer_state.json", "adapter_config.json", "config.json", "all_results.json")
_FRESH = "to start from the beginning: overwrite_output_dir=true resume_from_checkpoint=false"
_DONE = "to train further, raise num_train_epochs or max_steps; to train again, overwrite_output_dir=true"
RECORD = "run.json"
# Files of a run besides its model.
_OF_A_RUN = (
    RECORD,
    "trainer_log.jsonl",
    "trainer_state.json",
    RUNS,
    "eval_samples.jsonl",
    "generated_predictions.jsonl",
    *(f"{kind}_results.json" for kind in ("all", "train", "eval", "predict")),
)
_OF_A_MODEL = ("config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
               MANIFEST)  # fmt: skip
# Arguments without which the best evaluation so far cannot be compared with those to come.
_BEST = ("metric_for_best_model", "greater_is_better", "eval_dataset", "eval_on_each_dataset")


class Record(NamedTuple):
    """The content of `run.json`."""

    identity: Mapping[str, Any]
    arguments: Mapping[str, Any]
    finished: bool
    resume_from_checkpoint: str | bool | None = None  # as the run was begun with
    jtune: str = ""


class Found(NamedTuple):
    """What lies in an output folder."""

    resumable: list[Path]  # checkpoints with training state, oldest first
    models: list[str]  # names of checkpoints of jtune's without it
    foreign: list[str]  # names of checkpoints of another program
    left: list[str]  # names of files that a finished run leaves
    record: Record | None


# ---------------------------------------------------------------------- before anything is read


def look(output_dir: Path) -> Found:
    """What lies in `output_dir`."""
    resumable = find_checkpoints(output_dir)
    return Found(
        resumable,
        [path.name for path in saved_by_us(output_dir) if path not in resumable],
        [path.name for path in saved_by_others(output_dir)],
        [name for name in _FINISHED if (output_dir / name).exists()],
        _read_record(output_dir, resumable),
    )


def check_start(output_dir: Path, training: TrainingArguments, arguments: Mapping[str, Any]) -> None:
    """Make the output folder; refuse to start if that can be told before data and model are read.

    Raises:
      ConfigError: the folder is taken, or cannot be written.
      CheckpointError: `resume_from_checkpoint` is not a complete checkpoint; or an argument makes this another run than
        the one that would be resumed.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {output_dir} cannot be made: {error.strerror}") from error
    if not os.access(output_dir, os.W_OK):
        raise ConfigError(f"output_dir: {output_dir} cannot be written")
    for path in (output_dir / name for name in _OF_A_RUN + _OF_A_MODEL):
        if path.exists() and not path.is_file():
            raise ConfigError(f"output_dir: {path} is not a file: the run would write one of this name. Move it away.")
    if not training.do_train:
        return
    found, resume_from = look(output_dir), training.resume_from_checkpoint
    if isinstance(resume_from, str):
        _check_resumable(Path(resume_from))
        then = read_meta(Path(resume_from)).get("arguments", {})
        check_same_run(Path(resume_from), Run({}, then), Run({}, arguments))
    if resume_from is True and not found.resumable:
        raise CheckpointError(f"resume_from_checkpoint: {_why_none(output_dir, found)}")
    if training.overwrite_output_dir:
        return
    if found.resumable and resume_from is False and not _restarted(found.record, training):
        raise ConfigError(
            f"resume_from_checkpoint is false, but {output_dir} holds checkpoints of an earlier run.\n"
            "Give another output_dir, or overwrite_output_dir=true to replace it."
        )
    own = bool(found.resumable) or (found.record is not None and not found.record.finished)
    if found.foreign and not own:
        newest = output_dir / found.foreign[-1]
        raise ConfigError(
            f"output_dir: {output_dir} holds checkpoints of another program ({', '.join(found.foreign)}), whose "
            f"training state jtune does not read.\nGive another output_dir, with {_weights(newest)} to start from its "
            "weights; or overwrite_output_dir=true to train here, which leaves them alone."
        )
    if found.left and not own and not isinstance(resume_from, str):
        raise ConfigError(_taken(output_dir, found.left))
    if found.resumable and not isinstance(resume_from, str) and found.record is not None:
        check_same_run(found.resumable[-1], Run({}, found.record.arguments), Run({}, arguments))


def _check_resumable(path: Path) -> None:
    if not path.is_dir() or (path / "resume.json").exists():
        return  # `read_meta` says what is wrong
    what = "holds a model without the state that resuming needs (save_only_model)"
    if not is_ours(path):
        what = "is not a jtune checkpoint: the training state of other programs is not read"
    raise CheckpointError(
        f"resume_from_checkpoint: {path} {what}.\n"
        f"To start from its weights: {_weights(path)}, without resume_from_checkpoint."
    )


def _weights(path: Path) -> str:
    """The argument that starts a run from the model in a folder."""
    is_adapter = (path / "adapter_config.json").exists()
    return f"{'adapter_name_or_path' if is_adapter else 'model_name_or_path'}={path}"


def _why_none(output_dir: Path, found: Found) -> str:
    models = f"; {', '.join(found.models)}: models without training state (save_only_model)" if found.models else ""
    foreign = f"; {', '.join(found.foreign)}: another program's" if found.foreign else ""
    return f"there is no checkpoint in {output_dir}{models}{foreign}"


def _taken(output_dir: Path, left: list[str]) -> str:
    further = f" To train further what it holds: {_weights(output_dir)} and another output_dir."
    has_model = {"adapter_config.json", "config.json"} & set(left)
    return (
        f"output_dir: {output_dir} holds another run ({', '.join(left)}) and no checkpoint to resume from.\n"
        "Give another output_dir, or overwrite_output_dir=true to replace it." + further * bool(has_model)
    )


def _restarted(record: Record | None, training: TrainingArguments) -> bool:
    """Whether a launcher has started again the run that the record is of: it goes on, whatever it was begun with."""
    began_with_it = record is None or record.resume_from_checkpoint == training.resume_from_checkpoint
    return bool(os.environ.get("JTUNE_RESTARTED")) and began_with_it


# ---------------------------------------------------------------------- when it is known which run this is


def start_point(output_dir: Path, training: TrainingArguments, run: Run) -> Path | None:
    """The checkpoint to go on from; None to begin, for which the folder is cleared. To be called by all processes, when
    nothing is left that may refuse to start.

    As in LLaMA-Factory, an explicit `resume_from_checkpoint` wins; else a folder with checkpoints is resumed unless
    `overwrite_output_dir`. Other than there, that argument means a run that has finished, or another one: the same run,
    cut short, is gone on with, unless `resume_from_checkpoint` is false. A launcher that starts the same command again
    sets JTUNE_RESTARTED: then the run goes on whatever it was begun with.

    Raises:
      ConfigError, CheckpointError: the folder, or the checkpoint, belongs to another run.
    """
    found = exchange.from_first("start", lambda: _decide(output_dir, training, run))
    return None if found is None else Path(found)


def _decide(output_dir: Path, training: TrainingArguments, run: Run) -> str | None:
    found, resume_from = look(output_dir), training.resume_from_checkpoint
    if found.foreign:
        log.info("%s: another program's, left alone", ", ".join(found.foreign))
    record, restarted = found.record, _restarted(found.record, training)
    newest = found.resumable[-1] if found.resumable else None
    changed = differences(Run(record.identity, record.arguments), run) if record else []
    same = record is not None and not changed
    if isinstance(resume_from, str) and not (restarted and newest and same):
        return resume_from
    unfinished = same and record is not None and not record.finished
    fresh = resume_from is False and not restarted
    if newest and resume_from is not True and training.overwrite_output_dir:
        # A launcher starts a run that has ended again, too, when another of its processes was lost on the way out.
        ended = restarted and (record is None or (same and record.arguments == run.arguments))
        if not fresh and (unfinished or ended):
            log.info("%s holds an unfinished run of the same data and settings: going on (%s)", output_dir, _FRESH)
            return str(newest)
    elif newest:
        if resume_from is not True:
            log.info("resuming from %s (%s)", newest, _FRESH)
        if found.models:
            log.info("%s: models without training state (save_only_model)", ", ".join(found.models))
        return str(newest)
    begins_again = unfinished and not fresh
    left = [*found.left, *found.models] if record and not record.finished else []
    if left and changed and not training.overwrite_output_dir:
        raise ConfigError("\n  ".join([_taken(output_dir, left), *changed]))
    if begins_again or found.models:
        _say_what_is_begun(output_dir, found.models, removed=training.overwrite_output_dir and not begins_again)
    _clear(output_dir, checkpoints=training.overwrite_output_dir and not begins_again)
    return None


def _say_what_is_begun(output_dir: Path, models: list[str], *, removed: bool) -> None:
    if removed:
        return  # `_clear` says so
    if models:
        log.info(
            "beginning from the beginning: %s hold models without training state (save_only_model); each stays until "
            "the run comes to its number",
            ", ".join(models),
        )
    else:
        log.info("%s holds this run, cut short before it saved a checkpoint: beginning again", output_dir)


def _clear(output_dir: Path, *, checkpoints: bool) -> None:
    """Forget an earlier run: its logs, and its checkpoints, which would be mistaken for this run's."""
    ours = saved_by_us(output_dir) if checkpoints else []
    if ours:
        log.info("overwrite_output_dir: removing %d checkpoints of an earlier run in %s", len(ours), output_dir)
    for path in ours:
        files.remove(path)
        if os.path.lexists(path):
            raise ConfigError(f"output_dir: {path} cannot be removed, and must not be taken for this run's")
    for name in _OF_A_RUN:
        (output_dir / name).unlink(missing_ok=True)


def saved_run(meta: Mapping[str, Any]) -> Run:
    """Which run a checkpoint is of. Older code has saved no arguments: none are compared then."""
    return Run(meta["identity"], meta.get("arguments", {}))


def check_same_run(path: Path, then: Run, now: Run) -> None:
    """Refuse to resume when the checkpoint's data, batches, base model or arguments are not what this run has.

    Raises:
      CheckpointError: with each difference.
    """
    changed = differences(then, now)
    if not changed:
        return
    course = describe_course(then, now)
    more = f"\n  besides, {course}" if course else ""
    raise CheckpointError(
        f"{path} belongs to another run, or its inputs have changed:\n  " + "\n  ".join(changed) + more + "\n"
        "Resume with what it was started with, give another output_dir, or overwrite_output_dir=true. To train what it "
        f"holds in another way: {_weights(path)} and another output_dir."
    )


def check_not_beyond(path: Path, step: int, max_steps: int) -> None:
    """Refuse to resume where more updates are done than the run is to make.

    Raises:
      CheckpointError: they are.
    """
    if step > max_steps:
        raise CheckpointError(
            f"{path}: {step} updates are done, and this run is to make {max_steps} (num_train_epochs, max_steps).\n"
            "Raise them to train further; or give another output_dir, or overwrite_output_dir=true to begin again."
        )


def take_up(
    progress: Progress, output_dir: Path, training: TrainingArguments, then: Run, now: Run, *, max_steps: int
) -> None:
    """Name what changes from here on, and forget the best evaluation of `progress` if it cannot be used any more."""
    course = describe_course(then, now)
    if course and progress.step < max_steps:
        log.info("%s from update %d on", course, progress.step + 1)
    elif course:
        log.warning("%s, but all %d updates are done already (%s)", course, max_steps, _DONE)
    elif progress.step >= max_steps:
        log.info("all %d updates are done already (%s)", max_steps, _DONE)
    if progress.best_step is None:
        return
    other = [name for name, *_ in changed_arguments(then.arguments, now.arguments, "course") if name in _BEST]
    best = output_dir / f"checkpoint-{progress.best_step}" / "resume.json"
    lost = training.load_best_model_at_end and not exchange.from_first("best", best.is_file)
    if other or lost:
        why = f"{', '.join(other)} changed" if other else f"{best.parent} is not there, or holds a model only"
        log.info("the best evaluation so far, of update %d, is forgotten: %s", progress.best_step, why)
        progress.best_metric = progress.best_step = None
        progress.evaluations_without_gain = 0


# ---------------------------------------------------------------------- the record


def begin(output_dir: Path, training: TrainingArguments, run: Run) -> None:
    """Write down that this run has the output folder from now on, and what its command needs to go on with it."""
    _write(output_dir, Record(*run, finished=False, resume_from_checkpoint=training.resume_from_checkpoint))
    words = ["overwrite_output_dir=false"] if training.overwrite_output_dir else []
    if training.resume_from_checkpoint not in (None, True):
        words.append("resume_from_checkpoint=true")
    connect.go_on_with(*words)


def mark_finished(output_dir: Path, training: TrainingArguments, run: Run) -> None:
    """Write down that nothing is left to be done of this run."""
    _write(output_dir, Record(*run, finished=True, resume_from_checkpoint=training.resume_from_checkpoint))


def _write(output_dir: Path, record: Record) -> None:
    write_json(output_dir / RECORD, record._replace(jtune=__version__)._asdict())


def _read_record(output_dir: Path, resumable: list[Path]) -> Record | None:
    """The record; None if there is none, as of a run of older code.

    In the place of one that is damaged, what the newest checkpoint says: an unfinished run must not be taken for one
    that may be overwritten.
    """
    path = output_dir / RECORD
    if not os.path.lexists(path):
        return None
    try:
        fields = json.loads(path.read_bytes())
        record = Record(**{name: fields[name] for name in Record._fields if name in fields})
        whole = isinstance(record.identity, dict) and isinstance(record.arguments, dict)
        if whole and isinstance(record.finished, bool):
            return record
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    finished = all((output_dir / name).exists() for name in ("trainer_state.json", "all_results.json"))
    for checkpoint in reversed(resumable):
        with suppress(Damaged):
            return Record(*saved_run(read_meta(checkpoint)), finished)
    return None
