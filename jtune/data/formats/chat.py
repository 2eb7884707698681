"""ShareGPT's and OpenAI's form: a column of messages."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from jtune.config.stages import StageRules
from jtune.data.formats.fields import MISSING, NOT_LEARNED, add_unused, parsed_json, text_message, text_of
from jtune.data.formats.messages import FaultyRow, Message, is_learned, message_of, observation_of, split_parts
from jtune.data.sources.registry import Entry

QUESTION_ROLES = ("user", "observation")
ANSWER_ROLES = ("assistant", "function")
# What roles are called in data that people publish, besides what the tags of an entry say.
SYNONYMS: dict[str, str] = dict.fromkeys(("user", "human", "prompter"), "user")
SYNONYMS |= dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "chatbot", "ai"), "assistant")
SYNONYMS |= dict.fromkeys(("observation", "tool", "ipython", "tool_response", "tool_result"), "observation")
SYNONYMS |= dict.fromkeys(("function_response", "function_result"), "observation")
SYNONYMS |= dict.fromkeys(("function", "function_call", "tool_call"), "function")
SYNONYMS |= dict.fromkeys(("system", "developer"), "system")


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
    # A struct of lists, as older versions of `datasets` kept lists of structs.
    if isinstance(turns, Mapping) and all(isinstance(values, list) for values in turns.values()):
        return [dict(zip(turns, values)) for values in zip(*turns.values())]
    return turns


def tools_in_messages(row: Mapping[Any, Any], entry: Entry) -> Any:
    """The tools that stand in the first message, where it is one of the system."""
    turns = _turns(row, entry) if entry.formatting != "alpaca" else None
    return turns[0].get("tools") if turns and _is_system(turns[0], entry) else None


def _messages(turns: Sequence[Mapping[Any, Any]], entry: Entry) -> list[Message]:
    messages: list[Message] = []
    for turn in turns:
        role, content = _role(turn, entry), turn.get(entry.tags.content_tag)
        if role == "function" and _is_result(turn, messages, entry):
            role = "observation"
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
        if role == "observation" or (role == "function" and (results or _is_result(turn, messages, entry))):
            results.append(turn)
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
    tag = turn.get(entry.tags.role_tag)
    role = _role_of(tag, entry)
    if role is None:
        known = [*filter(None, _tagged(entry))]
        near = difflib.get_close_matches(str(tag), [*known, *SYNONYMS], n=1, cutoff=0.8)
        nearest = f", nearest to {near[0]!r}" if near else ""
        raise FaultyRow(f"unknown role {tag!r}{nearest} (known are {', '.join(known)})")
    return role


def _role_of(tag: Any, entry: Entry) -> str | None:
    """The role that a tag stands for: as the entry says, else by its usual names, in any case; None: neither."""
    if not isinstance(tag, str):
        return None
    return _tagged(entry).get(tag) or SYNONYMS.get(tag.strip().lower().replace("-", "_"))


def _tagged(entry: Entry) -> dict[str | None, str]:
    tags = entry.tags
    return {
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
        tags.observation_tag: "observation",
        tags.function_tag: "function",
        tags.system_tag: "system",
    }


def _is_result(turn: Mapping[Any, Any], before: Sequence[Message], entry: Entry) -> bool:
    """Whether a message of the role `function` is what a function returned, as in OpenAI's older form, not a call.

    There it has the function's name. Without one it follows an answer, and does not read as a call.
    """
    if turn.get(entry.tags.role_tag) != "function":
        return False
    if isinstance(turn.get("name"), str):
        return True
    content = turn.get(entry.tags.content_tag)
    held = parsed_json(content) if isinstance(content, str) else content
    calls = held if isinstance(held, list) else [held]
    reads_as_call = all(isinstance(call, Mapping) and {"name", "arguments"} <= call.keys() for call in calls)
    return bool(before) and before[-1]["role"] in ANSWER_ROLES and not reads_as_call


def _is_system(turn: Mapping[Any, Any], entry: Entry) -> bool:
    return _role_of(turn.get(entry.tags.role_tag), entry) == "system"


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
