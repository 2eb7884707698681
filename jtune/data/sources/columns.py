"""The columns of a set: which one means what where no entry says it, and whether they are what a stage needs."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

from jtune.config.stages import RULES, StageRules
from jtune.data.sources.registry import OPENAI_TAGS, Columns, Entry, Tags
from jtune.data.sources.rows import value_of
from jtune.errors import DataError

log = logging.getLogger("jtune")

# The usual names, in any case; of several columns with such names the first here is taken.
QUESTIONS = ("instruction", "prompt", "question", "query")
MORE = ("input", "context")  # what is asked about
ANSWERS = ("output", "response", "completion", "answer")
DOCUMENTS = ("text", "content")
SYSTEMS = ("system", "system_prompt")
CHATS = ("messages", "conversations")
DIALOGUES = ("conversation", "dialogue", "dialog", "chat")  # chats, too, where they hold messages
FEEDBACK = ("kto_tag", "label")
PREFERENCES = ("chosen", "rejected", *FEEDBACK)
USUAL = (*QUESTIONS, *MORE, *ANSWERS, *DOCUMENTS, *SYSTEMS, "history", "tools", *CHATS, *PREFERENCES)
MEDIA_COLUMNS = ("images", "videos", "audios")
# The key of `columns` in dataset_info.json for each.
KEYS = {name: name for name in USUAL} | {"question": "prompt", "instruction": "prompt", "system_prompt": "system"}
KEYS |= dict.fromkeys(MORE, "query")
KEYS |= dict.fromkeys(ANSWERS, "response") | dict.fromkeys(DOCUMENTS, "prompt") | dict.fromkeys(CHATS, "messages")


@cache
def note_once(text: str, level: int = logging.INFO) -> None:
    """Log `text` once, though a run looks at its sets several times."""
    log.log(level, "%s", text)


def resolve_entry(entry: Entry, found: list[str], stage: StageRules, first: Mapping[str, Any]) -> Entry:
    """The entry with its format resolved, and found to be one that `stage` can read; unused columns are named.

    Args:
      found: the names of the columns.
      first: the first row.

    Raises:
      DataError: the set is not for this stage, or a column is missing.
    """
    entry = resolve_format(entry, found, stage, first)
    check_stage(entry, stage)
    check_columns(entry, found, stage)
    say_unused(entry, found, stage)
    return entry


def resolve_format(
    entry: Entry, found: Sequence[str], stage: StageRules = RULES["sft"], first: Mapping[str, Any] | None = None
) -> Entry:
    """For a dataset without an entry: tell its format from its columns, and from the names in its first row.

    `messages` is OpenAI's form, `conversations` ShareGPT's, or the one whose names the messages have; a table of `text`
    (or `content`) alone is for stage pt; else alpaca, with a question and an answer under one of their usual names.
    `system`, `tools`, `history`, `images`, `videos`, `audios`, `chosen`, `rejected` and `kto_tag` are what they are
    called, the last three in the stages that learn from them.
    """
    if entry.formatting is not None:
        return entry
    actual = {name.lower(): name for name in reversed(found)} | {name: name for name in found}
    pick = lambda names: next((actual[name] for name in names if name in actual), None)
    media = {name: name for name in MEDIA_COLUMNS}
    columns = Columns(system=pick(SYSTEMS) or "system", tools="tools", **media)
    if stage.rows == "pair" and {"chosen", "rejected"} <= actual.keys():
        entry = replace(entry, ranking=True)
        columns = replace(columns, chosen=actual["chosen"], rejected=actual["rejected"])
    if stage.rows == "feedback":
        columns = replace(columns, kto_tag=pick(FEEDBACK))
    chats = [name for name in CHATS if name in actual]
    chats += [name for name in DIALOGUES if name in actual and _messages((first or {}).get(actual[name]))]
    if chats:
        name = actual[chats[0]]
        openai = _has_roles((first or {}).get(name), default=chats[0] == "messages")
        tags, formatting = (OPENAI_TAGS, "openai") if openai else (Tags(), "sharegpt")
        return replace(entry, formatting=formatting, columns=replace(columns, messages=name), tags=tags)
    prompt, response, document, more = map(pick, (QUESTIONS, ANSWERS, DOCUMENTS, MORE))
    asked = pick(QUESTIONS[:1]) if stage.rows == "text" else prompt
    if document and asked is None and not entry.ranking and not (more and response):
        columns = Columns(prompt=document, query=None, response=None, **media)
        return replace(entry, formatting="alpaca", columns=columns)
    if prompt is None and more is not None:
        prompt, more = more, None  # `input` and `output` alone
    elif more is None and "query" in actual and prompt != actual["query"]:
        more = actual["query"]
    history = None if stage.rows == "text" else "history"  # whose first question would be the text
    columns = replace(
        columns, prompt=prompt or QUESTIONS[0], query=more, response=response or ANSWERS[0], history=history
    )
    return replace(entry, formatting="alpaca", columns=columns)


def _messages(turns: Any) -> list[Any]:
    """The cell of a row as messages, [] if it holds none."""
    turns = value_of(turns)
    return turns if isinstance(turns, list) and all(isinstance(turn, Mapping) for turn in turns) else []


def _has_roles(turns: Any, default: bool) -> bool:
    """Whether messages have OpenAI's names, `role` and `content`, rather than ShareGPT's."""
    turn = next(iter(_messages(turns)), {})
    return default if ("role" in turn) == ("from" in turn) else "role" in turn


def say_unused(entry: Entry, found: Sequence[str], stage: StageRules) -> None:
    """Name the columns that are not read, once; those that are usually text for the model with a warning."""
    unread = {"response", "system", "tools"} if stage.rows == "text" else set()
    own = {"prompt", "query", "response", "history"}
    unread |= {"messages"} if entry.formatting == "alpaca" else own
    unread |= {"response"} if entry.ranking else {"chosen", "rejected", "margin"}
    used = {getattr(entry.columns, field.name) for field in fields(Columns) if field.name not in unread}
    if stage.rows == "text" and (entry.formatting != "alpaca" or entry.columns.history in found):
        note_once(f"dataset {entry.name!r}: stage pt learns the first message of a row only", logging.WARNING)
    unused = [name for name in found if name not in used]
    if not unused:
        return
    text = [name for name in unused if name in USUAL and name not in PREFERENCES]
    if text and stage.rows != "text":
        key = KEYS[text[0]]
        note_once(
            f"dataset {entry.name!r}: {', '.join(map(repr, text))} {'is' if len(text) == 1 else 'are'} usually text "
            f'for the model, but not used. To use it, say what it is in dataset_info.json: "columns": {{"{key}": '
            f'"{text[0]}"}}',
            logging.WARNING,
        )
    note_once(f"dataset {entry.name!r}: columns not used: {', '.join(unused)}")


def check_columns(entry: Entry, found: list[str], stage: StageRules) -> None:
    """Columns that the entry names, and those without which nothing can be read, must exist.

    Raises:
      DataError: with the columns that there are.
    """
    columns = entry.columns
    needed = set(entry.listed) - ({"response"} if stage.rows == "prompt" else set())
    if entry.formatting == "alpaca":
        needed.add("prompt" if columns.prompt else "query")
        needed |= {"response"} if stage.rows not in ("text", "prompt") and not entry.ranking else set()
    else:
        needed.add("messages")
    needed |= {"chosen", "rejected"} if entry.ranking else set()
    needed |= {"kto_tag"} if stage.rows == "feedback" else set()
    for key in sorted(needed):
        column = getattr(columns, key)
        if column is None or column not in found:
            if key == "response" and column is None:
                raise DataError(
                    f"dataset {entry.name!r} ({entry.path}) has texts ({columns.prompt}) without answers: they are for "
                    f"stage pt, not {stage.name}. Its columns are {', '.join(found)}"
                )
            near = difflib.get_close_matches(column or key, found, n=1, cutoff=0.5)
            suggestion = near[0] if near else "the_column"
            raise DataError(
                f"dataset {entry.name!r} ({entry.path}), row 1: no column {column or key!r} for the {key}. "
                f"Its columns are {', '.join(found)}. In dataset_info.json, say which one it is: "
                f'"columns": {{"{key}": "{suggestion}"}}'
            )


def check_stage(entry: Entry, stage: StageRules) -> None:
    """Raise a DataError for sets that are not for `stage`."""
    if entry.columns.margin and not entry.ranking:
        raise DataError(f"""dataset {entry.name!r}: only pairs have a margin: set "ranking": true, or leave it out""")
    kind = "ranking" if entry.ranking else "kto_tag" if entry.columns.kto_tag else ""
    if kind and not (stage.rows == "text" and kind == "kto_tag"):
        wanted = "pair" if kind == "ranking" else "feedback"
        if stage.rows != wanted:
            stages = " and ".join(name for name, rules in RULES.items() if rules.rows == wanted)
            raise DataError(
                f"dataset {entry.name!r} holds preferences ({kind}): it is for stage {stages}, not {stage.name}"
            )
    elif stage.has_preferences:
        wanted = '"columns": {"kto_tag": "..."}' if stage.rows == "feedback" else '"ranking": true'
        raise DataError(
            f"dataset {entry.name!r} holds no preferences, and stage {stage.name} learns from them: {wanted}"
        )
