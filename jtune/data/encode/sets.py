"""One set: from aligned rows to ids, and the account of what became of them."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np

from jtune.config import DataArguments
from jtune.config.packing import joins_texts, longest_example
from jtune.config.stages import StageRules
from jtune.data.cache.shards import ALONE, Sharing, arrow_column
from jtune.data.encode.encoded import Encoded
from jtune.data.encode.notes import notes_of
from jtune.data.encode.pretraining import encode_documents
from jtune.data.encode.rows import encode_rows
from jtune.data.encode.turns import NOTHING_TO_LEARN, Rules, too_long
from jtune.data.formats.align import is_faulty
from jtune.data.report import EXAMPLES, Dropped, SetReport, reasons
from jtune.data.sources.load import places
from jtune.data.sources.registry import Entry
from jtune.data.templates.template import Template
from jtune.distributed.exchange import ProcessGroup
from jtune.errors import DataError


def sharing_of(data_args: DataArguments, group: ProcessGroup = ALONE, folder: Path | None = None) -> Sharing:
    """How the arguments share out the work of encoding."""
    return Sharing(
        data_args.preprocessing_batch_size,
        data_args.preprocessing_num_workers,
        data_args.overwrite_cache,
        group,
        folder,
    )


def encode_set(
    name: str,
    table: datasets.Dataset,
    entries: Sequence[Entry],
    data_args: DataArguments,
    stage: StageRules,
    template: Template,
    most_examples: int = EXAMPLES,
    sharing: Sharing | None = None,
) -> tuple[Encoded, SetReport]:
    """Encode aligned rows and count what is left out.

    Args:
      stage: of the run; with rows "prompt" for sets that are to be answered.
      sharing: default: as `data_args` says, by this process alone.

    Raises:
      DataError: a row is too long, and `overlong` is "error".
    """
    cutoff_len = longest_example(data_args, stage)
    sharing = sharing_of(data_args) if sharing is None else sharing
    policy = data_args.overlong
    encoding = "truncate" if policy == "error" or (policy == "split" and stage.rows == "prompt") else policy
    if stage.rows == "text":
        packing = joins_texts(data_args.packing)
        blocks = {"packing": packing, "neat_packing": data_args.neat_packing, "overlong": encoding}
        made = encode_documents(table, template, cutoff_len=cutoff_len, sharing=sharing, **blocks)
        encoded = Encoded(made)
        short = np.flatnonzero(encoded.labelled == 0)
        if len(short):
            encoded = Encoded(made, np.flatnonzero(encoded.labelled))
        dropped, joined = _count_faults(table, entries, most_examples), packing or encoding == "split"
        long = np.flatnonzero(arrow_column(made, "cut").to_numpy())
        if encoding == "drop" and len(long):
            dropped = (
                *dropped,
                Dropped(too_long(cutoff_len), len(long), places(entries, table.select(long[:most_examples]))),
            )
            long = long[:0]
        origin = table
    else:
        margins = any(entry.columns.margin for entry in entries)
        rules = Rules(cutoff_len, data_args.mask_history, data_args.train_on_prompt, encoding, margins)
        made = origin = encode_rows(table, template, stage, rules, sharing)
        dropped, joined = _count_faults(made, entries, most_examples), False
        faulty = is_faulty(made)
        prefix = "chosen_" if stage.rows == "pair" else ""
        encoded = Encoded(made, np.flatnonzero(~faulty) if faulty.any() else None, prefix)
        long = np.flatnonzero(arrow_column(made, "cut").to_numpy())
    if policy == "error" and len(long):
        found = Dropped(too_long(cutoff_len), len(long), places(entries, origin.select(long[:EXAMPLES])))
        raise DataError(
            f"{name}: {found}. Raise it, or say what is to become of them: overlong: truncate, drop or split"
        )
    parts = [encoded, encoded.rejected] if stage.rows == "pair" else [encoded]
    report = SetReport(
        name=name,
        read=len(table),
        encoded=len(encoded),
        tokens=sum(int(part.lengths.sum(dtype=np.int64)) for part in parts),
        trained=sum(int(part.labelled.sum(dtype=np.int64)) for part in parts),
        cut=len(long),
        dropped=dropped,
        joined=joined,
        notes=notes_of(made, entries, most_examples),
    )
    return encoded, report


def check_report(report: SetReport, data_args: DataArguments, stage: StageRules) -> None:
    """Raise a DataError, with the reasons, if nothing is left of a set, or less than `max_dropped` allows."""
    if report.encoded == 0:
        raise DataError(_nothing_left(report, data_args.cutoff_len, stage))
    most = data_args.max_dropped
    if report.exceeds(most):
        raise DataError(
            f"{report.too_many(most)}: {reasons(report.dropped)}. `jtune data CASE.yaml --check` names them all"
        )


def _count_faults(table: datasets.Dataset, entries: Sequence[Entry], most_examples: int) -> tuple[Dropped, ...]:
    rows = np.flatnonzero(is_faulty(table))
    faults = np.array(table.select(rows)["fault"][:], dtype=object)
    dropped = []
    for reason in dict.fromkeys(faults):
        where = rows[faults == reason]
        dropped.append(Dropped(reason, len(where), places(entries, table.select(where[:most_examples]))))
    return tuple(dropped)


def _nothing_left(report: SetReport, cutoff_len: int, stage: StageRules) -> str:
    text = f"{report.name}: nothing is left of {report.read} rows"
    if report.dropped:
        text += f": {reasons(report.dropped)}"
    elif stage.rows == "text":
        text += (
            f": they do not fill one block of cutoff_len {cutoff_len} tokens. Make it smaller, or set packing: false"
        )
    if any(d.reason == NOTHING_TO_LEARN for d in report.dropped):
        text += f". Is cutoff_len {cutoff_len} too small?"
    return text
