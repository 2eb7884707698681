"""`jtune data CASE.yaml`: what the model is fed and what is left out, for people and, with --json, for programs."""

import io
import logging
import sys
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from jtune.commands.rows import BRACKETS, GIVEN, TRAINED, describe_row, json_rows, marked, sides, statistics
from jtune.config import Config
from jtune.config.stages import rules_of
from jtune.data.pipeline import Splits, Wanted, load_datasets
from jtune.data.report import EXAMPLES, SetReport, add
from jtune.data.sources.load import Hub
from jtune.data.stream import one_pass
from jtune.data.templates.template import Template, template_of
from jtune.data.tokens.tokenizer import add_model_tokens, load_tokenizer
from jtune.errors import ConfigError, DataError
from jtune.loading.data import check_margins

log = logging.getLogger("jtune")


def show_data(
    config: Config, rows: int = 3, as_json: bool = False, html: str | None = None, out: TextIO | None = None
) -> int:
    """Encode the training set of `config` and show its first `rows` rows.

    Args:
      as_json: print them as they are encoded, an object a line.
      html: a file to write the page to, instead of `out`.

    Returns:
      0, the exit status.

    Raises:
      ConfigError: `html` cannot be written.
      JtuneError: the errors that `jtune train` raises before it reads weights.
    """
    out = out or sys.stdout
    template, splits = encode_sets(config)
    if splits.train is None:
        raise DataError("`dataset` names no set: there is nothing to show")
    if as_json:
        for line in json_rows(splits.train, rows):
            print(line, file=out)
    elif html is None:
        show(config, splits, template, rows, Console(file=out, highlight=False))
    else:
        console = Console(file=io.StringIO(), record=True, force_terminal=True, width=120, highlight=False)
        show(config, splits, template, rows, console)
        try:
            Path(html).write_text(console.export_html(theme=MONOKAI), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--html {html}: cannot be written: {error.strerror}") from error
        print(f"wrote {html}", file=out)
    return 0


def show(config: Config, splits: Splits, template: Template, rows: int, console: Console) -> None:
    """Print the first rows, trained-on tokens marked, then the statistics of all; of a stream, of its first window."""
    encoded = splits.train
    assert encoded is not None
    for i in range(min(rows, len(encoded))):
        for name, side in sides(encoded).items():
            about = ", ".join(filter(None, [f"row {i + 1} of {len(encoded)}", name, describe_row(encoded, i, name)]))
            title = f"{about}: {side.lengths[i]} tokens"
            console.print(Text(title, style="bold"))
            console.print(marked(side[i], template.tokenizer, styled=console.is_terminal))
            console.print()
    if console.is_terminal:
        console.print(Text("trained on", style=TRAINED) + Text("  not trained on", style=GIVEN))
    else:
        console.print(Text(f"{BRACKETS[0]}trained on{BRACKETS[1]}  not trained on"))
    if splits.stream is not None:
        console.print(Text(f"streaming: only the first rows were read, buffer_size {config.data.buffer_size}"))
    console.print(Text(statistics(config, encoded, splits.stream)))


def check_rows(config: Config, out: TextIO | None = None) -> int:
    """Read and encode all sets of `config`, and name every row that is left out, with its place and the reason; of
    pairs and feedback also those that are learned from, but teach little (equal, empty or cut answers).

    Returns:
      0, or 3 where more is left out than `max_dropped` allows.

    Raises:
      JtuneError: a fault that stops the run whatever the limit is.
    """
    out = out or sys.stdout
    streaming = config.data.streaming and bool(config.data.dataset)
    unlimited = replace(config, data=replace(config.data, max_dropped=sys.maxsize))
    _, splits = encode_sets(unlimited, train=not streaming, evaluate=True, most_examples=sys.maxsize)

    def name_rows(report: SetReport) -> SetReport:
        for dropped in report.dropped:
            for place in dropped.examples:
                print(f"{place}: {dropped.reason}", file=out)
        for note in report.notes:
            for line in note.named():
                print(line, file=out)
        return report

    streamed = []
    if splits.stream is not None:  # a whole pass, window by window, as in training
        windows = (name_rows(window.report) for window in one_pass(splits.stream))
        streamed = [reduce(add, windows, SetReport("train"))]
        log.info("%s", "\n".join([streamed[0].sentence(), *streamed[0].remarks()]))
    status = 0
    for report in (*streamed, *map(name_rows, splits.report.sets)):
        if report.exceeds(config.data.max_dropped):
            print(report.too_many(config.data.max_dropped), file=out)
            status = DataError.exit_code
    return status


def encode_sets(
    config: Config, *, train: bool = True, evaluate: bool = False, most_examples: int = EXAMPLES
) -> tuple[Template, Splits]:
    """The template of `config` and its encoded sets; without `train`, no training set."""
    data, model = config.data, config.model
    check_margins(config)
    name = model.model_name_or_path or ""
    tokenizer = load_tokenizer(name, split_special_tokens=model.split_special_tokens, **model.hub)
    add_model_tokens(tokenizer, model)
    template = template_of(data, tokenizer, for_chat=rules_of(config.finetuning.stage).has_prompts)
    # tokenized_path holds the evaluation sets of a training run, too.
    evaluates = evaluate or bool(data.tokenized_path and (config.training.do_eval or config.training.do_predict))
    return template, load_datasets(
        data,
        rules_of(config.finetuning.stage),
        config.training.seed,
        template,
        Wanted(train and bool(data.dataset), evaluates, config.training.predict_with_generate),
        hub=Hub(model.cache_dir, model.hf_hub_token),
        most_examples=most_examples,
    )
