"""Rows of any format as conversations of one form.

    alpaca, sharegpt, openai ── align ── {messages, system, tools, rejected, desirable, fault, row}

`messages` alternates question (user or observation) and answer (assistant or function) and ends with an answer; in
stage pt the first one is the text. What role and content do not say is kept beside them (see messages.py). A row that
cannot be learned from keeps its place, with the reason in `fault`: it is counted and left out later, when the sets are
mixed and split, as LLaMA-Factory does. Only a row that lacks a column is an error at once: more often than not the
whole file is meant otherwise.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jtune.config.stages import RULES, StageRules
from jtune.data.cache.fingerprint import fingerprint
from jtune.data.cache.shards import ALONE, Team, arrow_column, in_parts
from jtune.data.formats.messages import (
    FaultyRow,
    Message,
    is_learned,
    message_of,
    observation_of,
    padded_columns,
    split_parts,
)
from jtune.data.sources.load import places
from jtune.data.sources.registry import OPENAI_TAGS, Columns, Entry
from jtune.data.sources.rows import NESTED, value_of
from jtune.errors import DataError

QUESTION_ROLES = ("user", "observation")
ANSWER_ROLES = ("assistant", "function")
SYNONYMS = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "developer": "system"}
TEXT = datasets.Value("string")
MESSAGE = {"role": TEXT, "content": TEXT, "original": TEXT, "learned": datasets.Value("bool"), "unused": TEXT}
ALIGNED = datasets.Features(
    {
        "messages": datasets.List(MESSAGE),
        "system": TEXT,
        "tools": TEXT,  # JSON: a list of functions
        "rejected": MESSAGE,  # in sets of pairs, the answer that is worse than the last one
        "desirable": datasets.Value("bool"),  # in sets of feedback, whether the last answer is
        "fault": TEXT,  # why the row is left out; "" if it is not
        "dataset": datasets.Value("int32"),  # index of the entry
        "row": datasets.Value("int64"),  # in the file, from 0
    }
)

TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
BATCH = 1000  # rows that are aligned together
NOT_LEARNED = "the answer that is preferred, or not, is one that is not to be learned (weight, train, loss)"
MISSING = "no "  # begins the fault of a row that lacks a column, or has null in it; the column's name follows


class Conversation(NamedTuple):
    messages: list[Message]
    system: str = ""
    tools: str = ""
    rejected: Message | None = None
    desirable: bool | None = None


def align(
    table: datasets.Dataset,
    entry: Entry,
    *,
    stage: StageRules,
    rows: np.ndarray | None = None,
    index: int = 0,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
    team: Team = ALONE,
) -> datasets.Dataset:
    """Bring `table` into the form `ALIGNED`, row by row.

    Args:
      stage: of the run; with rows "prompt", a row needs no answer.
      rows: the place in the file of each row of `table`, where some were picked.
      index: what to write into the column `dataset`.
      team: the processes that share the folder where `table` is.

    Raises:
      DataError: a row has nothing in a column that it must have.
    """
    args = {"entry": entry, "stage": stage, "index": index}
    aligned = in_parts(
        partial(_align_rows, table, table.with_format("arrow"), rows=rows, **args),
        table,
        ALIGNED,
        name=fingerprint(table, "align", args, rows),
        what=f"Aligning {entry.name}",
        batch_size=BATCH,
        num_proc=num_proc,
        overwrite=overwrite_cache,
        team=team,
    )
    refuse_missing(aligned, {index: entry})
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


def refuse_missing(aligned: datasets.Dataset, entries: Sequence[Entry] | Mapping[int, Entry]) -> None:
    """Raise a DataError if a row has nothing in a column that it must have."""
    faulty = np.flatnonzero(is_faulty(aligned))
    faults = aligned.select(faulty)["fault"][:]
    lacking = faulty[np.array([fault.startswith(MISSING) for fault in faults], bool)]
    if len(lacking):
        name = aligned[int(lacking[0])]["fault"].removeprefix(MISSING)
        others = f" ({len(lacking)} rows have none)" if len(lacking) > 1 else ""
        [where] = places(entries, aligned.select(lacking[:1]))
        raise DataError(
            f"{where}: nothing in column {name!r}{others}. Fill it in, "
            "take the row out, or name the right column in dataset_info.json"
        )


def align_row(row: Mapping[Any, Any], entry: Entry, stage: StageRules = RULES["sft"]) -> Conversation:
    """One row as a conversation.

    >>> align_row({"instruction": "Add.", "input": "1 1", "output": "2"}, Entry("a", "file", "a.json")).messages
    [{'role': 'user', 'content': 'Add.\\n1 1'}, {'role': 'assistant', 'content': '2'}]

    Raises:
      FaultyRow: with the reason.
    """
    form = _alpaca if entry.formatting == "alpaca" else _conversation
    messages, system = form(row, entry, stage)
    columns = entry.columns
    if columns.system:
        whole = _text(row.get(columns.system), columns.system)
        if messages and system and whole not in ("", system):
            _add_unused(messages[0], f"{columns.system} (the column: the messages have a system message)")
        system = system or whole
    tools = _tools(row.get(columns.tools) if columns.tools else None) or _tools(_told_tools(row, entry))
    if entry.ranking:
        chosen, rejected = _answers(row, entry)
        return Conversation([*messages, chosen], system, tools, rejected)
    desirable = TRUTH.get(str(row.get(columns.kto_tag)).strip().lower()) if columns.kto_tag else None
    if columns.kto_tag and desirable is None:
        raise FaultyRow(f"{columns.kto_tag} is neither true nor false")
    if columns.kto_tag and messages[-1].get("learned") is False:
        raise FaultyRow(NOT_LEARNED)
    return Conversation(messages, system, tools, desirable=desirable)


def _align_rows(
    table: datasets.Dataset, arrow: datasets.Dataset, start: int, stop: int, *, rows: np.ndarray | None, **how: Any
) -> pa.Table:
    """The rows of `table` from one number up to another, as `_align_batch`, in Arrow; `arrow` is `table` as such."""
    found = _alpaca_table(arrow[start:stop], how["entry"], how["stage"])
    if found is None:
        padded = padded_columns(table.features, how["entry"].columns.tools)
        made = _align_batch(table[start:stop], range(start, stop), rows=rows, padded=padded, **how)
    else:
        place = np.arange(start, stop) if rows is None else rows[start:stop]
        made = found | {"dataset": [how["index"]] * (stop - start), "row": place}
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
    columns = (map(_present, batch[name]) if padded is None or name in padded else batch[name] for name in names)
    for values in zip(*columns):
        try:
            made.append((*align_row(dict(zip(names, map(value_of, values))), entry, stage), ""))
        except FaultyRow as error:
            made.append((*Conversation([]), str(error)))
    out: dict[str, list[Any]] = dict(zip((*Conversation._fields, "fault"), map(list, zip(*made))))
    out["dataset"] = [index] * len(indices)
    out["row"] = list(indices) if rows is None else rows[indices].tolist()
    return out


# ---------------------------------------------------------------------- alpaca


def _alpaca(row: Mapping[Any, Any], entry: Entry, stage: StageRules) -> tuple[list[Message], str]:
    columns: Columns = entry.columns
    messages = []
    history = row.get(columns.history) if columns.history else None
    is_turn = lambda turn: isinstance(turn, Sequence) and not isinstance(turn, str) and len(turn) == 2
    if isinstance(history, str) and history.lstrip().startswith("["):  # CSV has no lists
        history = _parsed(history)
    if history == "":
        history = None
    if history is not None and not (isinstance(history, list) and all(map(is_turn, history))):
        raise FaultyRow(f"{columns.history} is not a list of [question, answer]")
    for turn in history or []:
        messages += [_message("user", turn[0], columns.history), _message("assistant", turn[1], columns.history)]
    asked = [column for column in (columns.prompt, columns.query) if column]
    if all(row.get(column) is None for column in asked):
        raise FaultyRow(f"{MISSING}{asked[0]}")
    parts = [_text(row.get(column), column) for column in asked]
    messages.append({"role": "user", "content": "\n".join(filter(None, parts))})
    if stage.rows == "text" or entry.ranking:
        return messages, ""
    answer = row.get(columns.response) if columns.response else None
    if answer is None and stage.rows == "prompt":
        answer = ""  # nothing is learned from it, and it may be what is asked for
    if answer is None:
        raise FaultyRow(f"{MISSING}{columns.response}")
    return [*messages, _message("assistant", answer, columns.response)], ""


def _alpaca_table(table: pa.Table, entry: Entry, stage: StageRules) -> dict[str, Any] | None:
    """`align_row` of all rows of the usual form, texts without history, at once; None: they are not of this form."""
    columns = entry.columns
    if entry.formatting != "alpaca" or entry.ranking or columns.kto_tag:
        return None
    if columns.history in table.column_names and table[columns.history].null_count < len(table):
        return None
    names = [columns.prompt, columns.query, columns.response, columns.system, columns.tools]
    texts = [_texts(table, name) for name in names]
    if any(text is None for text in texts):
        return None
    call = pc.call_function
    prompt, query, answer, system, tools = texts
    asked = [x for x, name in ((prompt, columns.prompt), (query, columns.query)) if name]
    lacking = [np.logical_and.reduce([_is_null(x) for x in asked])]
    reasons = [f"{MISSING}{columns.prompt or columns.query}"]
    if stage.rows == "prompt":
        answer = call("coalesce", [answer, ""])
    if stage.rows not in ("text", "prompt"):
        lacking, reasons = [*lacking, _is_null(answer)], [*reasons, f"{MISSING}{columns.response}"]
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
        "desirable": pa.nulls(len(table), pa.bool_()),
        "fault": fault.astype(object),
    }


def _texts(table: pa.Table, name: str | None) -> pa.Array | None:
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


def _is_null(texts: pa.Array) -> np.ndarray:
    return texts.is_null().to_numpy(zero_copy_only=False)


# ---------------------------------------------------------------------- sharegpt, openai


def _conversation(row: Mapping[Any, Any], entry: Entry, stage: StageRules) -> tuple[list[Message], str]:
    tags, turns = entry.tags, _turns(row, entry)
    column = entry.columns.messages
    if turns is None:
        raise FaultyRow(f"{MISSING}{column}")
    if not turns:
        raise FaultyRow("an empty conversation")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise FaultyRow(f"{column} is not a list of messages")
    system = ""
    if _is_system(turns[0], entry):
        content, _ = split_parts(turns[0].get(tags.content_tag), "the system message")
        system, turns = _text(content, "the system message"), turns[1:]
    messages = _openai_messages(turns, entry) if entry.formatting == "openai" else _messages(turns, entry)
    for turn, message in enumerate(messages):
        if message["role"] not in (QUESTION_ROLES, ANSWER_ROLES)[turn % 2]:
            raise FaultyRow(f"role out of turn ({message['role']} as {'an answer' if turn % 2 else 'a question'})")
    if entry.ranking and len(messages) % 2 == 0:
        raise FaultyRow("the conversation does not end with a question, which chosen and rejected answer")
    if stage.rows == "prompt" and len(messages) % 2:
        messages.append({"role": "assistant", "content": ""})
    if not entry.ranking and (len(messages) % 2 or not messages):
        raise FaultyRow("the conversation does not end with an answer")
    return messages, system


def _turns(row: Mapping[Any, Any], entry: Entry) -> Any:
    turns = row.get(entry.columns.messages)
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # CSV has no lists
        turns = _parsed(turns)
    if isinstance(turns, Mapping):  # a struct of lists, as older versions of `datasets` kept lists of structs
        return [dict(zip(turns, values)) for values in zip(*turns.values())]
    return turns


def _told_tools(row: Mapping[Any, Any], entry: Entry) -> Any:
    """The tools that stand in the first message, where it is one of the system."""
    turns = _turns(row, entry) if entry.formatting != "alpaca" else None
    return turns[0].get("tools") if turns and _is_system(turns[0], entry) else None


def _messages(turns: Sequence[Mapping[Any, Any]], entry: Entry) -> list[Message]:
    messages = []
    for turn in turns:
        role, content = _role(turn, entry), turn.get(entry.tags.content_tag)
        if role == "observation" and isinstance(content, list | Mapping):
            messages.append(observation_of([turn], entry.tags))
        else:
            messages.append(message_of(turn, role, entry.tags, _text))
    return messages


def _openai_messages(turns: Sequence[Mapping[Any, Any]], entry: Entry) -> list[Message]:
    """As `_messages`; `tool_calls` become a function message, and results of parallel calls one observation.

    Results after the last answer are left out: nobody answers them, unless the row is of preferences.
    """
    tags = entry.tags
    messages: list[Message] = []
    results: list[Mapping[Any, Any]] = []
    for turn in turns:
        role = _role(turn, entry)
        if role == "observation" or (role == "function" and isinstance(turn.get("name"), str)):
            results.append(turn)  # OpenAI's older form names a result's role after the function
            continue
        if results:
            messages, results = [*messages, observation_of(results, tags)], []
        messages.append(message_of(turn, role, tags, _text))
    if results and entry.ranking:
        messages.append(observation_of(results, tags))
    elif results and messages:
        _add_unused(messages[-1], "tool results after the last answer")
    return messages


def as_messages(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Messages in OpenAI's form (tool_calls, reasoning_content, role tool ...) in the form that templates render.

    Raises:
      FaultyRow: a message is none.
    """
    known, roles = MESSAGE.keys(), (*QUESTION_ROLES, *ANSWER_ROLES)
    if all(message.keys() <= known and message.get("role") in roles for message in messages):
        return messages
    return _openai_messages(messages, Entry("messages", "", "", "openai", tags=OPENAI_TAGS))


def _add_unused(message: Message, what: str) -> None:
    message["unused"] = ", ".join(filter(None, [message.get("unused"), what]))


def _role(turn: Mapping[Any, Any], entry: Entry) -> str:
    tags, tag = entry.tags, turn.get(entry.tags.role_tag)
    roles = {
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
        tags.observation_tag: "observation",
        tags.function_tag: "function",
        tags.system_tag: "system",
    }
    synonyms = SYNONYMS if entry.formatting == "openai" else {}
    if not isinstance(tag, str) or tag not in roles | synonyms:
        raise FaultyRow(f"unknown role {tag!r} (known are {', '.join(filter(None, roles))})")
    return roles.get(tag) or synonyms[tag]


def _is_system(turn: Mapping[Any, Any], entry: Entry) -> bool:
    tag = turn.get(entry.tags.role_tag)
    return tag is not None and (tag == entry.tags.system_tag or (tag == "developer" and entry.formatting == "openai"))


# ---------------------------------------------------------------------- pairs


def _answers(row: Mapping[Any, Any], entry: Entry) -> list[Message]:
    """The chosen answer and the rejected one: texts in alpaca's form, messages in the others."""
    answers = []
    for column in (entry.columns.chosen, entry.columns.rejected):
        value = row.get(column)
        if value is None:
            raise FaultyRow(f"{MISSING}{column}")
        if entry.formatting == "alpaca":
            answers.append(_message("assistant", value, column))
            continue
        if not isinstance(value, Mapping):
            raise FaultyRow(f"{column} is not a message, with {entry.tags.role_tag} and {entry.tags.content_tag}")
        role = _role(value, entry)
        if role not in ANSWER_ROLES:
            raise FaultyRow(f"role out of turn ({role} as {column})")
        if not is_learned(value):
            raise FaultyRow(NOT_LEARNED)
        answers.append(message_of(value, role, entry.tags, _text, column))
    return answers


# ---------------------------------------------------------------------- values


def _message(role: str, content: Any, what: str | None) -> Message:
    if content is None:
        raise FaultyRow(f"{what} without content")
    return {"role": role, "content": _text(content, what)}


def _text(value: Any, what: str | None) -> str:
    """A text as it is, a number, a date or a truth value as it is written.

    >>> _text(2, "x"), _text(True, "x"), _text(datetime.date(2031, 5, 9), "x")
    ('2', 'true', '2031-05-09')
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | Decimal | datetime.date | datetime.time):
        return str(value)
    raise FaultyRow(f"{what} is not text but {type(value).__name__}")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _tools(value: Any) -> str:
    if isinstance(value, list | Mapping):
        return json.dumps(value, ensure_ascii=False) if value else ""
    return _text(value, "tools")


def _present(value: Any) -> Any:
    """Without the nulls that Arrow adds so that all rows have the same keys."""
    if isinstance(value, Mapping):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value
