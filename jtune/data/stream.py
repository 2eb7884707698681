"""Rows that are never all there: read, aligned, mixed and encoded in windows of `buffer_size`, pass after pass.

    open_table ── align_stream ── merge ── hold out the first ── windows: take `buffer_size` ── encode_set

What is read when, and what becomes of it, depends on nothing but the arguments and the position: every process of a run
reads the same windows, and a position that was saved leads to the same windows again.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa

from jtune.config import DataArguments
from jtune.config.stages import StageRules
from jtune.data.encode.encoded import Encoded, check_vocabulary
from jtune.data.encode.sets import check_report, encode_set
from jtune.data.formats.align import align_stream, refuse_rows
from jtune.data.formats.fields import ALIGNED
from jtune.data.report import EXAMPLES, SetReport, add, report_of
from jtune.data.sources.columns import resolve_entry
from jtune.data.sources.load import PUBLIC, Hub, open_table, unreadable
from jtune.data.sources.mix import merge
from jtune.data.sources.registry import Entry, find_datasets
from jtune.data.templates.template import Template
from jtune.errors import DataError

log = logging.getLogger("jtune")

Position = Mapping[str, Any]  # JSON-able: where a window begins
START: dict[str, Any] = {"window": 0, "pass": 0, "rows": None, "report": asdict(SetReport("train"))}


@dataclass(frozen=True, eq=False)
class Stream:
    """The training sets, opened. Make it with `open_stream`; iterate over `windows` of it.

    Attributes:
      rows: one pass over them, aligned and mixed; always copied before it is read.
      entries: what `dataset` of a row counts.
      data_args: with LLaMA-Factory's names (jtune.config.DataArguments).
      vocab_size: what every id must be below; None: it is not looked at.
    """

    rows: datasets.IterableDataset
    entries: tuple[Entry, ...]
    data_args: DataArguments
    stage: StageRules
    template: Template
    most_examples: int = EXAMPLES
    vocab_size: int | None = None

    @property
    def named(self) -> list[Entry]:
        """The entries for naming rows by their number: for the line, a file would be read from its start each time."""
        short = lambda entry: Path(entry.path).name if entry.source == "file" else entry.path
        return [replace(entry, source="stream", path=short(entry)) for entry in self.entries]


class Window(NamedTuple):
    """Some rows in a line, encoded."""

    number: int  # from 0, over all passes
    encoded: Encoded
    report: SetReport  # of these rows
    begin: Position
    end: Position  # where the next one begins


def open_stream(
    data_args: DataArguments,
    stage: StageRules,
    seed: int,
    template: Template,
    *,
    hub: Hub = PUBLIC,
    most_examples: int = EXAMPLES,
) -> tuple[Stream, datasets.Dataset | None]:
    """The sets of `dataset` as a stream; and the rows held out for evaluation, the first `val_size` ones, if any.

    Raises:
      DataError: a set is missing, or damaged at its beginning, or asks for what a stream cannot give.
    """
    entries, tables = [], []
    found = find_datasets(data_args.dataset, data_args.dataset_dir, allow_outside=data_args.allow_outside_dataset_dir)
    for index, entry in enumerate(found):
        if entry.num_samples is not None:
            raise DataError(
                f"dataset {entry.name!r}: num_samples draws from all rows, which a stream does not have. Take it out, "
                "set max_samples for the first so many rows, or streaming: false"
            )
        log.info("opening dataset %s", entry.name)
        table, names, first = open_table(entry, hub)
        entry = resolve_entry(entry, names, stage, first)
        if data_args.max_samples is not None:
            table = table.take(data_args.max_samples)
        entries.append(entry)
        tables.append(align_stream(table, list(first), entry, stage=stage, index=index))
    rows = merge(tables, data_args.mix_strategy, data_args.interleave_probs, seed)
    held = int(data_args.val_size)
    # A window is encoded beside the training loop, in its process, and kept nowhere.
    here = replace(data_args, preprocessing_num_workers=None, overwrite_cache=False)
    stream = Stream(rows.skip(held) if held else rows, tuple(entries), here, stage, template, most_examples)
    return stream, _read(iter(_fresh(rows)), held, stream) if held else None


def windows(stream: Stream, position: Position | None = None) -> Iterator[Window]:
    """One window after the other, for ever: when the rows are used up, they are read again. None is empty.

    The last window of a pass has the rows that are left. A row that cannot be learned from is left out and counted, as
    elsewhere; `max_dropped` holds for what a pass has read so far. A row that `refuse_rows` refuses stops the run in
    the first window, where it says that the file is meant otherwise, and is counted later on, where it does not.

    Args:
      position: of a `Window`, of a stream with the same arguments: go on from there.

    Raises:
      DataError: rows cannot be read or encoded; too many are left out; nothing is left of a whole pass.
    """
    begin = position or START
    while True:
        for window in one_pass(stream, begin):
            begin = window.end
            if window.report.dropped and window.number:
                log.warning("window %d of the stream: %s", window.number + 1, window.report.sentence())
            for remark in new_remarks(window) if window.number else ():
                log.warning("window %d of the stream: %s", window.number + 1, remark)
            if len(window.encoded):
                yield window
        report = report_of(begin["report"])
        if report.read == 0:
            names = ", ".join(entry.name for entry in stream.entries)
            raise DataError(
                f"nothing to train on: {names}: the first {int(stream.data_args.val_size)} rows are held out"
            )
        log.info("the stream is used up, and read again (pass %d): %s", begin["pass"] + 2, report.sentence())
        begin = START | {"window": begin["window"], "pass": begin["pass"] + 1}


def check_position(stream: Stream, position: Position) -> None:
    """See that the stream can go on from `position`: a row is read there.

    Raises:
      ValueError: it cannot.
    """
    try:
        numbers = [position["window"], position["pass"], position["unit"]]
        if not all(type(n) is int and n >= 0 for n in numbers) or not isinstance(position["rows"], dict | None):
            raise TypeError(f"window, pass, unit and rows are {str([*numbers, position['rows']])[:80]}")
        add(report_of(position["report"]), SetReport("train"))
        if position["rows"] is not None:
            rows = _fresh(stream.rows)
            rows.load_state_dict(position["rows"])
            next(iter(rows), None)
    except Exception as error:  # datasets raises anything for a state that is not its own
        raise ValueError(f"stream: {type(error).__name__}: {error}") from error


def new_remarks(window: Window) -> list[str]:
    """What is said of the rows of a window, and was not said of rows before it."""
    said = {note.kind: set(note.items) for note in report_of(window.begin["report"]).notes}
    notes = tuple(note for note in window.report.notes if not set(note.items) <= said.get(note.kind, set()))
    return replace(window.report, notes=notes).remarks()


def one_pass(stream: Stream, begin: Position = START) -> Iterator[Window]:
    """The windows from a position to the end of its pass, also such of which nothing is left (see `windows`)."""
    number, report = begin["window"], report_of(begin["report"])
    rows = _fresh(stream.rows)
    if begin["rows"] is not None:
        rows.load_state_dict(begin["rows"])
    reader = iter(rows)
    while len(table := _read(reader, stream.data_args.buffer_size, stream)):
        if number == 0:
            refuse_rows(table, stream.entries)
        encoded, read = encode_set(
            "train", table, stream.named, stream.data_args, stream.stage, stream.template, stream.most_examples
        )
        report = add(report, read)
        check_report(report, stream.data_args, stream.stage)
        if stream.vocab_size is not None:
            check_vocabulary(encoded, stream.vocab_size)
        number += 1
        end = {"window": number, "pass": begin["pass"], "rows": rows.state_dict(), "report": asdict(report)}
        yield Window(number - 1, encoded, read, begin, end)
        begin = end


def _fresh(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """A copy to iterate over: what is iterated over remembers where it is, and so does all that was made of it."""
    return datasets.concatenate_datasets([rows])


def _read(reader: Iterator[Mapping[str, Any]], count: int, stream: Stream) -> datasets.Dataset:
    """The next rows, at most `count`, in memory."""
    try:
        rows = list(islice(reader, count))
    except Exception as error:  # whatever a reader, or the network, comes up with
        raise unreadable(stream.entries, error) from error
    # datasets would read all of it for a name.
    return datasets.Dataset(pa.Table.from_pylist(rows, schema=ALIGNED.arrow_schema), fingerprint="window")
