"""Trackers: what each library is given, and that none of them can stop or slow a run."""

import importlib.machinery
import logging
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from jtune.config import load_config
from jtune.errors import Preempted
from jtune.train import callbacks
from jtune.train.callbacks import trackers
from jtune.train.events import Event, tell

ARGUMENTS = ["model_name_or_path=m", "dataset=a", "do_train=true", "hf_hub_token=hf_sesame", "run_name=mine"]
LOG = {"loss": 2.0, "grad_norm": 0.5, "learning_rate": 0.1, "epoch": 0.5, "step": 1, "seconds": {"step": 1.0}}
EVALUATION = {"eval_loss": 3.0, "eval_rouge-l": 4.0, "epoch": 0.5, "step": 1}


class Library:
    """A tracker's module of any of the four kinds: keeps the calls; `fault(where)` runs before each."""

    def __init__(self, name, fault=lambda where: None):
        self.calls = []
        run = SimpleNamespace(id="run-1", name="run-1", info=SimpleNamespace(run_id="run-1"))

        def call(what, gives=None):
            def called(*args, **kwargs):
                fault(what)
                self.calls.append((what, args, kwargs))
                return gives

            return called

        run.log, run.finish, run.define_metric = call("log"), call("finish"), call("define_metric")
        run.config = SimpleNamespace(update=call("config"))
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="a test")
        module.init, module.login = call("init", run), call("login")
        module.Settings = lambda **kwargs: kwargs
        module.start_run, module.set_experiment = call("init", run), call("set_experiment")
        module.log_params, module.log_metrics, module.end_run = call("config"), call("log"), call("finish")
        module.MlflowException = type("MlflowException", (Exception,), {})
        self.module = module

    def of(self, what):
        return [(*args, kwargs) for name, args, kwargs in self.calls if name == what]


@pytest.fixture
def install(monkeypatch):
    for name in trackers.START:
        monkeypatch.setitem(sys.modules, name, None)  # as if it was not installed
    monkeypatch.setattr(
        trackers.importlib.util, "find_spec", lambda name: getattr(sys.modules.get(name), "__spec__", None)
    )
    for name in ("WANDB_PROJECT", "SWANLAB_PROJECT", "WANDB_CONSOLE"):
        monkeypatch.delenv(name, raising=False)

    def installed(name, fault=lambda where: None):
        library = Library(name, fault)
        monkeypatch.setitem(sys.modules, name, library.module)
        return library

    return installed


def report(folder: Path, *words: str, start: int = 0, records=(("log", LOG), ("evaluate", EVALUATION))):
    config = load_config([*ARGUMENTS, f"output_dir={folder}", *words])
    with trackers.reporting(config, folder, start) as subscribers:
        for kind, record in records:
            assert tell(subscribers, Event(kind, 1, 10, 0.5, record)) == set()
    return config


EXPECTED = {"train/loss": 2.0, "train/grad_norm": 0.5, "train/learning_rate": 0.1, "train/epoch": 0.5}
TAGGED = [
    {**EXPECTED, "train/global_step": 1},
    {"eval/loss": 3.0, "eval/rouge-l": 4.0, "train/epoch": 0.5, "train/global_step": 1},
]


def test_wandb_gets_hugging_faces_names_and_the_arguments_without_secrets(install, tmp_path, monkeypatch):
    library = install("wandb")
    config = report(tmp_path, "report_to=wandb")
    [(begun,)] = library.of("init")
    assert (begun["project"], begun["name"], begun["id"], begun["resume"]) == ("huggingface", "mine", None, None)
    assert begun["settings"] == {"console": "off"}
    [(arguments, _)] = library.of("config")
    assert arguments == config.to_dict()
    assert "sesame" not in str(library.calls)
    assert [metrics for metrics, _ in library.of("log")] == TAGGED
    assert library.of("finish") == [({"exit_code": 0},)]
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    report(tmp_path, "report_to=wandb")
    report(tmp_path, "report_to=wandb", "project=ours")
    assert [begun["project"] for (begun,) in library.of("init")[1:]] == ["theirs", "ours"]


def test_mlflow_gets_trainers_names_and_parameters_a_hundred_at_a_time(install, tmp_path):
    library = install("mlflow")
    report(tmp_path, "report_to=mlflow", "project=ours")
    assert library.of("set_experiment") == [("ours", {})]
    assert library.of("init") == [({"run_name": "mine"},)]
    parts = [part for part, _ in library.of("config")]
    assert max(map(len, parts)) <= 100
    assert {k: v for part in parts for k, v in part.items()}["learning_rate"] == "5e-05"
    numbers = {"eval_loss": 3.0, "eval_rouge-l": 4.0, "epoch": 0.5}
    assert library.of("log")[1] == (numbers, {"step": 1})
    assert library.of("finish") == [({"status": "FINISHED"},)]


def test_swanlab_gets_llamafactorys_arguments(install, tmp_path):
    library = install("swanlab")
    report(tmp_path, "use_swanlab=true")
    report(tmp_path, "use_swanlab=true", "swanlab_mode=cloud", "swanlab_api_key=sesame", "swanlab_run_name=other")
    first, second = (begun for (begun,) in library.of("init"))
    assert {k: first[k] for k in first if k != "config"} == {"project": "llamafactory", "experiment_name": "mine"}
    assert (second["mode"], second["experiment_name"]) == ("online", "other")
    assert library.of("login") == [({"api_key": "sesame"},)]
    assert [(metrics, kwargs) for metrics, kwargs in library.of("log")][:2] == [(x, {"step": 1}) for x in TAGGED]
    assert library.of("finish")[0] == ({"state": "success"},)


def test_trackio_gets_a_space(install, tmp_path):
    library = install("trackio")
    report(tmp_path, "report_to=trackio", "trackio_space_id=me/runs")
    [(begun,)] = library.of("init")
    assert (begun["project"], begun["name"], begun["space_id"]) == ("huggingface", "mine", "me/runs")
    assert library.of("log") == [(x, {"step": 1}) for x in TAGGED]


@pytest.mark.parametrize("name", trackers.START)
def test_a_resumed_run_goes_on_with_its_run_and_a_new_one_does_not(name, install, tmp_path):
    library = install(name)
    for start in (0, 5, 0):
        report(tmp_path, f"report_to={name}", start=start)
    ids = [begun.get("run_id") or begun.get("id") or begun.get("resume") == "allow" for (begun,) in library.of("init")]
    assert ids == [False, True if name == "trackio" else "run-1", False]
    (tmp_path / trackers.RUNS).write_text("{")
    report(tmp_path, f"report_to={name}", start=5)
    assert len(library.of("finish")) == 4


def test_mlflow_begins_a_run_where_the_server_does_not_know_it(install, tmp_path):
    library = install("mlflow")
    report(tmp_path, "report_to=mlflow")
    begin = library.module.start_run

    def start_run(run_id=None, **kwargs):
        if run_id:
            raise library.module.MlflowException
        return begin(**kwargs)

    library.module.start_run = start_run
    report(tmp_path, "report_to=mlflow", start=5)
    assert library.of("init") == [({"run_name": "mine"},)] * 2


@pytest.mark.parametrize(
    ("where", "said"), [("init", "does not start"), ("log", "does not take a record"), ("finish", "does not finish")]
)
@pytest.mark.parametrize("name", trackers.START)
def test_a_tracker_that_raises_is_one_line_and_the_run_goes_on(name, where, said, install, tmp_path, caplog):
    def fault(what):
        if what == where:
            raise SystemExit("no route to https://me:secret@host\nand more")

    install(name, fault)
    other = install("trackio" if name != "trackio" else "wandb")
    with caplog.at_level(logging.WARNING, "jtune"):
        report(tmp_path, "report_to=all")
    [line] = caplog.messages
    assert line.startswith(f"report_to: {name} {said}")
    assert line.endswith("no route to https://***@host")
    assert len(other.of("log")) == 2


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_hangs_costs_no_more_than_patience(where, install, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE", 0.3)
    monkeypatch.setattr(trackers, "ROOM", 3)
    on = threading.Event()
    install("wandb", lambda what: what == where and on.wait())
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "jtune"):
        report(tmp_path, "report_to=wandb", records=[("log", LOG)] * 1000)
    assert time.monotonic() - began < 2.0
    assert caplog.messages == [
        "report_to: wandb has not finished in 0.3 seconds: what it was given last may be missing there"
    ]
    on.set()


def test_trackers_start_one_after_the_other_but_do_not_wait_for_one_that_hangs(install, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE", 1.0)
    at_once, most, on = [], [], threading.Event()

    def start(what):
        if what == "init":
            at_once.append(what)
            most.append(len(at_once))
            time.sleep(0.05)
            at_once.pop()

    libraries = [install(name, start) for name in ("wandb", "trackio")]
    report(tmp_path, "report_to=all")
    assert most == [1, 1]
    monkeypatch.setattr(trackers, "TURN", 0.1)
    install("wandb", lambda what: what == "init" and on.wait())
    report(tmp_path, "report_to=all")
    assert len(libraries[1].of("finish")) == 2
    on.set()


def test_a_slow_tracker_loses_records_and_says_how_many(install, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "ROOM", 3)
    on = threading.Event()
    library = install("wandb", lambda what: what == "log" and on.wait())
    config = load_config([*ARGUMENTS, "report_to=wandb"])
    with caplog.at_level(logging.WARNING, "jtune"), trackers.reporting(config, tmp_path, 0) as subscribers:
        for _ in range(20):
            tell(subscribers, Event("log", 1, 10, 0.5, LOG))
        on.set()
    lost = 20 - len(library.of("log"))
    assert lost in (16, 17)  # the first may have been taken from the queue by then
    assert caplog.messages == [f"report_to: wandb was too slow: {lost} records are missing there"]


@pytest.mark.parametrize(
    ("error", "status"), [(Preempted, "KILLED"), (KeyboardInterrupt, "KILLED"), (OSError, "FAILED")]
)
def test_a_tracker_is_told_how_the_run_ended(error, status, install, tmp_path):
    library = install("mlflow")
    config = load_config([*ARGUMENTS, "report_to=mlflow"])
    with pytest.raises(error), trackers.reporting(config, tmp_path, 0):
        raise error
    assert library.of("finish") == [({"status": status},)]


def test_what_is_not_installed_is_one_line_that_says_how_to_install_it(install, tmp_path, caplog):
    install("trackio")
    with caplog.at_level(logging.WARNING, "jtune"):
        trackers.note_missing(load_config([*ARGUMENTS, "report_to=[wandb,trackio]"]))
        trackers.note_missing(load_config([*ARGUMENTS, "report_to=all"]))
    assert caplog.messages == [
        "report_to: wandb is not installed, and the run goes on without it: pip install 'jtune-llm[wandb]'"
    ]
    config = load_config([*ARGUMENTS, "report_to=[wandb,trackio]"])
    assert trackers.chosen(config) == ["trackio"]


@pytest.mark.parametrize(("report_to", "written"), [("all", 1), ("[tensorboard,wandb]", 1), ("wandb", 0)])
def test_tensorboard_is_among_them(report_to, written, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(callbacks, "tensorboard", made.append)
    callbacks.subscribers(load_config([*ARGUMENTS, f"report_to={report_to}"]).training, tmp_path, 0, 10)
    assert made == [tmp_path / "runs"] * written


def test_a_folder_of_wandbs_own_files_is_no_library(tmp_path, monkeypatch):
    (tmp_path / "swanlab").mkdir()
    monkeypatch.delitem(sys.modules, "swanlab", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not trackers.is_installed("swanlab")


def test_only_the_first_process_reports(install, tmp_path, monkeypatch):
    library = install("wandb")
    monkeypatch.setattr(trackers.processes, "is_first", lambda: False)
    report(tmp_path, "report_to=wandb")
    assert library.calls == []
