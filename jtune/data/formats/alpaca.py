"""Alpaca's form: an instruction, an input and an output, in columns of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jtune.config.stages import StageRules
from jtune.data.formats.chat import SYNONYMS
from jtune.data.formats.fields import ALIGNED, MISSING, parsed_json, text_message, text_of
from jtune.data.formats.media import media_columns
from jtune.data.formats.messages import FaultyRow, Message
from jtune.data.sources.columns import ANSWERS, QUESTIONS
from jtune.data.sources.registry import Columns, Entry
from jtune.data.sources.rows import NESTED

# What an earlier question and its answer are called where each turn of the history is an object.
ASKED_ANSWERED = ((*QUESTIONS, "user", "human", "input"), (*ANSWERS, "assistant", "gpt", "bot", "model"))


def alpaca_messages(row: Mapping[Any, Any], entry: Entry, stage: StageRules) -> tuple[list[Message], str]:
    """The messages of a row; the second value, the system message in them, is always empty.

    Raises:
      FaultyRow: with the reason.
    """
    columns: Columns = entry.columns
    messages = []
    history = row.get(columns.history) if columns.history else None
    if isinstance(history, str) and history.lstrip().startswith("["):  # CSV has no lists
        history = parsed_json(history)
    for question, answer in _pairs(history, columns.history) if history not in (None, "") else ():
        messages += [
            text_message("user", question, columns.history),
            text_message("assistant", answer, columns.history),
        ]
    asked = [column for column in (columns.prompt, columns.query) if column]
    if all(row.get(column) is None for column in asked):
        raise FaultyRow(f"{MISSING}{asked[0]}")
    parts = [text_of(row.get(column), column) for column in asked]
    messages.append({"role": "user", "content": "\n".join(filter(None, parts))})
    if stage.rows == "text" or entry.ranking:
        return messages, ""
    answer = row.get(columns.response) if columns.response else None
    if answer is None and stage.rows == "prompt":
        answer = ""  # nothing is learned from it, and it may be what is asked for
    if answer is None:
        raise FaultyRow(f"{MISSING}{columns.response}")
    return [*messages, text_message("assistant", answer, columns.response)], ""


def _pairs(history: Any, what: str | None) -> list[Any]:
    """The earlier questions and answers: pairs, objects with the two under their usual names, or messages.

    >>> _pairs([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "history")
    [('q', 'a')]

    Raises:
      FaultyRow: it holds something else.
    """
    turns: list[Any] = history if isinstance(history, list) else [None]
    messages = [turn for turn in turns if isinstance(turn, Mapping)]
    if len(messages) == len(turns):
        cells = [{str(name).lower(): cell for name, cell in message.items()} for message in messages]
        said = [(str(cell.get("role", cell.get("from"))), cell.get("content", cell.get("value"))) for cell in cells]
        roles = [SYNONYMS.get(role.lower()) for role, _ in said]
        if roles == ["user", "assistant"] * (len(roles) // 2):
            return [(said[i][1], said[i + 1][1]) for i in range(0, len(said), 2)]
        pairs = [[next((c[name] for name in names if name in c), None) for names in ASKED_ANSWERED] for c in cells]
        turns = [None if None in pair else pair for pair in pairs]
    is_pair = lambda turn: isinstance(turn, Sequence) and not isinstance(turn, str) and len(turn) == 2
    if not all(map(is_pair, turns)):
        raise FaultyRow(f"{what} is not a list of [question, answer]")
    return turns


def alpaca_table(table: pa.Table, entry: Entry, stage: StageRules) -> dict[str, Any] | None:
    """`align_row` of all rows of the usual form, texts without history, at once; None: they are not of this form.

    20,000 rows take 0.11 s, one by one 0.30 s: an eighth of all that reading and encoding take with gigatoken.
    """
    columns = entry.columns
    if entry.formatting != "alpaca" or entry.ranking or columns.kto_tag:
        return None
    if columns.history in table.column_names and table[columns.history].null_count < len(table):
        return None
    if any(table[name].null_count < len(table) for name in media_columns(table.column_names, entry)):
        return None
    names = [columns.prompt, columns.query, columns.response, columns.system, columns.tools]
    texts = [text_column(table, name) for name in names]
    if any(text is None for text in texts):
        return None
    call = pc.call_function
    prompt, query, answer, system, tools = texts
    asked = [x for x, name in ((prompt, columns.prompt), (query, columns.query)) if name]
    lacking = [np.logical_and.reduce([is_null(x) for x in asked])]
    reasons = [f"{MISSING}{columns.prompt or columns.query}"]
    if stage.rows == "prompt":
        answer = call("coalesce", [answer, ""])
    if stage.rows not in ("text", "prompt"):
        lacking, reasons = [*lacking, is_null(answer)], [*reasons, f"{MISSING}{columns.response}"]
    first, second = (call("coalesce", [x, ""]) for x in (prompt, query))
    both = call("and", [call("not_equal", [first, ""]), call("not_equal", [second, ""])])
    question = call("binary_join_element_wise", [first, call("if_else", [both, "\n", ""]), second, ""])
    fault = np.select(lacking, reasons, "")
    kept = np.flatnonzero(fault == "")
    roles = ("user",) if stage.rows == "text" else ("user", "assistant")
    contents = pa.concat_arrays([question, answer][: len(roles)])
    order = (kept[:, None] + len(table) * np.arange(len(roles))).ravel()
    offsets = np.concatenate([[0], len(roles) * np.cumsum(fault == "")]).astype(np.int32)
    fields = list(ALIGNED.arrow_schema.field("messages").type.value_type)
    parts = [pa.array(roles * len(kept), pa.string()), contents.take(pa.array(order))]
    parts += [pa.nulls(len(order), field.type) for field in fields[2:]]
    message = pa.StructArray.from_arrays(parts, fields=fields)
    empty = lambda x: call("if_else", [pa.array(fault == ""), call("coalesce", [x, ""]), ""])
    return {
        "messages": pa.ListArray.from_arrays(pa.array(offsets), message),
        "system": empty(system),
        "tools": empty(tools),
        "rejected": pa.nulls(len(table), ALIGNED.arrow_schema.field("rejected").type),
        "margin": pa.nulls(len(table), pa.float32()),
        "desirable": pa.nulls(len(table), pa.bool_()),
        "fault": fault.astype(object),
    }


def text_column(table: pa.Table, name: str | None) -> pa.Array | None:
    """A column of texts, nulls where there is none; None: it holds something else."""
    if name is None or name not in table.column_names:
        return pa.nulls(len(table), pa.string())
    column = table[name].combine_chunks()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_null(column.type)):
        return None
    try:
        column.validate(full=True)  # that it is UTF-8
    except pa.ArrowInvalid:
        return None
    texts = column.cast(pa.string())
    begins = pc.call_function("starts_with", [texts], pc.MatchSubstringOptions(NESTED))
    return None if pc.call_function("any", [begins]).as_py() else texts


def is_null(texts: pa.Array) -> np.ndarray:
    return texts.is_null().to_numpy(zero_copy_only=False)
