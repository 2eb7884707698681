"""What the model is fed, and what is left out: `jtune data CASE.yaml`, for people and, with --json, for programs."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from jtune.config.stages import rules_of
from jtune.data.batching.updates import plan_updates
from jtune.data.encode.encoded import IGNORED, Encoded
from jtune.data.pipeline import Splits, load_datasets
from jtune.data.report import EXAMPLES, SetReport, add
from jtune.data.stream import Stream, one_pass
from jtune.data.templates.template import Template, template_of
from jtune.data.tokens.tokenizer import add_model_tokens, load_tokenizer
from jtune.errors import DataError

log = logging.getLogger("jtune")

BINS = 12  # of the histogram of lengths
BAR = 40  # characters of its longest bar


def show_data(
    config: Any, rows: int = 3, as_json: bool = False, html: str | None = None, out: TextIO | None = None
) -> int:
    """Encode the training set of `config` (a jtune.config.Config) and show its first `rows` rows.

    Args:
      html: a file to write what is shown to, instead.

    Returns:
      0, the exit status.

    Raises:
      JtuneError: what `jtune train` would raise before it reads weights.
    """
    out = out or sys.stdout
    with _log_to_stderr(as_json):
        template, splits = encode_sets(config)
    encoded = splits.train
    if encoded is None:
        raise DataError("`dataset` names no set: there is nothing to show")
    if as_json:
        for line in json_rows(encoded, rows):
            print(line, file=out)
        return 0
    if html is None:
        show(config, splits, template, rows, Console(file=out, highlight=False))
        return 0
    console = Console(file=io.StringIO(), record=True, force_terminal=True, width=120, highlight=False)
    show(config, splits, template, rows, console)
    Path(html).write_text(console.export_html(theme=MONOKAI), encoding="utf-8")
    print(f"written to {html}", file=out)
    return 0


def show(config: Any, splits: Splits, template: Template, rows: int, console: Console) -> None:
    """The first rows, with what is learned marked, and the numbers of all; of a stream, of its first window."""
    encoded = splits.train
    assert encoded is not None
    for i in range(min(rows, len(encoded))):
        for name, side in sides(encoded).items():
            title = f"row {i + 1} of {len(encoded)}{name and f', {name}'}: {side.lengths[i]} tokens"
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


def sides(encoded: Encoded) -> dict[str, Encoded]:
    """Of pairs, the chosen and the rejected side; else the examples themselves, without a name."""
    return {"chosen": encoded, "rejected": encoded.rejected} if encoded.prefix else {"": encoded}


def check(config: Any, out: TextIO | None = None) -> int:
    """Read and encode all sets of `config`, and name every row that is left out, with its place and the reason.

    Returns:
      0, or 3 where more is left out than `max_dropped` allows.

    Raises:
      JtuneError: what stops the run whatever the limit is.
    """
    out = out or sys.stdout
    streaming = config.data.streaming and bool(config.data.dataset)
    unlimited = replace(config, data=replace(config.data, max_dropped=sys.maxsize))
    _, splits = encode_sets(unlimited, train=not streaming, evaluate=True, most_examples=sys.maxsize)

    def name_rows(report: SetReport) -> SetReport:
        for dropped in report.dropped:
            for place in dropped.examples:
                print(f"{place}: {dropped.reason}", file=out)
        return report

    streamed = []
    if splits.stream is not None:  # a whole pass, window by window, as it is trained on
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
    config: Any, *, train: bool = True, evaluate: bool = False, most_examples: int = EXAMPLES
) -> tuple[Template, Splits]:
    """The template of `config` and its sets, encoded; without `train` not that to train on."""
    data, model = config.data, config.model
    tokenizer = load_tokenizer(model.model_name_or_path, split_special_tokens=model.split_special_tokens, **model.hub)
    add_model_tokens(tokenizer, model)
    template = template_of(data, tokenizer, for_chat=rules_of(config.finetuning.stage).has_prompts)
    return template, load_datasets(
        data,
        rules_of(config.finetuning.stage),
        config.training.seed,
        template.tokenizer,
        template,
        train=train and bool(data.dataset),
        # What is kept in tokenized_path is for training, too.
        evaluate=evaluate or bool(data.tokenized_path and (config.training.do_eval or config.training.do_predict)),
        predict=config.training.predict_with_generate,
        cache_dir=model.cache_dir,
        token=model.hf_hub_token,
        most_examples=most_examples,
    )


def json_rows(encoded: Encoded, rows: int) -> Iterator[str]:
    """The first `rows` rows, as encoded before packing: input_ids and labels; in stage pt, input_ids; in stages of
    preferences, what LLaMA-Factory has there (chosen_input_ids ..., kto_tags).
    """
    for row in encoded.rows.select(range(min(rows, len(encoded)))):
        yield json.dumps(row)


TRAINED, GIVEN = "bold green", "dim"
BRACKETS = "\u27e6", "\u27e7"  # where there are no colours: rare in text, unlike plain brackets


def marked(row: dict[str, np.ndarray], tokenizer: Any, *, styled: bool = True) -> Text:
    """The text of a row; tokens that are learned stand out. Several tokens may share a character: runs are decoded."""
    learned = row["labels"] != IGNORED
    learned[:1] = False  # nothing comes before the first token that could predict it
    text = Text()
    for is_learned, show_data in groupby(zip(learned.tolist(), row["input_ids"].tolist()), key=lambda pair: pair[0]):
        words = tokenizer.decode([token for _, token in show_data])
        if is_learned and not styled:
            words = words.join(BRACKETS)
        text.append(words, style=TRAINED if is_learned else GIVEN)
    return text


def statistics(config: Any, encoded: Encoded, stream: Stream | None = None) -> str:
    """Tokens, lengths, and what an epoch is on one device; or a run, of a stream whose first window `encoded` is."""
    lengths = np.concatenate([side.lengths for side in sides(encoded).values()])
    tokens = int(lengths.sum(dtype=np.int64))
    learned = sum(int(side.labelled.sum(dtype=np.int64)) for side in sides(encoded).values())
    lines = [
        f"{len(encoded)} rows, {tokens} tokens, {learned} of them trained on ({learned / tokens:.1%})",
        f"tokens in {'an answer and its prompt' if encoded.prefix else 'a row'}: mean {lengths.mean():.0f}, median "
        f"{np.median(lengths):.0f}, longest {lengths.max()}",
        *histogram(lengths),
    ]
    if not rules_of(config.finetuning.stage).learns_tokens:
        return "\n".join(lines)
    plan = plan_updates(config, encoded, 1, stream)
    shapes = ", ".join("x".join(map(str, shape)) for shape in plan.shapes)
    steps = f"{plan.updates_per_epoch} steps an epoch, {plan.max_steps} in all" if stream is None else plan.describe()
    lines.append(f"on one device: {steps}; batches [accum x batch x seq] {shapes}, {plan.padding_share:.1%} padding")
    return "\n".join(lines)


def histogram(lengths: np.ndarray) -> list[str]:
    """Rows by their length, a line for each bin.

    >>> print(*histogram(np.array([1, 2, 2, 9])), sep="\\n")
      1-5               3 ████████████████████████████████████████
      6-9               1 █████████████
    """
    width = max(1, -(-int(lengths.max() - lengths.min() + 1) // min(BINS, len(set(lengths.tolist())) - 1 or 1)))
    first = int(lengths.min())
    counts = np.bincount((lengths - first) // width)
    last = int(lengths.max())
    lines = []
    for i, count in enumerate(counts.tolist()):
        label = f"{first + i * width}-{min(first + (i + 1) * width - 1, last)}"
        lines.append(f"  {label:11} {count:>7} {'█' * round(BAR * count / counts.max())}".rstrip())
    return lines


@contextmanager
def _log_to_stderr(active: bool):
    """With --json, standard output holds the rows and nothing else."""
    handlers = [h for h in log.handlers if isinstance(h, logging.StreamHandler)] if active else []
    streams = [handler.setStream(sys.stderr) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, streams):
            handler.setStream(stream or sys.stderr)
