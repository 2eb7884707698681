"""The loop: when things happen, in which order, and what it writes down. No model is needed to see it."""

import io
import json
import math
import os
import signal

import jax.numpy as jnp
import pytest

from jtune.errors import NonFiniteError
from jtune.train import plot, results
from jtune.train.cadence import Cadence, Improvement
from jtune.train.callbacks import logs, terminal
from jtune.train.events import Event
from jtune.train.loop import Hooks, Progress, run_loop
from jtune.train.step import Metrics


def run(
    cadence, *, progress=None, subscribers=(), losses=None, norms=None, scales=None, evaluations=None,
    improvement=None, on_update=None,
):  # fmt: skip
    """A run whose update k has loss `losses[k]` (default k), gradient norm `norms[k]` (1), loss scale `scales[k]` (1);
    returns (progress, events, outcome).
    """
    progress = progress or Progress()
    events = []
    scores = iter(evaluations or [])

    def update(state, batch, rate):
        if on_update:
            on_update(batch)
        loss = batch if losses is None else losses[batch]
        norm, scale = norms[batch] if norms else 1.0, scales[batch] if scales else 1.0
        finite = jnp.bool_(math.isfinite(loss) and math.isfinite(norm))
        return state + 1, Metrics(*map(jnp.float32, (loss, norm, 10)), finite, jnp.float32(scale), {})

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


def test_updates_that_only_lower_the_loss_scale_of_float16_do_not_stop_the_run():
    inf, cadence = math.inf, Cadence(6, 100, logging_steps=6, save_strategy="no")
    scales = [2.0**16, 2.0**15, 2.0**14, 2.0**13, 2.0**12, 2.0**12]
    progress, _, outcome = run(cadence, norms=[inf, inf, inf, inf, 1.0, 1.0], scales=scales)
    assert (outcome, progress.skipped_steps, progress.bad_steps) == ("done", 4, 0)
    assert progress.log_history[0]["loss"] == 4.5
    # Neither a loss that is not finite at any scale, nor gradients at scale 1, are mended by a smaller scale.
    with pytest.raises(NonFiniteError, match="rows of 2"):
        run(cadence, losses=[math.nan] * 6, scales=scales)
    with pytest.raises(NonFiniteError, match="rows of 4"):
        run(cadence, norms=[inf] * 6, scales=[4.0, 2.0, 1.0, 0.5, 0.25, 0.125])


def test_a_log_is_the_mean_of_finite_updates_and_counts_the_skipped_ones_beside():
    nan = math.nan
    losses = [1.0, nan, 3.0, nan, nan, 5.0, 7.0, 8.0]
    progress, _, _ = run(Cadence(8, 100, logging_steps=2, save_strategy="no"), losses=losses)
    assert [(r["loss"], r.get("skipped_updates")) for r in progress.log_history] == [
        (1.0, 1), (3.0, 1), (5.0, 1), (7.5, None)
    ]  # fmt: skip
    progress, _, _ = run(
        Cadence(6, 100, logging_steps=1, save_strategy="no"), losses=[1.0, nan, math.inf, 4.0, nan, 6.0]
    )
    assert [r.get("loss") for r in progress.log_history] == [1.0, None, None, 4.0, None, 6.0]
    assert [r["loss"] for r in progress.log_history if "loss" in r] == [1.0, 4.0, 6.0]
    assert all(("grad_norm" in r) == ("loss" in r) for r in progress.log_history)
    assert "NaN" not in json.dumps(progress.to_dict(), allow_nan=False)


def test_skipped_updates_before_a_resume_are_not_in_the_mean_after_it():
    cadence, losses = Cadence(6, 100, logging_steps=6, save_strategy="no"), [1.0, math.nan, 2.0, 6.0, math.nan, 3.0]
    first = Progress()
    run(cadence, progress=first, losses=losses, subscribers=[lambda e: "stop" if e.step == 3 else None])
    resumed, _, _ = run(cadence, progress=Progress(**first.to_dict()), losses=losses)
    assert resumed.log_history[0]["loss"] == 3.0
    assert resumed.log_history[0]["skipped_updates"] == 2
    older = {k: v for k, v in first.to_dict().items() if k != "unlogged_skipped"}
    assert Progress(**older).unlogged_skipped == 0


def test_the_summary_is_of_what_happened():
    progress = Progress(step=10, total_loss=12.0, skipped_steps=4, tokens=1000)
    found = results.train_summary(
        progress, began=(4, 400), seconds=2.0, examples_per_update=8, epoch=1.0, parameters=3
    )  # fmt: skip
    assert (found["train_loss"], found["train_skipped_updates"]) == (2.0, 4)
    assert (found["train_steps_per_second"], found["train_samples_per_second"]) == (3.0, 24.0)
    assert found["train_tokens_per_second"] == 300.0
    progress.skipped_steps = 10
    found = results.train_summary(progress, began=(0, 0), seconds=2.0, examples_per_update=8, epoch=1.0, parameters=3)
    assert found["train_loss"] is None


def test_evaluation_figures_that_are_not_finite_are_null_and_never_the_best():
    scores = [math.nan, 2.0, math.inf]
    cadence = Cadence(6, 100, logging_strategy="no", eval_strategy="steps", eval_steps=2, save_strategy="no")
    progress, _, _ = run(cadence, evaluations=scores)
    assert [r["eval_loss"] for r in progress.log_history] == [None, 2.0, None]
    assert (progress.best_metric, progress.best_step) == (2.0, 4)
    better = Improvement(greater_is_better=True)
    progress, _, _ = run(cadence, evaluations=scores, improvement=better)
    assert progress.best_metric == 2.0


def test_files_of_a_run_with_skipped_updates_are_json_and_its_plot_is_drawn(tmp_path):
    strict = lambda text: json.loads(text, parse_constant=lambda name: pytest.fail(name))
    lines, said = logs.log_file(tmp_path / "log.jsonl", 0), io.StringIO()
    subscribers = [lines, terminal.progress_lines(0, out=said)]
    losses = [1.0, math.nan, 3.0, math.inf]
    progress, _, _ = run(Cadence(4, 100, logging_steps=1, save_strategy="no"), losses=losses, subscribers=subscribers)
    records = [strict(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r.get("loss") for r in records] == [1.0, None, 3.0, None, None]
    assert [r.get("skipped_updates") for r in records] == [None, 1, None, 1, None]
    assert said.getvalue().count("skipped 1") == 2
    results.write_json(tmp_path / "state.json", {"log_history": [*progress.log_history, {"x": math.nan}]})
    assert strict((tmp_path / "state.json").read_text())["log_history"][4] == {"x": None}
    assert plot.plot_losses(progress.log_history, tmp_path / "loss.png", "loss")
    skipped = [r for r in progress.log_history if "loss" not in r]
    assert not plot.plot_losses(skipped, tmp_path / "none.png", "loss")


def test_what_is_measured_of_preferences_is_logged_shown_and_drawn(tmp_path):
    rewards = {"rewards/chosen": 0.5, "rewards/rejected": -0.25, "rewards/accuracies": 0.75, "rewards/margins": 0.75}
    records = [
        {"step": 1, "loss": 0.5, "learning_rate": 1e-3, **rewards},
        {"step": 1, "eval_loss": 0.6, **{f"eval_{key}": value for key, value in rewards.items()}},
    ]
    said = io.StringIO()
    for subscriber in (logs.log_file(tmp_path / "log.jsonl", 0), terminal.progress_lines(0, out=said)):
        for kind, record in zip(("log", "evaluate"), records):
            subscriber(Event(kind, 1, 1, 1.0, record))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("accuracy") for line in lines] == [0.75, None]  # as in LLaMA-Factory
    first, second = said.getvalue().splitlines()
    assert "loss 0.5000  accuracy 0.75  margin 0.75  lr" in first
    assert "eval loss 0.6000  accuracy 0.7500  margin 0.75" in second
    drawn = plot.plot_measures(records, tmp_path, "run")
    assert [path.name for path in drawn] == ["training_rewards_accuracies.png", "training_rewards_chosen.png"]
    scores = [{"step": 1, "loss": 0.5, "accuracy": 0.5}, {"step": 1, "eval_accuracy": 0.5}]
    assert [path.name for path in plot.plot_measures(scores, tmp_path, "run")] == ["training_eval_accuracy.png"]
    assert plot.plot_measures([{"step": 1, "loss": 0.5}], tmp_path, "run") == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_at_the_next_update(signum):
    def send(step):
        if step == 2:
            os.kill(os.getpid(), signum)

    _, events, outcome = run(Cadence(50, 100, save_strategy="no"), on_update=send)
    assert outcome == "preempted"
    assert events[-3:] == [("saved", 3), ("save", 3), ("train_end", 3)]
