"""A chat format as data, and the text it makes of a conversation.

A format says what stands around each message, in slots. Each slot becomes tokens on its own, so a format says where
tokens may not merge, too; `{{content}}` stands for the message.

    ChatFormat, messages ── render ── [(prompt, response), ...] pieces ── tokenise ── ids
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Any, NamedTuple

from jtune.data.formats.messages import FaultyRow, originals, thought_of
from jtune.data.templates import tools as tool_formats

CONTENT = "{{content}}"


class Special(Enum):
    """A token that the tokenizer knows by its part; nothing where the tokenizer has none."""

    BOS = "bos"
    EOS = "eos"


class Token(NamedTuple):
    """One entry of the vocabulary, looked up by its name."""

    name: str


Slots = tuple[str | Special | Token, ...]
BOS, EOS = Special.BOS, Special.EOS


@dataclass(frozen=True)
class ChatFormat:
    """What stands around messages. The defaults are those of a template that says nothing.

    Attributes:
      observation, function: of tool results and tool calls; None: as `user`, as `assistant`.
      prefix: before everything.
      tool_format: how tools and calls are written (see tools.py).
      stop_words: tokens that end an answer, made special tokens; the first is eos with `replace_eos`.
      thought: what opens and closes the thinking of an answer.
      efficient_eos: an answer is not ended by eos in the text; the loss counts eos where the next turn begins.
      system_in_user: the system message is part of the first user message.
      thinking: answers come with their thoughts; where there are none, an empty thought is added.
      empty_thought: what that is, if not `thought`.
      enable_thinking: True: an empty thought is learned; None: it is given; False: and thoughts are taken out.
      preserve_thinking: thoughts of earlier turns stay when the loss is on the last answer only.
      day: for formats that tell the model what day it is; None: the day the rows are encoded.
    """

    user: Slots = (CONTENT,)
    assistant: Slots = (CONTENT, EOS)
    system: Slots = (CONTENT,)
    observation: Slots | None = None
    function: Slots | None = None
    prefix: Slots = ()
    tool_format: str = "default"
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    thought: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    tool_call: tuple[str, str] = ("<tool_call>", "</tool_call>")
    efficient_eos: bool = False
    replace_eos: bool = False
    system_in_user: bool = False
    thinking: bool = False
    empty_thought: str | None = None
    enable_thinking: bool | None = True
    preserve_thinking: bool = False
    day: date | None = None


Pieces = list[str | Special | Token]  # strings are tokenised one by one


class Turn(NamedTuple):
    prompt: Pieces
    response: Pieces


def render(
    form: ChatFormat,
    messages: Sequence[Mapping[str, Any]],
    system: str | None = None,
    tools: str | None = None,
    *,
    discard_history: bool = False,
    last_only: bool = False,
) -> list[Turn]:
    """The pieces of each turn: a question and what stands around it, an answer and what ends it.

    Args:
      messages: `{role, content}`, question and answer in turn; roles user, assistant, function, observation. What
        stands beside the content of an answer (see messages.py) comes before it.
      tools: JSON, a list of functions.
      discard_history: take the thoughts out of all answers but the last.
      last_only: earlier answers are given, not learned: they are left as they are, but for `discard_history`.

    Raises:
      FaultyRow: the messages are no conversation, or tools or calls are not the JSON they should be.
    """
    if len(messages) % 2 or not messages:
        raise FaultyRow(f"{len(messages)} messages: question and answer must alternate, and the last is an answer")
    last = len(messages) - 1
    texts = [message["content"] for message in messages]
    before = [""] * len(messages)  # the calls of an answer
    for i, message in enumerate(messages):
        if message.get("original") and message["role"] in ("assistant", "function"):
            texts[i], before[i] = _beside(form, message)
    if form.thinking:
        for i in range(1, len(messages), 2):
            earlier = i != last
            if (form.enable_thinking is False and not (earlier and last_only)) or (discard_history and earlier):
                texts[i], before[i] = (_without_thought(text, form.thought) for text in (texts[i], before[i]))

    pieces = [_message(form, message["role"], *said) for message, *said in zip(messages, texts, before)]
    pieces[0] = _opening(form, messages[0]["role"], texts[0], system or form.default_system, tools)

    turns = [Turn(prompt, response) for prompt, response in zip(pieces[::2], pieces[1::2])]
    if form.thinking:
        for k, turn in enumerate(turns):
            answer = before[2 * k + 1] + texts[2 * k + 1]
            if any(word.strip() in answer for word in form.thought) or (
                (discard_history or last_only) and turn is not turns[-1]
            ):
                continue
            empty = form.empty_thought or "".join(form.thought)
            if form.enable_thinking:
                turn.response.insert(0, empty)
            else:
                turn.prompt.append(empty)
    return turns


def ask(
    form: ChatFormat, messages: Sequence[Mapping[str, Any]], system: str | None = None, tools: str | None = None
) -> Pieces:
    """The pieces of what comes before the answer to the last message; thoughts of earlier answers as in training.

    Raises:
      FaultyRow: as `render`.
    """
    answered = [*messages, {"role": "assistant", "content": ""}]
    turns = render(form, answered, system, tools, discard_history=not form.preserve_thinking, last_only=True)
    return [piece for turn in turns[:-1] for part in turn for piece in part] + turns[-1].prompt


def with_content(slots: Slots, text: str) -> Pieces:
    return [slot.replace(CONTENT, text, 1) if isinstance(slot, str) else slot for slot in slots]


def _opening(form: ChatFormat, role: str, text: str, system: str, tools: str | None) -> Pieces:
    """The first message, with what comes before it."""
    prefix = list(form.prefix)
    if not system and not tools:
        return prefix + _message(form, role, text)
    if tools:
        system += tool_formats.describe_tools(form.tool_format, tools, form.day or date.today())
    spoken = with_content(form.system, system)
    if not form.system_in_user:
        return prefix + spoken + _message(form, role, text)
    return prefix + _message(form, role, "".join(map(str, spoken)) + text if role == "user" else text)


def _message(form: ChatFormat, role: str, text: str, before: str = "") -> Pieces:
    if role == "user":
        return with_content(form.user, text)
    if role == "assistant":
        return with_content(form.assistant, text)
    if role == "observation":
        return with_content(form.user if form.observation is None else form.observation, text)
    if role == "function":
        return _calls(form, text, before)
    raise FaultyRow(f"unknown role {role!r} (known are user, assistant, function, observation)")


def _beside(form: ChatFormat, message: Mapping[str, Any]) -> tuple[str, str]:
    """The content of an answer, and what stands before it if it is calls: thoughts that came apart, and text."""
    content, thought = message["content"], thought_of(message).strip("\n")
    text = originals(message)[0].get("content") or "" if message["role"] == "function" else ""
    thought = f"{form.thought[0]}{thought}{form.thought[1]}" if thought else ""
    return (content, thought + text) if message["role"] == "function" else (thought + content, "")


def _calls(form: ChatFormat, text: str, before: str) -> Pieces:
    """A function message: its calls as the model writes them, after `before`. Text around them stays before them.

    The calls are JSON, an object {"name", "arguments"} or a list; alone, after a thought, or between `tool_call` words.
    """
    around, calls = ("", text) if form.system_in_user else split_calls(text, form.tool_call, form.thought)
    written = tool_formats.call(
        form.tool_format, [(call["name"], call["arguments"]) for call in tool_formats.load_calls(calls)]
    )
    if not before:
        return with_content(form.assistant if form.function is None else form.function, around + written)
    slots, marker = call_slots(form)
    is_text = not before.endswith(form.thought[1]) and not marker
    between = tool_formats.between(form.tool_format, written) if is_text else ""
    return with_content(slots, f"{before}{between}{marker}{around}{written}")


def call_slots(form: ChatFormat) -> tuple[Slots, str]:
    """What stands around an answer that is text and calls, and what stands between these, as [TOOL_CALLS]."""
    if form.function is None:
        return form.assistant, ""
    ahead, opening, _, _ = _around_content(form.assistant)
    _, marker, closing, behind = _around_content(form.function)
    return (*ahead, f"{opening}{CONTENT}{closing}", *behind), marker if marker.strip() else ""


def _around_content(slots: Slots) -> tuple[Slots, str, str, Slots]:
    at = next(i for i, slot in enumerate(slots) if isinstance(slot, str) and CONTENT in slot)
    opening, closing = str(slots[at]).split(CONTENT, 1)
    return slots[:at], opening, closing, slots[at + 1 :]


def split_calls(text: str, tool_call: tuple[str, str], thought: tuple[str, str]) -> tuple[str, str]:
    """What stands around the calls of a function message, and the calls."""
    for opening, closing, inner in ((*tool_call, True), (*thought, False)):
        found = re.search(f"{re.escape(opening)}(.*?){re.escape(closing)}", text, re.DOTALL)
        if found:
            rest = text.replace(found[0], "")
            return (rest, found[1]) if inner else (found[0], rest)
    return "", text


def _without_thought(text: str, thought: tuple[str, str]) -> str:
    opening, closing = map(re.escape, thought)
    return re.sub(f"{opening}(.*?){closing}", "", text, flags=re.DOTALL).lstrip("\n")
