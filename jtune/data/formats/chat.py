"""ShareGPT's and OpenAI's form: a column of messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from jtune.config.stages import StageRules
from jtune.data.formats.fields import MISSING, NOT_LEARNED, add_unused, parsed_json, text_message, text_of
from jtune.data.formats.messages import FaultyRow, Message, is_learned, message_of, observation_of, split_parts
from jtune.data.sources.registry import Entry

QUESTION_ROLES = ("user", "observation")
ANSWER_ROLES = ("assistant", "function")
SYNONYMS = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "developer": "system"}


def chat_messages(row: Mapping[Any, Any], entry: Entry, stage: StageRules) -> tuple[list[Message], str]:
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
        system, turns = text_of(content, "the system message"), turns[1:]
    messages = openai_messages(turns, entry) if entry.formatting == "openai" else _messages(turns, entry)
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
        turns = parsed_json(turns)
    if isinstance(turns, Mapping):  # a struct of lists, as older versions of `datasets` kept lists of structs
        return [dict(zip(turns, values)) for values in zip(*turns.values())]
    return turns


def tools_in_messages(row: Mapping[Any, Any], entry: Entry) -> Any:
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
            messages.append(message_of(turn, role, entry.tags, text_of))
    return messages


def openai_messages(turns: Sequence[Mapping[Any, Any]], entry: Entry) -> list[Message]:
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
        messages.append(message_of(turn, role, tags, text_of))
    if results and entry.ranking:
        messages.append(observation_of(results, tags))
    elif results and messages:
        add_unused(messages[-1], "tool results after the last answer")
    return messages


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


def ranked_answers(row: Mapping[Any, Any], entry: Entry) -> list[Message]:
    """The chosen answer and the rejected one: texts in alpaca's form, messages in the others."""
    answers = []
    for column in (entry.columns.chosen, entry.columns.rejected):
        value = row.get(column)
        if value is None:
            raise FaultyRow(f"{MISSING}{column}")
        if entry.formatting == "alpaca":
            answers.append(text_message("assistant", value, column))
            continue
        if not isinstance(value, Mapping):
            raise FaultyRow(f"{column} is not a message, with {entry.tags.role_tag} and {entry.tags.content_tag}")
        role = _role(value, entry)
        if role not in ANSWER_ROLES:
            raise FaultyRow(f"role out of turn ({role} as {column})")
        if not is_learned(value):
            raise FaultyRow(NOT_LEARNED)
        answers.append(message_of(value, role, entry.tags, text_of, column))
    return answers
