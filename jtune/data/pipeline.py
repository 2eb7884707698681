"""From names in dataset_info.json to encoded sets: every step is a function that can be called alone.

find_datasets ── load_table ── pick_rows ── align ── merge ── hold_out ── encode_set

With `streaming` the training sets go another way (see stream.py).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from datasets import config as datasets_config

from jtune.config import DataArguments
from jtune.config.stages import RULES, StageRules
from jtune.data.cache.shards import GroupOf, alone
from jtune.data.encode import saved
from jtune.data.encode.encoded import Encoded
from jtune.data.encode.sets import check_report, encode_set, sharing_of
from jtune.data.formats.align import align
from jtune.data.report import EXAMPLES, Report, SetReport
from jtune.data.sources.columns import resolve_entry
from jtune.data.sources.load import PUBLIC, Hub, load_table, not_utf8
from jtune.data.sources.mix import hold_out, merge, pick_rows
from jtune.data.sources.registry import Entry, find_datasets
from jtune.data.stream import Stream, open_stream, windows
from jtune.data.templates.template import Template
from jtune.distributed.exchange import ProcessGroup
from jtune.errors import ConfigError, DataError

log = logging.getLogger("jtune")

Sets = dict[str, tuple[Encoded, SetReport]]  # "train", "eval", "eval_<name>"


@dataclass(frozen=True)
class Splits:
    """Encoded sets. `eval`'s key "" is the unnamed set ("eval_loss"), others are names ("eval_name_loss").

    With `streaming`, `train` holds the first window of rows only, and `stream` leads to the others.
    """

    train: Encoded | None
    eval: dict[str, Encoded]
    report: Report
    stream: Stream | None = None


class Wanted(NamedTuple):
    """The sets to encode. Which rows are held out does not depend on it."""

    train: bool
    evaluate: bool
    predict: bool = False  # evaluation sets are to be answered: only the last answer of each row is labelled

    def evaluated_as(self, stage: StageRules) -> StageRules:
        """The rules for evaluation sets."""
        return replace(stage, rows="prompt") if self.predict else stage


def load_datasets(
    data_args: DataArguments,
    stage: StageRules,
    seed: int,
    template: Template,
    wanted: Wanted,
    *,
    hub: Hub = PUBLIC,
    most_examples: int = EXAMPLES,
    group_of: GroupOf = alone,
) -> Splits:
    """Read, mix, split and encode the sets that `data_args` names; what was left out is logged, once, in a sentence.

    Args:
      stage: which kind of rows to read, and how they are encoded.
      seed: of the draws of num_samples, of interleaving and of val_size.
      most_examples: rows of which the report says where they are, of each reason for which rows are left out.
      group_of: which processes share a folder. The first of those that share the cache reads files; all that share the
        folder of the encoded rows encode them, each its shards.

    Raises:
      DataError: a set is missing or damaged, or more is left out of it than `max_dropped` allows.
    """
    if not stage.encodes:
        raise ConfigError(
            f"stage {stage.name!r}: jtune encodes {', '.join(name for name in RULES if RULES[name].encodes)}"
        )
    folder = Path(data_args.tokenized_path) if data_args.tokenized_path else None
    group = group_of(Path(hub.cache_dir or datasets_config.HF_DATASETS_CACHE))
    keepers = group_of(folder) if folder else group
    evaluated = ("predict" if wanted.predict else stage.name) if wanted.evaluate else None
    settings = saved.settings_of(data_args, stage, seed, template, evaluated=evaluated) if folder else {}
    stream = None

    def kept() -> Sets | None:
        return saved.load(folder, settings) if folder else None

    sets = keepers.first("looking for encoded sets", kept)
    if sets is None:
        if keepers.is_partial:
            log.info(
                "%s is not shared by all processes: those that share one encode all rows for themselves. "
                "tokenized_path, or HF_DATASETS_CACHE, on a file system that all share: each encodes its part",
                folder or "the cache of datasets",
            )
        sets = {}
        if data_args.streaming and data_args.dataset and (wanted.train or wanted.evaluate):
            stream, held_out = open_stream(data_args, stage, seed, template, hub=hub, most_examples=most_examples)
            if wanted.train:
                first = next(windows(stream))
                sets["train"] = first.encoded, first.report
                log.info("streaming: a first look at %d rows", first.report.read)
                _tell(first.report)
            tables = {} if held_out is None or not wanted.evaluate else {"eval": (held_out, stream.entries)}
            others = replace(data_args, dataset=())
            tables |= _aligned_sets(others, stage, seed, wanted._replace(train=False), hub, group)
        else:
            tables = _aligned_sets(data_args, stage, seed, wanted, hub, group)
        to = saved.parts(folder) if folder else None
        for name, (table, entries) in tables.items():
            kind = stage if name == "train" else wanted.evaluated_as(stage)
            sharing = sharing_of(data_args, keepers, to)
            sets[name] = encode_set(name, table, entries, data_args, kind, template, most_examples, sharing)
            check_report(sets[name][1], data_args, kind)
            _tell(sets[name][1])
        if folder:
            made = sets

            def keep() -> Sets:
                found = kept()
                if found is None:
                    saved.save(folder, made, settings)
                    log.info("encoded sets written to %s", folder)
                return found or made

            sets = keepers.first("writing encoded sets", keep)
    else:
        log.info("encoded sets read from %s\n%s", folder, Report(tuple(report for _, report in sets.values())))
    encoded = {name: rows for name, (rows, _) in sets.items()}
    return Splits(
        train=encoded.pop("train", None),
        eval={name.removeprefix("eval").removeprefix("_"): rows for name, rows in encoded.items()},
        report=Report(tuple(report for _, report in sets.values())),
        stream=stream,
    )


def _tell(report: SetReport) -> None:
    (log.warning if report.dropped else log.info)("%s", report.sentence())
    for remark in report.remarks():
        log.warning("%s", remark)


def _aligned_sets(
    data_args: DataArguments, stage: StageRules, seed: int, wanted: Wanted, hub: Hub, group: ProcessGroup
) -> dict[str, tuple[datasets.Dataset, list[Entry]]]:
    """The rows of each set, and the entries that they come from: "train", "eval", "eval_<name>"."""
    random = np.random.RandomState(seed)  # one stream for all sets, training sets first
    sets: dict[str, tuple[datasets.Dataset, list[Entry]]] = {}
    if data_args.dataset and (wanted.train or wanted.evaluate):
        entries, tables = _load_all(data_args.dataset, data_args, stage, random, hub, group)
        rows, held_out = hold_out(_merge(tables, data_args, seed), data_args.val_size, seed)
        if wanted.train:
            sets["train"] = rows, entries
        if wanted.evaluate and held_out is not None:
            sets["eval"] = held_out, entries
    elif wanted.train:
        raise DataError("nothing to train on: `dataset` names no set")
    if data_args.eval_dataset and wanted.evaluate:
        kind = wanted.evaluated_as(stage)
        entries, tables = _load_all(data_args.eval_dataset, data_args, kind, random, hub, group)
        if data_args.eval_on_each_dataset:
            sets |= {f"eval_{name}": (table, entries) for name, table in zip(data_args.eval_dataset, tables)}
        else:
            sets["eval"] = _merge(tables, data_args, seed), entries
    return sets


def _load_all(
    names: Sequence[str],
    data_args: DataArguments,
    stage: StageRules,
    random: np.random.RandomState,
    hub: Hub,
    group: ProcessGroup,
) -> tuple[list[Entry], list[datasets.Dataset]]:
    entries, tables = [], []
    found = find_datasets(names, data_args.dataset_dir, allow_outside=data_args.allow_outside_dataset_dir)
    for index, entry in enumerate(found):
        log.info("reading dataset %s", entry.name)
        entry, table = load_aligned(entry, index, data_args, stage, random, hub, group)
        entries.append(entry)
        tables.append(table)
    return entries, tables


def load_aligned(
    entry: Entry,
    index: int,
    data_args: DataArguments,
    stage: StageRules,
    random: np.random.RandomState,
    hub: Hub,
    group: ProcessGroup,
) -> tuple[Entry, datasets.Dataset]:
    """One set: its rows read, picked, and brought into one form. The entry comes back with its format resolved."""
    read = partial(load_table, entry, hub, num_proc=data_args.preprocessing_num_workers)
    table = group.first(f"reading {entry.name}", read)
    entry = resolve_entry(entry, table.column_names, stage, table[0])
    rows = pick_rows(len(table), entry.num_samples, data_args.max_samples, random)
    if rows is not None:
        table = table.select(rows)
    try:
        return entry, align(table, entry, stage=stage, rows=rows, index=index, sharing=sharing_of(data_args, group))
    except UnicodeDecodeError as error:
        raise not_utf8(entry, error) from error


def _merge(tables: Sequence[datasets.Dataset], data_args: DataArguments, seed: int) -> datasets.Dataset:
    return merge(tables, data_args.mix_strategy, data_args.interleave_probs, seed)
