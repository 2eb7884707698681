"""The loop: when things happen, in which order, and what it writes down. No model is needed to see it."""

import math
import os
import signal

import jax.numpy as jnp
import pytest

from jtune.errors import NonFiniteError
from jtune.train.loop import Cadence, Hooks, Improvement, Progress, run_loop
from jtune.train.step import Metrics


def run(cadence, *, progress=None, subscribers=(), losses=None, evaluations=None, improvement=None, on_update=None):
    """A run whose update k has loss `losses[k]` (default k); returns (progress, events, outcome)."""
    progress = progress or Progress()
    events = []
    scores = iter(evaluations or [])

    def update(state, batch, rate):
        if on_update:
            on_update(batch)
        loss = batch if losses is None else losses[batch]
        values = (jnp.float32(loss), jnp.float32(1.0), jnp.float32(10), jnp.bool_(math.isfinite(loss)))
        return state + 1, Metrics(*values)

    def watch(event):
        events.append((event.kind, event.step))

    hooks = Hooks(
        prepare=lambda step: step,
        update=update,
        tokens=lambda step: 10,
        epoch_at=lambda step: step / cadence.updates_per_epoch,
        evaluate=(lambda state: {"eval_loss": next(scores)}) if evaluations else None,
        save=lambda state, progress: events.append(("saved", progress.step)),
        poll=lambda: None,
        explain=lambda index: f"rows of {index}",
    )
    subs = [watch, *subscribers]
    _, outcome = run_loop(
        progress.step, progress, cadence, lambda step: 0.1 * step, hooks, subs, improvement or Improvement()
    )
    return progress, events, outcome


def test_a_log_is_the_mean_of_the_losses_since_the_last_and_the_rate_of_its_update():
    progress, _, outcome = run(Cadence(7, 100, logging_steps=3, save_strategy="no"))
    assert outcome == "done"
    assert [r["step"] for r in progress.log_history] == [3, 6]
    assert [r["loss"] for r in progress.log_history] == [1.0, 4.0]
    assert progress.log_history[1]["learning_rate"] == pytest.approx(0.5)
    assert progress.total_loss == sum(range(7))
    assert progress.tokens == 70


def test_log_comes_before_evaluation_and_evaluation_before_saving():
    cadence = Cadence(4, 100, logging_steps=2, eval_strategy="steps", eval_steps=2, save_steps=2)
    _, events, _ = run(cadence, evaluations=[2.0, 1.0])
    at_2 = [kind for kind, step in events if step == 2]
    assert at_2 == ["step", "log", "evaluate", "saved", "save"]


def test_the_last_update_is_evaluated_and_saved_whatever_the_interval():
    cadence = Cadence(5, 100, logging_steps=100, eval_strategy="steps", eval_steps=3, save_steps=4)
    _, events, _ = run(cadence, evaluations=[2.0, 1.0])
    assert [step for kind, step in events if kind == "evaluate"] == [3, 5]
    assert [step for kind, step in events if kind == "saved"] == [4, 5]


def test_epoch_strategies_act_at_the_end_of_epochs():
    cadence = Cadence(7, 3, logging_strategy="epoch", eval_strategy="epoch", save_strategy="epoch")
    progress, events, _ = run(cadence, evaluations=[3.0, 2.0, 1.0])
    assert [step for kind, step in events if kind == "saved"] == [3, 6, 7]
    assert [r["step"] for r in progress.log_history if "loss" in r] == [3, 6, 7]


def test_a_subscriber_can_ask_to_save_to_evaluate_and_to_stop():
    def ask(event):
        if event.kind == "step":
            return {2: "save", 3: ("evaluate",), 4: "stop"}.get(event.step)

    _, events, outcome = run(Cadence(10, 100, save_strategy="no"), subscribers=[ask], evaluations=[1.0])
    assert outcome == "stopped"
    assert ("saved", 2) in events
    assert ("evaluate", 3) in events
    assert max(step for _, step in events) == 4


def test_early_stopping_counts_evaluations_without_gain():
    cadence = Cadence(20, 100, eval_strategy="steps", eval_steps=2, save_strategy="no")
    scores = [3.0, 2.0, 2.5, 2.4, 1.0]
    progress, _, outcome = run(cadence, evaluations=scores, improvement=Improvement(patience=2))
    assert (outcome, progress.step, progress.best_step, progress.best_metric) == ("stopped", 8, 4, 2.0)


def test_save_strategy_best_saves_only_what_is_better():
    cadence = Cadence(8, 100, eval_strategy="steps", eval_steps=2, save_strategy="best")
    _, events, _ = run(cadence, evaluations=[3.0, 4.0, 2.0, 2.5])
    assert [step for kind, step in events if kind == "saved"] == [2, 6]


def test_a_run_resumed_in_the_middle_of_a_logging_interval_logs_what_it_would_have():
    cadence = Cadence(10, 100, logging_steps=5, save_strategy="no")
    whole, _, _ = run(cadence)
    first = Progress()
    stop = lambda event: "stop" if event.kind == "step" and event.step == 7 else None
    run(cadence, progress=first, subscribers=[stop])
    resumed, _, _ = run(cadence, progress=Progress(**first.to_dict()))
    assert resumed == whole


def test_non_finite_updates_are_counted_and_three_in_a_row_stop_the_run_naming_rows():
    nan = math.nan
    progress, _, _ = run(Cadence(6, 100, logging_steps=6, save_strategy="no"), losses=[1.0, nan, nan, 1.0, nan, 1.0])
    assert (progress.skipped_steps, progress.total_loss) == (3, 3.0)
    with pytest.raises(NonFiniteError, match="rows of 3"):
        run(Cadence(6, 100, save_strategy="no"), losses=[1.0, nan, nan, nan, 1.0, 1.0])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_at_the_next_update(signum):
    def send(step):
        if step == 2:
            os.kill(os.getpid(), signum)

    _, events, outcome = run(Cadence(50, 100, save_strategy="no"), on_update=send)
    assert outcome == "preempted"
    assert events[-3:] == [("saved", 3), ("save", 3), ("train_end", 3)]
