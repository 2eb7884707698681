"""`jtune COMMAND CASE.yaml [key=value ...]`: choose the command, run it, turn faults into messages and exit codes."""

import ctypes
import difflib
import importlib.util
import json
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

from jtune.errors import ConfigError, JtuneError
from jtune.secrets import redact, words_to_show


class Command(NamedTuple):
    run: Callable[[list[str]], int]
    help: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the process's exit status (see `jtune.errors`)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(argv[1] if len(argv) > 1 else None))
        return 0
    if "--help" in argv[1:] or "-h" in argv[1:]:
        print(usage())
        return 0
    _set_up_logging()
    try:
        with nullcontext() if argv[0] == "chat" else _without_stdin():
            return _command(argv[0]).run(argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        return explain(argv[0], error)
    finally:
        _flush()


def _flush() -> None:
    """Write out what was printed. If it cannot be, Python's own attempt at its end must not change the exit status."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _without_stdin() -> Iterator[None]:
    """An empty stdin: a library that asks a question gets no answer, and does not wait for one."""
    own = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = own


def explain(command: str, error: BaseException) -> int:
    """Say on stderr what went wrong; the exit status that it stands for. What only a developer can mend is raised."""
    if isinstance(error, JtuneError):
        print(redact(f"jtune {command}: {error}"), file=sys.stderr)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    print(redact(f"jtune {command}: out of memory: {str(error).splitlines()[0]}\n{_LESS_MEMORY}"), file=sys.stderr)
    return 1


@contextmanager
def insisting() -> Iterator[None]:
    """Ctrl-C ends what runs in here, also where a library ignores it.

    Python drops what a callback raises, jax has one for each garbage collection, and imports collect much garbage. So
    a Ctrl-C is repeated until it has come through. (The loop has a handler of its own, which saves.)
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked, over, main = threading.Event(), threading.Event(), threading.get_ident()

    def repeat() -> None:
        while not over.wait(0.3):
            signal.pthread_kill(main, signal.SIGINT)  # which also wakes it where it waits

    def handler(signum: int, frame: Any) -> None:
        if not asked.is_set():
            asked.set()
            threading.Thread(target=repeat, name="interrupt", daemon=True).start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGINT, before)
    if asked.is_set():
        raise KeyboardInterrupt  # it has not come through yet


_LESS_MEMORY = (
    "What makes it smaller, in this order: per_device_train_batch_size=1 with gradient_accumulation_steps raised to "
    "match; remat=full; a smaller cutoff_len; finetuning_type=lora; more devices (mesh_fsdp)."
)


def usage(argument: str | None = None) -> str:
    if argument is not None:
        from jtune.config import explain

        return explain(argument)
    commands = "\n".join(f"  {name:9} {command.help}" for name, command in COMMANDS.items())
    return (
        "usage: jtune COMMAND CASE.yaml [key=value ...]    or    jtune COMMAND --key value ...\n\n"
        f"{commands}\n  help      this text; with the name of an argument, what it means\n\n"
        "The arguments are LLaMA-Factory's. To see it work: jtune quickstart"
    )


def _command(name: str) -> Command:
    if name in COMMANDS:
        return COMMANDS[name]
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{name!r} is not a command.{hint} There are: {', '.join(COMMANDS)}.")


def _set_up_logging() -> None:
    """jtune's own lines plain on stdout; the libraries' only when something is wrong."""

    class Format(logging.Formatter):
        def format(self, record):
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            return redact(prefix + super().format(record))

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(Format("%(message)s"))
    logger = logging.getLogger("jtune")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.raiseExceptions = False  # a line that a full disk does not take is no reason for a traceback
    for library in ("absl", "asyncio"):  # what fails in their background is raised as well
        logging.getLogger(library).setLevel(logging.CRITICAL)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns, and hangs, when datasets forks after use
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _load(argv: list[str], command: str):
    """The configuration; and the platform chosen before jax looks for devices."""
    from jtune.config import load_config

    config = load_config(argv, command=command)
    if config.training.use_cpu:
        import jax

        jax.config.update("jax_platforms", "cpu")
    return config


def _on_cpu(use_cpu: bool) -> bool:
    """Whether jax will find nothing but CPUs, without asking it, which would start its threads."""
    plugins = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return use_cpu or os.environ.get("JAX_PLATFORMS") == "cpu" or not plugins


def _keep_memory() -> None:
    """Let malloc keep what XLA frees on CPUs, for the next update takes as much again.

    glibc gives large arrays back to the system at once, which then fills their pages with zeros anew in each update: a
    tenth of its time. To be called before XLA starts its threads. Nothing is done where malloc is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_max, trim_threshold, arena_max = -4, -1, -8  # their numbers in malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(arena_max, 1)  # what other arenas are too small for would be mapped after all


def _option(argv: list[str], name: str, default: str | None = None) -> str | None:
    """Take `name VALUE` or `name=VALUE` out of `argv`; options of a command, not arguments of a run."""
    for i, word in enumerate(argv):
        if word == name:
            if i + 1 == len(argv):
                raise ConfigError(f"{name} needs a value")
            value = argv[i + 1]
            del argv[i : i + 2]
            return value
        if word.startswith(name + "="):
            del argv[i]
            return word.removeprefix(name + "=")
    return default


def _switch(argv: list[str], name: str) -> bool:
    if name in argv:
        argv.remove(name)
        return True
    return False


def simulated() -> list[str]:
    """The words that ask for processes like this one, if it is one of those of `--simulate`."""
    layout = os.environ.get("JTUNE_SIMULATED")
    return ["--simulate", layout] if layout else []


def _train(argv: list[str]) -> int:
    layout = _option(argv, "--simulate")
    if layout is not None:
        from jtune.commands import simulate

        return simulate.simulate(layout, argv)
    with insisting():
        from jtune.distributed import connect, shutdown

        # First of all, so that what is wrong on one host only, be it the YAML, ends the others too.
        shown, left_out = words_to_show([*argv, *simulated()])
        connect.connect(command=shlex.join(["jtune", "train", *shown]), without=left_out)
    connect.quiet(logging.getLogger("jtune"))
    # `insisting` is the inner one: what leads out of `together` must not be interrupted.
    with shutdown.together(partial(explain, "train")), insisting():
        config = _load(argv, "train")
        if _on_cpu(config.training.use_cpu):
            _keep_memory()
        from jtune.commands.train import train as run
        from jtune.train.files import full_disk_explained

        with full_disk_explained():
            run(config)
    return 0


def _data(argv: list[str]) -> int:
    as_json, check = _switch(argv, "--json"), _switch(argv, "--check")
    html = _option(argv, "--html")
    rows = _option(argv, "--rows", "3")
    if rows is None or not rows.isdecimal():
        raise ConfigError(f"--rows takes a whole number, not {rows!r}")
    config = _load(argv, "data")
    from jtune.commands import data

    return data.check(config) if check else data.show_data(config, rows=int(rows), as_json=as_json, html=html)


def _plan(argv: list[str]) -> int:
    as_json, fit = _switch(argv, "--json"), _switch(argv, "--fit")
    topology = _option(argv, "--topology")
    if as_json:  # nothing else on stdout
        logging.getLogger("jtune").handlers[0].stream = sys.stderr  # type: ignore[attr-defined]
    if topology is not None:
        from jtune.planning.topology import compile_here_for

        compile_here_for(topology)
    config = _load(argv, "plan")
    from jtune.planning.plan import plan
    from jtune.planning.show import show

    result = plan(config, topology=topology, fit=fit)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    return 0


def _export(argv: list[str]) -> int:
    config = _load(argv, "export")
    from jtune.commands.export import export as run

    run(config)
    return 0


def _chat(argv: list[str]) -> int:
    config = _load(argv, "chat")
    from jtune.commands.chat import chat as run

    run(config)
    return 0


def _eval(argv: list[str]) -> int:
    tasks, include_path = _option(argv, "--tasks"), _option(argv, "--include_path")
    limit = _option(argv, "--limit")
    if not tasks:
        raise ConfigError("--tasks is missing: names of the harness's tasks, with commas")
    try:
        most = None if limit is None else float(limit)
    except ValueError:
        raise ConfigError(f"--limit takes a number of documents, or a share below 1, not {limit!r}") from None
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("the lm-evaluation-harness is not installed: pip install 'jtune[eval]'")
    config = _load(argv, "eval")
    from jtune.evaluation.harness import run_tasks as run

    run(config, tasks.split(","), include_path=include_path, limit=most)
    return 0


def _inspect(argv: list[str]) -> int:
    config = _load(argv, "inspect")
    from jtune.commands.inspect import inspect_model as inspect

    inspect(config)
    return 0


def _quickstart(argv: list[str]) -> int:
    from jtune.commands.quickstart import quickstart as run

    return run(argv)


def _version(argv: list[str]) -> int:
    from importlib.metadata import version

    import jax

    names = ("jtune", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")
    print("\n".join(f"{name:17} {version(name)}" for name in names))
    print(f"{'devices':17} {', '.join(f'{d.platform}:{d.id} {d.device_kind}' for d in jax.devices())}")
    return 0


COMMANDS = {
    "train": Command(_train, "fine-tune (do_train), evaluate (do_eval): everything the YAML says; --simulate 2x4"),
    "data": Command(
        _data, "show what the model is fed, trained-on tokens marked; --rows N, --html FILE, --json, --check"
    ),
    "plan": Command(
        _plan, "what a run takes, before it runs: memory, time; --topology v5p:4x4x4 or h100:8, --fit, --json"
    ),
    "inspect": Command(_inspect, "show the parameter tree: shapes, dtypes, bytes, sharding, what trains"),
    "export": Command(_export, "merge the adapter and write a Hugging Face checkpoint"),
    "chat": Command(_chat, "talk with the model, or with what the same YAML has trained; questions may come by a pipe"),
    "eval": Command(_eval, "benchmarks of the lm-evaluation-harness; --tasks NAME,NAME, --include_path DIR, --limit N"),
    "quickstart": Command(_quickstart, "make a small model and data set on the spot and train it, offline"),
    "version": Command(_version, "versions and devices"),
}

if __name__ == "__main__":
    sys.exit(main())
