"""Every command with its options. Each imports its work when it runs, so that `jtune --help` answers at once."""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import click

from jtune import __version__
from jtune.cli.arguments import (
    CaseCommand,
    Commands,
    NumberOrShare,
    WholeNumber,
    complete_names,
    complete_words,
    nearest,
)
from jtune.cli.logs import set_up_logging
from jtune.cli.start import load, start_training
from jtune.errors import ConfigError

Words = tuple[str, ...]  # a case and arguments, as typed


@click.group(
    cls=Commands,
    context_settings={"ignore_unknown_options": True, "max_content_width": 120},
    options_metavar="",
    subcommand_metavar="COMMAND CASE.yaml [key=value ...]",
    epilog="`jtune COMMAND --help` shows a command's options, `jtune help lora_rank` explains an argument. "
    "To see jtune work: jtune quickstart",
)
@click.version_option(__version__, prog_name="jtune", message="%(prog)s %(version)s")
def program() -> None:
    """Fine-tune large language models on JAX. CASE.yaml is a LLaMA-Factory YAML, unchanged."""


def case_command(metavar: str = "CASE.yaml [key=value ...]") -> Callable[[Callable], click.Command]:
    """Add a function of `words` and its options to the program, under its own name."""

    def add(function: Callable[..., Any]) -> click.Command:
        argument = click.argument(
            "words", nargs=-1, type=click.UNPROCESSED, metavar=metavar, shell_complete=complete_words
        )
        return program.command(function.__name__, cls=CaseCommand)(argument(function))

    return add


@case_command()
@click.option("--simulate", metavar="2x4", help="Run 2 processes of 4 CPU devices each on this machine.")
def train(words: Words, simulate: str | None) -> int | None:
    """Fine-tune, evaluate, predict: all that the YAML asks for.

    An interrupted run continues from its last checkpoint when the same command is started again.
    """
    if simulate is None:
        return start_training(words)
    from jtune.commands.simulate import simulate as simulate_hosts

    return simulate_hosts(simulate, words)


@case_command()
@click.option("--rows", type=WholeNumber(), default=3, show_default=True, help="Number of rows to show.")
@click.option("--html", metavar="FILE", type=click.Path(), help="Write an HTML page to FILE instead.")
@click.option("--json", "as_json", is_flag=True, help="Print token ids and labels, one JSON object a row.")
@click.option("--check", is_flag=True, help="Read all rows; name each row that is left out, with the reason.")
def data(words: Words, rows: int, html: str | None, as_json: bool, check: bool) -> int | None:
    """Show what the model is fed, trained-on tokens marked.

    Prints the first rows, then token counts, a histogram of lengths and the batches of a run. No weights are read.
    """
    if as_json:
        set_up_logging(sys.stderr)
    config = load(words, "data")
    from jtune.commands.data import check_rows, show_data

    return check_rows(config) if check else show_data(config, rows=rows, as_json=as_json, html=html)


@case_command()
@click.option("--topology", metavar="NAME", help="Plan for other devices: v5p:4x4x4, h100:8, ...")
@click.option("--fit", is_flag=True, help="Search microbatch, remat and mesh for the fastest setting that fits.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
def plan(words: Words, topology: str | None, fit: bool, as_json: bool) -> None:
    """Tell memory and time of a run before it runs.

    Compiles the step that `jtune train` would run, for the devices of this machine or for others. Only the model's
    config.json is needed; no weights are read.
    """
    if as_json:
        set_up_logging(sys.stderr)
    if topology is not None:
        from jtune.planning.topology import compile_here_for

        compile_here_for(topology)
    config = load(words, "plan")
    from jtune.commands.plan import show_plan

    show_plan(config, topology=topology, fit=fit, as_json=as_json)


@case_command()
def inspect(words: Words) -> None:
    """Show the parameter tree: shapes, bytes, sharding, what trains."""
    config = load(words, "inspect")
    from jtune.commands.inspect import inspect_model

    inspect_model(config)


@case_command("CASE.yaml|FOLDER [key=value ...]")
def export(words: Words) -> None:
    """Merge the adapter and write a Hugging Face checkpoint.

    The checkpoint is written to export_dir."""
    config = load(words, "export")
    from jtune.commands.export import export

    export(config)


@case_command("CASE.yaml|FOLDER [key=value ...]")
def chat(words: Words) -> None:
    """Talk with the model, or with what the same YAML has trained.

    In the place of a YAML, the folder of a run or of a model will do.

    Questions may also come through a pipe, one a line: then only answers go to stdout.
    """
    typed = sys.stdin is not None and sys.stdin.isatty()
    set_up_logging(sys.stdout if typed else sys.stderr)
    config = load(words, "chat")
    from jtune.commands.chat import chat

    chat(config)


@case_command("CASE.yaml|FOLDER [key=value ...]")
@click.option("--tasks", metavar="NAME,NAME", required=True, help="Names of the harness's tasks.")
@click.option("--include_path", metavar="DIR", help="A folder with more tasks. These may run code.")
@click.option("--limit", type=NumberOrShare(), help="Use the first N documents of each task; below 1, a share of them.")
def eval(words: Words, tasks: str, include_path: str | None, limit: float | None) -> None:
    """Run benchmarks of the lm-evaluation-harness on the model."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("the lm-evaluation-harness is not installed: pip install 'jtune-llm[eval]'")
    config = load(words, "eval")
    from jtune.commands.eval import evaluate

    evaluate(config, tasks.split(","), include_path=include_path, limit=limit)


@case_command("[FOLDER] [key=value ...]")
def quickstart(words: Words) -> None:
    """Train a small model from nothing, offline, and question it.

    It takes about two minutes on two CPU cores and writes to FOLDER (default: out/quickstart).
    """
    from jtune.commands.quickstart import quickstart

    quickstart(words)


@program.command(context_settings={"help_option_names": ["-h", "--help"]})
def version() -> None:
    """Print the versions of the libraries, and the devices."""
    from jtune.commands.version import print_versions

    print_versions()


@program.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[NAME ...]", shell_complete=complete_names)
@click.pass_context
def help(context: click.Context, names: Words) -> None:
    """Explain arguments or commands; `help all`: all arguments."""
    root = context.find_root()
    if not names:
        print(root.get_help())
    for name in names:
        if (command := program.commands.get(name)) is not None:
            print(command.get_help(click.Context(command, root, info_name=name)))
        else:
            print(explain_argument(name))


def explain_argument(name: str) -> str:
    """What an argument means; of a name that is none, the nearest command or argument."""
    from jtune.config import explain
    from jtune.config.arguments import FIELDS
    from jtune.config.foreign import FOREIGN
    from jtune.config.renamed import RENAMED

    near = nearest(name, program.commands)
    if near is None or name in FIELDS or name in FOREIGN or name in RENAMED:
        return explain(name)
    return f"{name} is neither a command nor an argument. Did you mean `jtune help {near}`?"
