"""The state that a run starts from: that of its newest checkpoint, or a new one."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jtune.config import TrainingArguments
from jtune.data import Plan, Stream, StreamPlan
from jtune.losses.units import UnitObjective
from jtune.train.identity import Run
from jtune.train.loop import Progress
from jtune.train.program import Program
from jtune.train.restore import check_stream, restore_checked, restore_newest
from jtune.train.start import begin, check_not_beyond, check_same_run, saved_run, start_point, take_up
from jtune.train.state import TrainState, init_state, shardings_of
from jtune.train.timing import Timing, lost

log = logging.getLogger("jtune")


class Started(NamedTuple):
    """Where a run stands before its first update."""

    state: TrainState
    progress: Progress


def start_or_resume(
    training: TrainingArguments,
    run: Run,
    program: Program,
    trainable: Any,
    plan: Plan,
    stream: Stream | None,
    timing: Timing,
) -> Started:
    """Restore the checkpoint that this run goes on from, or make the state of a run that begins.

    Args:
      trainable: the parameters that train, as they were read; donated where the run begins.
      plan: a stream's is moved to where the checkpoint stood.
      timing: gets the seconds of earlier starts, and what they lost.

    Raises:
      CheckpointError: no checkpoint can be read, or they are another run's.
    """
    output_dir = Path(training.output_dir)
    checkpoint = start_point(output_dir, training, run)
    if checkpoint is None:
        started = Started(new_state(program, trainable), Progress())
    else:
        started = resume(checkpoint, training, run, program, plan, stream, timing)
    begin(output_dir, training, run)
    return started


def new_state(program: Program, trainable: Any) -> TrainState:
    """The state before the first update; `trainable` is donated."""
    float16 = program.state.loss_scale is not None
    running = program.objective.running if isinstance(program.objective, UnitObjective) else None
    make = lambda trainable: init_state(trainable, program.tx, float16=float16, running=running)
    return jax.jit(make, out_shardings=shardings_of(program.state), donate_argnums=0)(trainable)


def resume(
    checkpoint: Path,
    training: TrainingArguments,
    run: Run,
    program: Program,
    plan: Plan,
    stream: Stream | None,
    timing: Timing,
) -> Started:
    """Restore `checkpoint`, or, where it was not asked for by name and is damaged, the newest that is whole."""
    output_dir = Path(training.output_dir)

    def check(path: Path, meta: Mapping[str, Any]) -> None:
        check_same_run(path, saved_run(meta), run)
        check_not_beyond(path, meta["progress"]["step"], plan.max_steps)
        check_stream(path, meta, stream)

    if str(checkpoint) == training.resume_from_checkpoint:
        restored = restore_checked(checkpoint, program.state, check)
    else:
        restored = restore_newest(output_dir, program.state, check)
        assert restored is not None, "checkpoints were found"
    checkpoint, state, meta = restored
    progress = Progress.from_dict(meta["progress"])
    if isinstance(plan, StreamPlan):
        plan.seek(meta["stream"])
    earlier = meta.get("seconds", {})
    timing.add(earlier | {"lost": earlier.get("lost", 0.0) + lost(output_dir / "trainer_log.jsonl", earlier)})
    log.info("resumed from %s: %d of %d updates are done", checkpoint, progress.step, plan.max_steps)
    take_up(progress, output_dir, training, saved_run(meta), run, max_steps=plan.max_steps)
    return Started(state, progress)
