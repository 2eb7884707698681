"""What the model is fed: `jtune data CASE.yaml`, for people and, with --json, for programs."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.text import Text

from jtune.data.batches import plan_batches
from jtune.data.encoded import IGNORED, Encoded
from jtune.data.pipeline import load_datasets
from jtune.data.templates import Template, get_template
from jtune.data.tokenizer import load_tokenizer
from jtune.errors import DataError

log = logging.getLogger("jtune")

BINS = 12  # of the histogram of lengths
BAR = 40  # characters of its longest bar


def run(config: Any, rows: int = 3, as_json: bool = False, out: TextIO | None = None) -> int:
    """Encode the training set of `config` (a jtune.config.Config) and show its first `rows` rows.

    Returns:
      0, the exit status.

    Raises:
      JtuneError: what `jtune train` would raise before it reads weights.
    """
    out = out or sys.stdout
    with _log_to_stderr(as_json):
        template, encoded = encode_training_set(config)
    if as_json:
        for line in json_rows(encoded, rows):
            print(line, file=out)
        return 0
    console = Console(file=out, highlight=False)
    for i in range(min(rows, len(encoded))):
        console.print(Text(f"row {i + 1} of {len(encoded)}: {encoded.lengths[i]} tokens", style="bold"))
        console.print(marked(encoded[i], template.tokenizer, styled=console.is_terminal))
        console.print()
    if console.is_terminal:
        console.print(Text("trained on", style=TRAINED) + Text("  not trained on", style=GIVEN))
    else:
        console.print(Text(f"{BRACKETS[0]}trained on{BRACKETS[1]}  not trained on"))
    console.print(Text(statistics(config, encoded)))
    return 0


def encode_training_set(config: Any) -> tuple[Template, Encoded]:
    """The template of `config` and its training set, encoded."""
    data, model = config.data, config.model
    template = get_template(
        data.template,
        load_tokenizer(model.model_name_or_path, split_special_tokens=model.split_special_tokens, **model.hub),
        tool_format=data.tool_format,
        default_system=data.default_system,
        enable_thinking=data.enable_thinking,
        preserve_thinking=data.preserve_thinking,
    )
    splits = load_datasets(
        data,
        config.finetuning.stage,
        config.training.seed,
        template.tokenizer,
        template,
        train=True,
        evaluate=False,
        cache_dir=model.cache_dir,
        token=model.hf_hub_token,
    )
    if splits.train is None:
        raise DataError("`dataset` names no set: there is nothing to show")
    return template, splits.train


def json_rows(encoded: Encoded, rows: int) -> Iterator[str]:
    """The first `rows` rows, as encoded before packing: input_ids and labels; in stage pt, input_ids."""
    for i in range(min(rows, len(encoded))):
        row = encoded[i]
        keys = ("input_ids", "labels") if "labels" in encoded.table.column_names else ("input_ids",)
        yield json.dumps({key: row[key].tolist() for key in keys})


TRAINED, GIVEN = "bold green", "dim"
BRACKETS = "\u27e6", "\u27e7"  # where there are no colours: rare in text, unlike plain brackets


def marked(row: dict[str, np.ndarray], tokenizer: Any, *, styled: bool = True) -> Text:
    """The text of a row; tokens that are learned stand out. Several tokens may share a character: runs are decoded."""
    learned = row["labels"] != IGNORED
    learned[:1] = False  # nothing comes before the first token that could predict it
    text = Text()
    for is_learned, run in groupby(zip(learned.tolist(), row["input_ids"].tolist()), key=lambda pair: pair[0]):
        words = tokenizer.decode([token for _, token in run])
        if is_learned and not styled:
            words = words.join(BRACKETS)
        text.append(words, style=TRAINED if is_learned else GIVEN)
    return text


def statistics(config: Any, encoded: Encoded) -> str:
    """Tokens, lengths, and what an epoch is on one device."""
    tokens = int(encoded.lengths.sum(dtype=np.int64))
    learned = int(encoded.labelled.sum(dtype=np.int64))
    lines = [
        f"{len(encoded)} rows, {tokens} tokens, {learned} of them trained on ({learned / tokens:.1%})",
        f"tokens in a row: mean {encoded.lengths.mean():.0f}, median {np.median(encoded.lengths):.0f}, "
        f"longest {encoded.lengths.max()}",
        *histogram(encoded.lengths),
    ]
    data, training = config.data, config.training
    plan = plan_batches(
        encoded,
        stage=config.finetuning.stage,
        packing=bool(data.neat_packing or (data.packing and config.finetuning.stage != "pt")),
        cutoff_len=data.cutoff_len,
        per_device_batch_size=training.per_device_train_batch_size,
        batch_shards=1,
        accumulation=training.gradient_accumulation_steps,
        seed=training.seed if training.data_seed is None else training.data_seed,
        shuffle=not config.finetuning.disable_shuffling,
        num_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        windows=encoded.preprocessing_batches(data.preprocessing_batch_size, data.preprocessing_num_workers),
    )
    shapes = ", ".join("x".join(map(str, shape)) for shape in plan.shapes)
    lines.append(
        f"on one device: {plan.updates_per_epoch} steps an epoch, {plan.max_steps} in all; "
        f"batches [accum x batch x seq] {shapes}, {plan.padding_share:.1%} padding"
    )
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
