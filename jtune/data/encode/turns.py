"""The pieces that every kind of row is encoded from: rendered turns, their ids and labels, and columns of them."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jtune.data.encode.encoded import IGNORED
from jtune.data.formats.messages import FaultyRow
from jtune.data.templates.chat_format import Pieces
from jtune.data.templates.template import Template
from jtune.data.tokens.ids import Ids

log = logging.getLogger("jtune")

NOTHING_TO_LEARN = "nothing to learn (no token of an answer is left)"
NOTHING_WANTED = "nothing to learn (no answer is to be learned: weight, train, loss)"
IDS = datasets.List(datasets.Value("int32"))
NOTED = {"noted": datasets.Value("string")}  # see notes.py
ORIGIN = {
    "cut": datasets.Value("bool"),
    "fault": datasets.Value("string"),
    "dataset": datasets.Value("int32"),
    "row": datasets.Value("int64"),
}


# ---------------------------------------------------------------------- stage sft


def infer_seqlen(source: int, target: int, budget: int) -> tuple[int, int]:
    """How many tokens of a prompt and of its answer are kept so that both fit into `budget`.

    The longer is cut if the other takes less than half; else both, in proportion.

    >>> infer_seqlen(30, 5, 20), infer_seqlen(5, 30, 20), infer_seqlen(30, 30, 20)
    ((15, 5), (5, 15), (10, 10))
    """
    if 2 * target < budget:
        most = budget
    elif 2 * source < budget:
        most = budget - source
    else:
        most = int(budget * (target / (source + target)))  # as a float product: the rounding is part of the rule
    target = min(most, target)
    return min(max(budget - target, 0), source), target


def label_turns(
    turns: Sequence[tuple[list[int], list[int]]],
    *,
    cutoff_len: int,
    eos_id: int,
    efficient_eos: bool = False,
    mask_history: bool = False,
    train_on_prompt: bool = False,
    wanted: Sequence[bool] | None = None,
) -> tuple[list[int], list[int], bool]:
    """Join the turns of a conversation, at most `cutoff_len` tokens, and mark what is learned.

    Turns that do not fit are left out: the last ones, or with `mask_history` the first.

    Args:
      wanted: of each message, question, answer, question ...: whether it may be learned; None: all may.

    Returns:
      ids, labels (-100 where nothing is learned), and whether anything was cut.
    """
    parts: list[tuple[list[int], list[int]]] = []
    used = 1 if efficient_eos else 0
    cut = False
    may = np.reshape([True] * 2 * len(turns) if wanted is None else list(wanted), (-1, 2)).tolist()
    ends_wanted = True  # whether the last answer is
    for k in range(len(turns)):
        turn = len(turns) - 1 - k if mask_history else k
        source, target = turns[turn]
        if used >= cutoff_len:
            cut = True
            break
        kept_source, kept_target = infer_seqlen(len(source), len(target), cutoff_len - used)
        cut |= kept_source < len(source) or kept_target < len(target)
        source, target = source[:kept_source], target[:kept_target]
        used += kept_source + kept_target
        asked, answered = may[turn]
        learned = target if answered and (not mask_history or k == 0) else [IGNORED] * len(target)
        given = source if train_on_prompt and asked else [IGNORED] * len(source)
        if efficient_eos and k > 0 and not train_on_prompt and not mask_history and source and ends_wanted:
            given = [eos_id, *given[1:]]  # what ends the answer before is learned where this turn begins
        ends_wanted = answered if k == 0 or not mask_history else ends_wanted
        parts.append((source + target, given + learned))
    if mask_history:
        parts.reverse()
    ids = list(chain.from_iterable(ids for ids, _ in parts))
    labels = list(chain.from_iterable(labels for _, labels in parts))
    if not efficient_eos:
        return ids, labels, cut
    return [*ids, eos_id], [*labels, eos_id if ends_wanted else IGNORED], cut


@dataclass(frozen=True)
class Rules:
    """How rows become ids.

    Attributes:
      overlong: what becomes of a row of more than `cutoff_len` tokens. "truncate": it is cut, as in LLaMA-Factory;
        "drop": it is left out; "split": a conversation becomes several, each beginning with a question.
    """

    cutoff_len: int
    mask_history: bool = False
    train_on_prompt: bool = False
    overlong: str = "truncate"


Aligned = Mapping[str, Sequence[Any]]  # a batch of aligned rows


def filled_columns(column: pa.ChunkedArray) -> pa.Array:
    """Messages without the keys that none of them has: each key costs time, and most rows have two."""
    array = column.combine_chunks()
    if not pa.types.is_list(array.type):
        return array
    values = array.flatten()
    names = [field.name for k, field in enumerate(array.type.value_type) if values.field(k).null_count < len(values)]
    messages = pa.StructArray.from_arrays([values.field(name) for name in names], names) if names else values
    offsets = pc.call_function("subtract", [array.offsets, array.offsets[0]])
    return pa.ListArray.from_arrays(offsets, messages)


def render_row(batch: Aligned, template: Template, answers: Sequence[Any] | None = None, **how: bool) -> list[Any]:
    """What each row is rendered to, or why it cannot be: a list of turns, or the text of a fault.

    Args:
      answers: messages in the place of the rows' last ones.
    """
    rendered: list[Any] = []
    for i, fault in enumerate(batch["fault"]):
        messages = batch["messages"][i]
        if not fault:
            try:
                chat = messages if answers is None else [*messages[:-1], answers[i]]
                rendered.append(template.render(chat, batch["system"][i], batch["tools"][i], **how))
                continue
            except FaultyRow as error:
                fault = str(error)
        rendered.append(fault)
    return rendered


def sequences(rendered: Sequence[Any]) -> list[Pieces]:
    return [pieces for turns in rendered if not isinstance(turns, str) for turn in turns for pieces in turn]


def tokenised(rendered: Sequence[Any], template: Template) -> list[Any]:
    """The ids of `_render`'s turns, `[(prompt, answer), ...]`, in one call; faults stay as they are."""
    ids = iter(template.tokenise(sequences(rendered)).lists())
    return [turns if isinstance(turns, str) else [(next(ids), next(ids)) for _ in turns] for turns in rendered]


def arrow_table(names: Iterable[str]) -> dict[str, list[Any]]:
    return {name: [] for name in names if name not in NOTED}


def put_row(out: dict[str, list[Any]], batch: Aligned, i: int, fault: str, cut: bool, **values: Any) -> None:
    """Add a row. Ids and labels that are not given are empty."""
    for name in out:
        if name in ("dataset", "row"):
            out[name].append(batch[name][i])
        elif name == "kto_tags":
            out[name].append(bool(batch["desirable"][i]))
        elif name not in ORIGIN:
            out[name].append(values.get(name, ()))
    out["fault"].append(fault)
    out["cut"].append(cut)


def arrow_list(rows: Mapping[str, Any], features: datasets.Features) -> pa.Table:
    """Rows as a table, but for what is noted. Lists of ids are joined: Arrow takes one array sooner than many lists."""
    columns = []
    features = datasets.Features({name: feature for name, feature in features.items() if name not in NOTED})
    for name, feature in features.items():
        if feature != IDS:
            columns.append(pa.array(rows[name], feature.pa_type))
            continue
        ids = rows[name] if isinstance(rows[name], Ids) else Ids.join(rows[name])
        offsets = np.concatenate([[0], np.cumsum(ids.sizes)]).astype(np.int32)
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids.values)))
    return pa.Table.from_arrays(columns, schema=features.arrow_schema)


def is_trained_on(labels: Sequence[int] | np.ndarray) -> bool:
    """Whether a token other than the first has a label: nothing comes before the first one that could predict it."""
    return bool((np.asarray(labels)[1:] != IGNORED).any())


def too_long(cutoff_len: int) -> str:
    return f"longer than cutoff_len {cutoff_len}"
