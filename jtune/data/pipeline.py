"""From names in dataset_info.json to encoded sets: every step is a function that can be called alone.

find_datasets ── load_table ── pick_rows ── align ── merge ── hold_out ── encode
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from jtune.data import saved
from jtune.data.align import align, is_faulty
from jtune.data.encode import NOTHING_TO_LEARN, Rules, encode_documents, encode_rows, too_long
from jtune.data.encoded import Encoded, arrow_column
from jtune.data.load import check_columns, load_table, not_utf8, places, resolve_format
from jtune.data.mix import hold_out, merge, pick_rows
from jtune.data.registry import Entry, find_datasets
from jtune.data.report import EXAMPLES, Dropped, Report, SetReport, reasons
from jtune.data.templates import Template
from jtune.errors import ConfigError, DataError

log = logging.getLogger("jtune")

STAGES = ("sft", "pt", "rm", "dpo", "kto")


@dataclass(frozen=True)
class Splits:
    """Encoded sets. `eval`'s key "" is the unnamed set ("eval_loss"), others are names ("eval_name_loss")."""

    train: Encoded | None
    eval: dict[str, Encoded]
    report: Report


def load_datasets(
    data_args: Any,
    stage: str,
    seed: int,
    tokenizer: Any,
    template: Template,
    *,
    train: bool,
    evaluate: bool,
    predict: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
    most_examples: int = EXAMPLES,
) -> Splits:
    """Read, mix, split and encode the sets that `data_args` names; what was left out is logged, once, in a sentence.

    Args:
      data_args: with LLaMA-Factory's names (jtune.config.DataArguments).
      stage: "sft", "pt", "rm" or "dpo" (pairs of answers), "kto" (answers that are good or not).
      seed: of the draws of num_samples, of interleaving and of val_size.
      train, evaluate: which sets to encode. Which rows are held out does not depend on it.
      predict: evaluation sets are to be answered: of each row the last answer is labelled, and nothing else.
      cache_dir, token: for downloads from the hub.
      most_examples: rows of which the report says where they are, of each reason for which rows are left out.

    Raises:
      DataError: a set is missing or damaged, or more is left out of it than `max_dropped` allows.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage {stage!r}: jtune encodes {', '.join(STAGES)}")
    if template.tokenizer is not tokenizer:
        raise ValueError("the template was made for another tokenizer")
    folder = Path(data_args.tokenized_path) if data_args.tokenized_path else None
    eval_stage = "predict" if predict else stage
    evaluated = eval_stage if evaluate else None
    settings = saved.settings_of(data_args, stage, seed, template, evaluated=evaluated) if folder else {}
    sets = saved.load(folder, settings) if folder else None
    if sets is None:
        load = {"cache_dir": cache_dir, "token": token}
        sets = {}
        for name, (table, entries) in _aligned_sets(data_args, stage, seed, train, evaluate, **load).items():
            kind = stage if name == "train" else eval_stage
            sets[name] = encode_set(name, table, entries, data_args, kind, template, most_examples)
            report = sets[name][1]
            (log.warning if report.dropped else log.info)("%s", report.sentence())
        if folder:
            saved.save(folder, sets, settings)
            log.info("encoded sets written to %s", folder)
    else:
        log.info("encoded sets read from %s\n%s", folder, "\n".join(report.sentence() for _, report in sets.values()))
    encoded = {name: rows for name, (rows, _) in sets.items()}
    return Splits(
        train=encoded.pop("train", None),
        eval={name.removeprefix("eval").removeprefix("_"): rows for name, rows in encoded.items()},
        report=Report(tuple(report for _, report in sets.values())),
    )


def _aligned_sets(
    data_args: Any, stage: str, seed: int, train: bool, evaluate: bool, **load: Any
) -> dict[str, tuple[datasets.Dataset, list[Entry]]]:
    """The rows of each set, and the entries that they come from: "train", "eval", "eval_<name>"."""
    load |= {"stage": stage, "random": np.random.RandomState(seed)}  # one stream for all sets, training sets first
    sets: dict[str, tuple[datasets.Dataset, list[Entry]]] = {}
    if data_args.dataset and (train or evaluate):
        entries, tables = _load_all(data_args.dataset, data_args, **load)
        rows, held_out = hold_out(_merge(tables, data_args, seed), data_args.val_size, seed)
        if train:
            sets["train"] = rows, entries
        if evaluate and held_out is not None:
            sets["eval"] = held_out, entries
    elif train:
        raise DataError("nothing to train on: `dataset` names no set")
    if data_args.eval_dataset and evaluate:
        entries, tables = _load_all(data_args.eval_dataset, data_args, **load)
        if data_args.eval_on_each_dataset:
            sets |= {f"eval_{name}": (table, entries) for name, table in zip(data_args.eval_dataset, tables)}
        else:
            sets["eval"] = _merge(tables, data_args, seed), entries
    return sets


def load_aligned(
    entry: Entry,
    *,
    stage: str,
    random: np.random.RandomState,
    index: int = 0,
    max_samples: int | None = None,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
) -> tuple[Entry, datasets.Dataset]:
    """One set: its rows read, picked, and brought into one form. The entry comes back with its format resolved."""
    table = load_table(entry, cache_dir=cache_dir, token=token, num_proc=num_proc)
    entry = resolve_format(entry, table.column_names)
    check_stage(entry, stage)
    check_columns(entry, table.column_names, stage)
    rows = pick_rows(len(table), entry.num_samples, max_samples, random)
    if rows is not None:
        table = table.select(rows)
    options: dict[str, Any] = {"num_proc": num_proc, "overwrite_cache": overwrite_cache}
    try:
        return entry, align(table, entry, stage=stage, rows=rows, index=index, **options)
    except UnicodeDecodeError as error:
        raise not_utf8(entry, error) from error


def check_stage(entry: Entry, stage: str) -> None:
    """Raise a DataError for sets that are not for `stage`."""
    kind = "ranking" if entry.ranking else "kto_tag" if entry.columns.kto_tag else ""
    if kind and not (stage == "pt" and kind == "kto_tag"):
        stages = ("rm", "dpo") if kind == "ranking" else ("kto",)
        if stage not in stages:
            holds = f"dataset {entry.name!r} holds preferences ({kind})"
            raise DataError(f"{holds}: it is for stage {' and '.join(stages)}, not {stage}")
    elif stage in ("rm", "dpo", "kto"):
        wanted = '"columns": {"kto_tag": "..."}' if stage == "kto" else '"ranking": true'
        raise DataError(f"dataset {entry.name!r} holds no preferences, and stage {stage} learns from them: {wanted}")
    media = [key for key in ("images", "videos", "audios") if getattr(entry.columns, key)]
    if media:
        raise DataError(f"dataset {entry.name!r} has {', '.join(media)}; jtune trains on text")


def encode_set(
    name: str,
    table: datasets.Dataset,
    entries: Sequence[Entry],
    data_args: Any,
    stage: str,
    template: Template,
    most_examples: int = EXAMPLES,
) -> tuple[Encoded, SetReport]:
    """Encode aligned rows and count what is left out.

    Args:
      stage: as of `encode_rows`, or "pt".

    Raises:
      DataError: nothing is left, with the reasons.
    """
    cutoff_len = data_args.cutoff_len
    if data_args.packing and stage != "predict" and not (stage == "pt" and data_args.neat_packing):
        cutoff_len -= 1  # LLaMA-Factory's packed rows end with one token of padding; only where packing is asked for
    shared = {
        "cutoff_len": cutoff_len,
        "batch_size": data_args.preprocessing_batch_size,
        "num_proc": data_args.preprocessing_num_workers,
        "overwrite_cache": data_args.overwrite_cache,
    }
    policy = data_args.overlong
    encoding = "truncate" if policy == "error" or (policy == "split" and stage == "predict") else policy
    if stage == "pt":
        packing = data_args.packing is None or data_args.packing
        neat = data_args.neat_packing
        made = encode_documents(table, template, packing=packing, neat_packing=neat, overlong=encoding, **shared)
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
        rules = Rules(cutoff_len, data_args.mask_history, data_args.train_on_prompt, encoding)
        made = origin = encode_rows(
            table, template, stage, rules, **{k: shared[k] for k in shared if k != "cutoff_len"}
        )
        dropped, joined = _count_faults(made, entries, most_examples), False
        faulty = is_faulty(made)
        prefix = "chosen_" if stage in ("rm", "dpo") else ""
        encoded = Encoded(made, np.flatnonzero(~faulty) if faulty.any() else None, prefix)
        long = np.flatnonzero(arrow_column(made, "cut").to_numpy())
    if policy == "error" and len(long):
        found = Dropped(too_long(cutoff_len), len(long), places(entries, origin.select(long[:EXAMPLES])))
        raise DataError(
            f"{name}: {found}. Raise it, or say what is to become of them: overlong: truncate, drop or split"
        )
    parts = [encoded, encoded.rejected] if stage in ("rm", "dpo") else [encoded]
    report = SetReport(
        name=name,
        read=len(table),
        encoded=len(encoded),
        tokens=sum(int(part.lengths.sum(dtype=np.int64)) for part in parts),
        trained=sum(int(part.labelled.sum(dtype=np.int64)) for part in parts),
        cut=len(long),
        dropped=dropped,
        joined=joined,
    )
    if len(encoded) == 0:
        raise DataError(_nothing_left(report, data_args.cutoff_len, stage))
    most = data_args.max_dropped
    if report.exceeds(most):
        raise DataError(f"{report.too_many(most)}: {reasons(dropped)}. `jtune data CASE.yaml --check` names them all")
    return encoded, report


def _load_all(names: Sequence[str], data_args: Any, **load: Any) -> tuple[list[Entry], list[datasets.Dataset]]:
    entries, tables = [], []
    found = find_datasets(names, data_args.dataset_dir, allow_outside=data_args.allow_outside_dataset_dir)
    for index, entry in enumerate(found):
        log.info("reading dataset %s", entry.name)
        entry, table = load_aligned(
            entry,
            index=index,
            max_samples=data_args.max_samples,
            num_proc=data_args.preprocessing_num_workers,
            overwrite_cache=data_args.overwrite_cache,
            **load,
        )
        entries.append(entry)
        tables.append(table)
    return entries, tables


def _merge(tables: Sequence[datasets.Dataset], data_args: Any, seed: int) -> datasets.Dataset:
    return merge(tables, data_args.mix_strategy, data_args.interleave_probs, seed)


def _count_faults(table: datasets.Dataset, entries: Sequence[Entry], most_examples: int) -> tuple[Dropped, ...]:
    rows = np.flatnonzero(is_faulty(table))
    faults = np.array(table.select(rows)["fault"][:], dtype=object)
    dropped = []
    for reason in dict.fromkeys(faults):
        where = rows[faults == reason]
        dropped.append(Dropped(reason, len(where), places(entries, table.select(where[:most_examples]))))
    return tuple(dropped)


def _nothing_left(report: SetReport, cutoff_len: int, stage: str) -> str:
    text = f"{report.name}: nothing is left of {report.read} rows"
    if report.dropped:
        text += f": {reasons(report.dropped)}"
    elif stage == "pt":
        text += (
            f": they do not fill one block of cutoff_len {cutoff_len} tokens. Make it smaller, or set packing: false"
        )
    if any(d.reason == NOTHING_TO_LEARN for d in report.dropped):
        text += f". Is cutoff_len {cutoff_len} too small?"
    return text
