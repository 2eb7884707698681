"""How each tracker's own library is used: its run is opened, gets numbers, and is closed.

The libraries read their own variables (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, SWANLAB_MODE, ...); an argument
that was given takes precedence. Metrics have the names that Hugging Face's callback of the same tracker gives them.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from jtune.config import Config, TrainingArguments
from jtune.train.callbacks.tags import tag

Outcome = Literal["finished", "stopped", "failed"]
Numbers = Mapping[str, float]
STEP = "train/global_step"
LONGEST = 6000  # characters of a parameter's value in MLflow
AT_ONCE = 100  # parameters in one request to MLflow


class Session(NamedTuple):
    """What a tracker is told of a run."""

    arguments: dict[str, Any]  # all, secrets blanked
    training: TrainingArguments
    given: frozenset[str]  # names of the arguments that were given
    run_id: str | None = None  # of the tracker's run to go on with

    def if_given(self, name: str) -> Any:
        """The value of an argument, None unless it was given: then the library's own variable decides."""
        return getattr(self.training, name) if name in self.given else None


class Handle(NamedTuple):
    """A tracker's run."""

    run_id: str
    log: Callable[[Numbers, int], None]  # (numbers by Trainer's names, updates done)
    finish: Callable[[Outcome], None]


def session_of(config: Config) -> Session:
    return Session(config.to_dict(), config.training, frozenset(config.origins))


def tagged(metrics: Numbers, step: int) -> dict[str, float]:
    """
    >>> tagged({"loss": 1.5, "epoch": 0.1}, 3)
    {'train/loss': 1.5, 'train/epoch': 0.1, 'train/global_step': 3}
    """
    return {tag(key): value for key, value in metrics.items()} | {STEP: step}


def start_wandb(session: Session) -> Handle:
    import wandb  # pyright: ignore[reportMissingImports]

    # wandb would send what is printed, too, and for that take the place of stdout: a part of the run, not beside it.
    settings = None if "WANDB_CONSOLE" in os.environ else wandb.Settings(console="off")
    run = wandb.init(
        project=session.if_given("project") or os.environ.get("WANDB_PROJECT") or session.training.project,
        name=session.training.run_name,
        id=session.run_id,
        resume="allow" if session.run_id else None,
        settings=settings,
    )
    run.config.update(session.arguments, allow_val_change=True)
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    return Handle(
        run.id,
        log=lambda metrics, step: run.log(tagged(metrics, step)),
        finish=lambda outcome: run.finish(exit_code=int(outcome != "finished")),
    )


def start_mlflow(session: Session) -> Handle:
    """Metrics keep Trainer's names here (`loss`, `eval_loss`), as in Hugging Face's callback."""
    import mlflow  # pyright: ignore[reportMissingImports]

    if project := session.if_given("project"):
        mlflow.set_experiment(project)
    try:
        run = mlflow.start_run(run_id=session.run_id) if session.run_id else None
    except mlflow.MlflowException:  # of another server, or deleted
        run = None
    if run is None:
        run = mlflow.start_run(run_name=session.training.run_name)
        # Parameters cannot be changed: a run that goes on keeps those that it began with.
        items = [(name, str(value)[:LONGEST]) for name, value in session.arguments.items()]
        for first in range(0, len(items), AT_ONCE):
            mlflow.log_params(dict(items[first : first + AT_ONCE]))

    def log(metrics: Numbers, step: int) -> None:
        mlflow.log_metrics({re.sub(r"[^\w\-. :/]", "_", key): value for key, value in metrics.items()}, step=step)

    status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    return Handle(run.info.run_id, log, finish=lambda outcome: mlflow.end_run(status=status[outcome]))


def start_swanlab(session: Session) -> Handle:
    import swanlab  # pyright: ignore[reportMissingImports]

    training, mode = session.training, session.if_given("swanlab_mode")
    mode = "online" if mode == "cloud" else mode  # its name in this library
    if training.swanlab_api_key:
        swanlab.login(api_key=training.swanlab_api_key)
    wishes = {
        "project": session.if_given("swanlab_project") or os.environ.get("SWANLAB_PROJECT") or training.swanlab_project,
        "workspace": training.swanlab_workspace,
        "experiment_name": training.swanlab_run_name or training.run_name,
        "mode": mode,
        "logdir": training.swanlab_logdir,
        "id": session.run_id,
        "resume": "allow" if session.run_id else None,
    }
    run = swanlab.init(config=session.arguments, **{name: wish for name, wish in wishes.items() if wish is not None})
    state = {"finished": "success", "stopped": "aborted", "failed": "crashed"}
    return Handle(
        run.id,
        log=lambda metrics, step: run.log(tagged(metrics, step), step=step),
        finish=lambda outcome: run.finish(state=state[outcome]),
    )


def start_trackio(session: Session) -> Handle:
    """trackio knows a run by its name."""
    import trackio  # pyright: ignore[reportMissingImports]

    run = trackio.init(
        project=session.training.project,
        name=session.run_id or session.training.run_name,
        space_id=session.training.trackio_space_id,
        config=session.arguments,
        resume="allow" if session.run_id else "never",
    )
    return Handle(
        run.name,
        log=lambda metrics, step: run.log(tagged(metrics, step), step=step),
        finish=lambda outcome: run.finish(),
    )
