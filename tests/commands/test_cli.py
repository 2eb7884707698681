"""The words of a command line: help, versions, options in every form, completion, messages and exit statuses."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

import jtune
from jtune import errors
from jtune.cli.commands import program
from jtune.cli.main import main
from jtune.commands.data import show_data
from jtune.train.callbacks import trackers
from jtune.train.callbacks.libraries import Handle

OPTIONS = {
    "train": {"--simulate"},
    "data": {"--rows", "--html", "--json", "--check"},
    "plan": {"--topology", "--fit", "--json"},
    "inspect": set(),
    "export": set(),
    "chat": set(),
    "eval": {"--tasks", "--include_path", "--limit"},
    "quickstart": set(),
}


# ---------------------------------------------------------------------- help and versions


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_help_lists_every_command_in_a_whole_sentence(words, capsys):
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line for line in lines if line.split() and line.split()[0] in program.commands]
    assert [line.split()[0] for line in listed] == [*OPTIONS, "version", "help"]
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("form", ["{} --help", "{} -h", "{} case.yaml seed=1 --help", "help {}"])
def test_a_commands_help_shows_its_own_options_and_how_arguments_are_given(name, form, capsys):
    assert main(form.format(name).split()) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"Usage: jtune {name} [OPTIONS]")
    assert {word for word in said.split() if word.startswith("--")} >= OPTIONS[name] | {"--help"}
    assert "key=value, --key value or --key=value" in said
    assert "`jtune help lora_rank`" in said


def test_help_explains_arguments_and_names_what_is_near(capsys):
    assert main(["help", "lora_rank", "--lora-alpha"]) == 0
    assert main(["--help", "trian"]) == 0
    rank, alpha, near = capsys.readouterr().out.splitlines()
    assert rank == "lora_rank: rank of the adapters (a whole number, at least 1; default: 8)"
    assert alpha.startswith("lora_alpha: ")
    assert near == "trian is neither a command nor an argument. Did you mean `jtune help train`?"


def test_versions(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jtune {jtune.__version__}\n"
    assert main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["jtune", jtune.__version__]
    assert lines[-1].startswith("devices           cpu:0 ")


def test_help_imports_nothing_slow():
    code = (
        "import sys; from jtune.cli.main import main; main(['--help']); main(['plan', '--help']); main(['trian']); "
        "print({'jax', 'numpy', 'omegaconf', 'rich', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_tracker_that_hangs_does_not_keep_the_process(monkeypatch, capsys):
    left, on = [], threading.Event()
    begin = lambda: on.wait() and Handle("", print, print)
    monkeypatch.setattr(os, "_exit", left.append)
    tracker = trackers.Tracker("json", begin, print)  # of a library that is there
    assert main(["--version"]) == 0
    assert left == [0]
    on.set()
    trackers.close([tracker], "finished")
    tracker.thread.join()
    assert main(["--version"]) == 0
    assert left == [0]


# ---------------------------------------------------------------------- options


@pytest.fixture
def calls(monkeypatch):
    """What commands are called with, in place of their work."""
    heard = SimpleNamespace(loaded=None, called=None)

    def load(words, command):
        heard.loaded = command, list(words)
        return "config"

    def record(*args, **options):
        heard.called = args, options

    monkeypatch.setattr("jtune.cli.commands.load", load)
    for function in ("data.show_data", "data.check_rows", "plan.show_plan", "eval.evaluate", "simulate.simulate"):
        monkeypatch.setattr(f"jtune.commands.{function}", record)
    monkeypatch.setattr("jtune.planning.topology.compile_here_for", lambda topology: None)
    return heard


@pytest.mark.parametrize(
    ("words", "left", "rows", "as_json"),
    [
        ("c.yaml", "c.yaml", 3, False),
        ("c.yaml --rows 5", "c.yaml", 5, False),
        ("--rows=5 --json c.yaml", "c.yaml", 5, True),
        ("c.yaml lora_rank=4 --json --seed 7 --rows=0 bf16=true", "c.yaml lora_rank=4 --seed 7 bf16=true", 0, True),
        ("--lora_target q_proj v_proj --rows 5 --seed=1", "--lora_target q_proj v_proj --seed=1", 5, False),
        ("c.yaml --learning_rate -1 --default_system -help", "c.yaml --learning_rate -1 --default_system -help", 3, 0),
        ("c.yaml --bf16 --json --no_packing", "c.yaml --bf16 --no_packing", 3, True),
    ],
)
def test_options_stand_anywhere_and_all_other_words_are_passed_on(words, left, rows, as_json, calls):
    assert main(["data", *words.split()]) == 0
    assert calls.loaded == ("data", left.split())
    assert calls.called == (("config",), {"rows": rows, "as_json": as_json, "html": None})


@pytest.mark.parametrize("equals", [True, False])
def test_every_option_reaches_its_command(equals, calls):
    def called(command, *pairs):
        words = [f"{name}={value}" if equals else name for name, value in pairs]
        words = words if equals else [word for name, value in pairs for word in (name, value)]
        assert main([command, "c.yaml", *words]) == 0
        return calls.called

    assert called("data", ("--html", "a.html"))[1]["html"] == "a.html"
    assert called("plan", ("--topology", "v5e:2x4"))[1] == {"topology": "v5e:2x4", "fit": False, "as_json": False}
    assert called("train", ("--simulate", "2x4")) == (("2x4", ("c.yaml",)), {})
    assert main(["plan", "--json", "c.yaml", "--fit"]) == 0
    assert calls.called == (("config",), {"topology": None, "fit": True, "as_json": True})
    assert main(["data", "--check", "c.yaml"]) == 0
    assert calls.called == (("config",), {})
    pytest.importorskip("lm_eval")
    found = called("eval", ("--tasks", "a,b"), ("--include_path", "d"), ("--limit", "0.5"))
    assert found == (("config", ["a", "b"]), {"include_path": "d", "limit": 0.5})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data c.yaml --rows", "jtune data: --rows needs a value. `jtune data --help` shows its options."),
        ("data c.yaml --rows x", "jtune data: --rows: expected a whole number, found 'x'."),
        ("data c.yaml --rows=-1", "jtune data: --rows: expected a whole number, found '-1'."),
        ("plan c.yaml --json=yes", "jtune plan: --json takes no value."),
        ("plan c.yaml --topolgy v5e:4x4", "jtune plan: --topolgy is not an option. Did you mean --topology?"),
        ("plan c.yaml --topolgy=v5e:4x4", "jtune plan: --topolgy is not an option. Did you mean --topology?"),
        ("eval c.yaml", "jtune eval: --tasks NAME,NAME is missing."),
        (
            "eval c.yaml --tasks a --limit few",
            "jtune eval: --limit: expected a number of documents, or a share below 1",
        ),
        ("train c.yaml --simulate 2y4", "jtune train: --simulate 2y4: expected PROCESSESxDEVICES"),
        ("version 3", "jtune version: Got unexpected extra argument (3)."),
        ("trian c.yaml", "jtune: 'trian' is not a command. Did you mean 'train'? There are: train, data, "),
        ("--verbose", "jtune: '--verbose' is not a command. There are: "),
        ("train", "jtune train: no arguments are given: write CASE.yaml key=value ..."),
        ("train nowhere.yaml", "jtune train: nowhere.yaml: there is no such file."),
        ("train --lora_rnk 3", "lora_rnk is not an argument of jtune. Did you mean lora_rank?"),
    ],
)
def test_wrong_words_are_refused_in_a_message(words, message, capsys):
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jtune.commands.data.encode_sets", lambda config: (None, SimpleNamespace(train="rows")))
    monkeypatch.setattr("jtune.commands.data.show", lambda *args: None)
    with pytest.raises(errors.ConfigError, match=f"--html {tmp_path}: cannot be written: Is a directory"):
        show_data(None, html=str(tmp_path))  # type: ignore[arg-type]


# ---------------------------------------------------------------------- exit statuses


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (errors.ConfigError("why"), 2, "jtune inspect: why"),
        (errors.DataError("why"), 3, "jtune inspect: why"),
        (errors.NonFiniteError("why"), 4, "jtune inspect: why"),
        (errors.CheckpointError("why"), 5, "jtune inspect: why"),
        (errors.PeerLost("why"), 70, "jtune inspect: why"),
        (errors.Preempted("why"), 75, "jtune inspect: why"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nmore"), 1, "jtune inspect: out of memory: RESOURCE_EXHAUSTED: 9 GiB"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_fault_has_its_exit_status_and_message(error, status, message, monkeypatch, capsys):
    def load(words, command):
        raise error

    monkeypatch.setattr("jtune.cli.commands.load", load)
    assert main(["inspect", "c.yaml"]) == status
    assert capsys.readouterr().err.splitlines()[0] == message


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("jtune.cli.commands.load", lambda words, command: {}["missing"])
    with pytest.raises(KeyError):
        main(["inspect", "c.yaml"])


def test_an_interrupt_that_a_library_swallows_still_ends_a_command(monkeypatch, capsys):
    def load(words, command):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        except KeyboardInterrupt:
            pass  # Python does this where a callback raises it
        time.sleep(20)

    monkeypatch.setattr("jtune.cli.commands.load", load)
    began = time.monotonic()
    assert main(["inspect", "c.yaml"]) == 130
    assert time.monotonic() - began < 10
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("words", "status"), [("help all", 1), ("help lora_rank", 0)], ids=["long", "short"])
def test_a_reader_that_leaves_early_is_no_fault(words, status):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "jtune.cli.main", *words.split()]
    env = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, env=env, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (status, "")


# ---------------------------------------------------------------------- completion


@pytest.mark.parametrize(("shell", "line"), [("bash", "compopt -o nospace"), ("zsh", "suffix=(-S '')"), ("fish", "")])
def test_completion_scripts_are_printed(shell, line, monkeypatch, capfd):
    monkeypatch.setenv("_JTUNE_COMPLETE", f"{shell}_source")
    assert main([]) == 0
    script = capfd.readouterr().out
    assert f"_JTUNE_COMPLETE={shell}_complete" in script
    assert line in script


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pl"], ["plan"]),
        (["train", "cas"], ["file:cas"]),
        (["train", "lora_ra"], ["lora_rank="]),
        (["train", "case.yaml", "lora_ra"], ["lora_rank="]),
        (["train", "case.yaml", "--lora_ra"], ["--lora_rank"]),
        (["plan", "case.yaml", "--topo"], ["--topology"]),
        (["train", "case.yaml", "finetuning_type", "=", "l"], ["lora"]),  # as bash cuts words
        (["train", "case.yaml", "finetuning_type=l"], ["finetuning_type=lora"]),
        (["train", "case.yaml", "--bf16", "t"], ["true"]),
        (["help", "lora_ra"], ["lora_rank"]),
        (["data", "case.yaml", "--html", "a"], ["file:a"]),
    ],
)
def test_commands_files_arguments_and_values_are_completed(words, expected, tmp_path, monkeypatch, capfd):
    (tmp_path / "case.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("_JTUNE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(["jtune", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    assert main([]) == 0
    found = [line.split(",", 1) for line in capfd.readouterr().out.splitlines()]
    assert sorted(value if kind == "plain" else f"{kind}:{value}" for kind, value in found) == sorted(expected)
