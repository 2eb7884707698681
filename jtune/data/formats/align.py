"""Rows of any format as conversations of one form.

    alpaca, sharegpt, openai ── align ── {messages, system, tools, rejected, margin, desirable, fault, row}

`messages` alternates question (user or observation) and answer (assistant or function) and ends with an answer; in
stage pt the first one is the text. What role and content do not say is kept beside them (see messages.py). A row that
cannot be learned from keeps its place, with the reason in `fault`: it is counted and left out later, when the sets are
mixed and split, as LLaMA-Factory does. An error at once are a row that holds an image or the like, and a column that
most rows lack: the whole file is meant otherwise.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jtune.config.stages import RULES, StageRules
from jtune.data.cache.fingerprint import fingerprint
from jtune.data.cache.shards import UNSHARED, Sharing, arrow_column, make_in_shards
from jtune.data.formats.alpaca import alpaca_messages, alpaca_table
from jtune.data.formats.chat import (
    ANSWER_ROLES,
    QUESTION_ROLES,
    chat_messages,
    openai_messages,
    ranked_answers,
    tools_in_messages,
)
from jtune.data.formats.fields import (
    ALIGNED,
    MESSAGE,
    MISSING,
    NOT_LEARNED,
    TRUTH,
    add_unused,
    number_of,
    text_of,
    tools_of,
    without_padding,
)
from jtune.data.formats.media import refuse_media
from jtune.data.formats.messages import TEXT_ONLY, FaultyRow, Message, padded_columns
from jtune.data.sources.load import places
from jtune.data.sources.registry import OPENAI_TAGS, Entry
from jtune.data.sources.rows import value_of
from jtune.errors import DataError

BATCH = 1000  # rows that are aligned together


class Conversation(NamedTuple):
    messages: list[Message]
    system: str = ""
    tools: str = ""
    rejected: Message | None = None
    margin: float | None = None
    desirable: bool | None = None


def align(
    table: datasets.Dataset,
    entry: Entry,
    *,
    stage: StageRules,
    rows: np.ndarray | None = None,
    index: int = 0,
    sharing: Sharing = UNSHARED,
) -> datasets.Dataset:
    """Bring `table` into the form `ALIGNED`, row by row.

    Args:
      stage: of the run; with rows "prompt", a row needs no answer.
      rows: the place in the file of each row of `table`, where some were picked.
      index: what to write into the column `dataset`.

    Raises:
      DataError: most rows have nothing in a column that they must have, or a row holds an image or the like.
    """
    aligned = make_in_shards(
        partial(_align_rows, table, table.with_format("arrow"), entry=entry, stage=stage, index=index, rows=rows),
        table,
        ALIGNED,
        sharing._replace(batch_size=BATCH),
        name=fingerprint(table, "align", (entry, stage.rows, index), rows),
        what=f"Aligning {entry.name}",
    )
    refuse_rows(aligned, {index: entry})
    return aligned


def align_stream(
    table: datasets.IterableDataset, names: Sequence[str], entry: Entry, *, stage: StageRules, index: int = 0
) -> datasets.IterableDataset:
    """`align` of rows that are read as they are iterated over; `names` are their columns. None is refused."""
    padded = padded_columns(table.features, entry.columns.tools)
    return table.map(
        partial(_align_batch, rows=None, entry=entry, stage=stage, index=index, padded=padded),
        with_indices=True,
        batched=True,
        remove_columns=list(names),
        features=ALIGNED,
    )


def is_faulty(table: datasets.Dataset) -> np.ndarray:
    """Which rows are left out, bool `[rows]`."""
    return pc.call_function("not_equal", [arrow_column(table, "fault"), pa.scalar("")]).to_numpy()


def refuse_rows(aligned: datasets.Dataset, entries: Sequence[Entry] | Mapping[int, Entry]) -> None:
    """Raise a DataError if most rows have nothing in a column that they need, or one holds an image or the like."""
    faulty = np.flatnonzero(is_faulty(aligned))
    faults = aligned.select(faulty)["fault"][:]
    place = lambda row: places(entries, aligned.select([row]))[0]
    lacking = [row for row, fault in zip(faulty, faults) if fault.startswith(MISSING)]
    if 2 * len(lacking) > len(aligned):
        name = aligned[int(lacking[0])]["fault"].removeprefix(MISSING)
        others = f" ({len(lacking)} of {len(aligned)} rows have none)" if len(lacking) > 1 else ""
        raise DataError(
            f"{place(lacking[0])}: nothing in column {name!r}{others}. Fill it in, or name the right column in "
            "dataset_info.json"
        )
    media = [(row, fault) for row, fault in zip(faulty, faults) if fault.endswith(TEXT_ONLY)]
    if media:
        row, fault = media[0]
        others = f" ({len(media)} rows have such)" if len(media) > 1 else ""
        raise DataError(f"{place(row)}: {fault}{others}. Take the row, or what is not text in it, out of the data")


def align_row(row: Mapping[Any, Any], entry: Entry, stage: StageRules = RULES["sft"]) -> Conversation:
    """One row as a conversation.

    >>> align_row({"instruction": "Add.", "input": "1 1", "output": "2"}, Entry("a", "file", "a.json")).messages
    [{'role': 'user', 'content': 'Add.\\n1 1'}, {'role': 'assistant', 'content': '2'}]

    Raises:
      FaultyRow: with the reason.
    """
    form = alpaca_messages if entry.formatting == "alpaca" else chat_messages
    messages, system = form(row, entry, stage)
    refuse_media(row, messages, entry)
    columns = entry.columns
    if columns.system:
        whole = text_of(row.get(columns.system), columns.system)
        if messages and system and whole not in ("", system):
            add_unused(messages[0], f"{columns.system} (the column: the messages have a system message)")
        system = system or whole
    tools = tools_of(row.get(columns.tools) if columns.tools else None) or tools_of(tools_in_messages(row, entry))
    if entry.ranking:
        chosen, rejected = ranked_answers(row, entry)
        margin = number_of(row.get(columns.margin), columns.margin) if columns.margin else None
        return Conversation([*messages, chosen], system, tools, rejected, margin)
    desirable = TRUTH.get(str(row.get(columns.kto_tag)).strip().lower()) if columns.kto_tag else None
    if columns.kto_tag and desirable is None:
        raise FaultyRow(f"{columns.kto_tag} is neither true nor false")
    if columns.kto_tag and messages[-1].get("learned") is False:
        raise FaultyRow(NOT_LEARNED)
    return Conversation(messages, system, tools, desirable=desirable)


def _align_rows(
    table: datasets.Dataset,
    arrow: datasets.Dataset,
    start: int,
    stop: int,
    *,
    entry: Entry,
    stage: StageRules,
    index: int,
    rows: np.ndarray | None,
) -> pa.Table:
    """The rows of `table` from one number up to another, as `_align_batch`, in Arrow; `arrow` is `table` as such."""
    made = alpaca_table(arrow[start:stop], entry, stage)
    if made is None:
        padded = padded_columns(table.features, entry.columns.tools)
        numbers = range(start, stop)
        made = _align_batch(table[start:stop], numbers, entry=entry, stage=stage, index=index, rows=rows, padded=padded)
    else:
        place = np.arange(start, stop) if rows is None else rows[start:stop]
        made |= {"dataset": [index] * (stop - start), "row": place}
    return pa.Table.from_pydict(made, schema=ALIGNED.arrow_schema)


def _align_batch(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    *,
    entry: Entry,
    stage: StageRules,
    index: int,
    rows: np.ndarray | None,
    padded: Sequence[str] | None = (),
) -> dict[str, list[Any]]:
    """The rows of a batch, aligned. `padded` columns may hold nulls that Arrow added; None: all may."""
    names, made = list(batch), []
    columns = (map(without_padding, batch[name]) if padded is None or name in padded else batch[name] for name in names)
    for values in zip(*columns):
        try:
            made.append((*align_row(dict(zip(names, map(value_of, values))), entry, stage), ""))
        except FaultyRow as error:
            made.append((*Conversation([]), str(error)))
    out: dict[str, list[Any]] = dict(zip((*Conversation._fields, "fault"), map(list, zip(*made))))
    out["dataset"] = [index] * len(indices)
    out["row"] = list(indices) if rows is None else rows[indices].tolist()
    return out


def as_messages(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Messages in OpenAI's form (tool_calls, reasoning_content, role tool ...) in the form that templates render.

    Raises:
      FaultyRow: a message is none.
    """
    known, roles = MESSAGE.keys(), (*QUESTION_ROLES, *ANSWER_ROLES)
    if all(message.keys() <= known and message.get("role") in roles for message in messages):
        return messages
    return openai_messages(messages, Entry("messages", "", "", "openai", tags=OPENAI_TAGS))
