"""The tokenizer's own chat template (Jinja) as a source of turns.

The template renders a whole conversation. Where prompts and answers lie in that text is found by rendering its
beginnings: up to question k, with the words that open an answer, and up to answer k. That is sound only if each
beginning, rendered alone, is how the whole begins; a template that rewrites earlier turns (as some do with thoughts) is
refused.
"""

import re
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache, partial
from typing import Any

from jtune.data.formats.messages import THOUGHTS, FaultyRow, originals
from jtune.data.templates.chat_format import ChatFormat, Pieces, Special, Turn, split_calls
from jtune.data.templates.chat_format import render as render_format
from jtune.data.templates.tools import load_calls, load_tools
from jtune.errors import DataError

# How the thoughts of an answer stand in its text, where a chat template has no key for them, and around calls.
THOUGHT, TOOL_CALL = ("<think>", "</think>"), ("<tool_call>", "</tool_call>")
REWRITES = "the chat template rewrites earlier turns"

PROBE = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
]


def exists(tokenizer: Any) -> bool:
    """Whether there is a chat template; of several, the one named "default"."""
    own = getattr(tokenizer, "chat_template", None)
    return isinstance(own, str) or (isinstance(own, Mapping) and "default" in own)


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    system: str | None = None,
    tools: str | None = None,
    *,
    discard_history: bool = False,
    last_only: bool = False,
    default_system: str = "",
    options: Mapping[str, Any],
) -> list[Turn]:
    """As `chat_format.render`, by the tokenizer's chat template: what becomes of thoughts is its own business.

    With `last_only` all earlier turns are part of the one prompt, so that they may be rewritten.

    Raises:
      FaultyRow: the template refuses the conversation, or a beginning of it is not rendered as in the whole.
    """
    if len(messages) % 2 or not messages:
        raise FaultyRow(f"{len(messages)} messages: question and answer must alternate, and the last is an answer")
    text = partial(_text, tokenizer, messages, system or default_system, tools, options)
    whole = text(len(messages), open_answer=False)
    turns, position = [], 0
    for k in range(len(messages) - 2 if last_only else 0, len(messages), 2):
        asked, answered = text(k + 1, open_answer=True), text(k + 2, open_answer=False)
        if not (whole.startswith(asked) and whole.startswith(answered) and position <= len(asked) <= len(answered)):
            raise FaultyRow(REWRITES)
        turns.append(Turn([whole[position : len(asked)]], [whole[len(asked) : len(answered)]]))
        position = len(answered)
    return turns


def ask(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    system: str | None = None,
    tools: str | None = None,
    *,
    default_system: str = "",
    options: Mapping[str, Any],
) -> Pieces:
    """As `chat_format.ask`, by the tokenizer's chat template. One that rewrites earlier turns will do."""
    return [_text(tokenizer, messages, system or default_system, tools, options, len(messages), open_answer=True)]


def _text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    system: str,
    tools: str | None,
    options: Mapping[str, Any],
    count: int,
    *,
    open_answer: bool,
) -> str:
    """The first `count` messages as the template writes them, with the words that open an answer or without."""
    opening: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    read = keys_read(tokenizer)
    chat = opening + [said for message in messages[:count] for said in original(message, read)]
    given = {"tools": load_tools(tools)} if tools else {}
    return rendered(tokenizer, chat, None, open_answer=open_answer, **given, **options)


def rendered(
    tokenizer: Any, chat: Sequence[Mapping[str, Any]], text: str | None, *, open_answer: bool, **options: Any
) -> str:
    """What a chat template makes of messages in OpenAI's form.

    Args:
      text: of the template; None: the tokenizer's own.

    Raises:
      FaultyRow: it refuses them.
    """
    apply = partial(
        tokenizer.apply_chat_template,
        chat_template=text,
        tokenize=False,
        add_generation_prompt=open_answer,
        **options,
    )
    try:
        try:
            return apply(chat)
        except Exception:
            if all(message["content"] is not None for message in chat):
                raise
            return apply([{**message, "content": message["content"] or ""} for message in chat])
    except Exception as error:  # Jinja, and whatever the template raises
        raise FaultyRow(
            f"the chat template refuses it: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"
        ) from error


def check(tokenizer: Any, own: Callable[..., list[Turn]]) -> None:
    """Refuse a chat template that gives no sound loss mask for a conversation of two turns.

    Raises:
      DataError: with the reason, and the templates by name that would say the same.
    """
    try:
        turns = own(PROBE)
        reason = "an answer is not in the text" if not _holds_answers(turns) else None
    except FaultyRow as fault:
        reason = str(fault)
    if reason is None:
        return
    same = same_text(tokenizer, own)
    raise DataError(
        f"no sound loss mask can be had from the tokenizer's own chat template: {reason}. Set `template`"
        + (f"; these render a first turn as it does: {', '.join(same)}" if same else " to the format of the model")
    )


def first_turn(tokenizer: Any, options: Mapping[str, Any]) -> str | None:
    """A question and its answer as the tokenizer's chat template writes them; None if there is none, or it refuses."""
    if not exists(tokenizer):
        return None
    try:
        [turn] = render(tokenizer, PROBE[:2], options=options)
    except FaultyRow:
        return None
    return "".join(map(str, turn.prompt + turn.response)).strip()


def difference(tokenizer: Any, own: str, form: ChatFormat) -> str | None:
    """Where a format first writes `first_turn` in another way than `own`; None where it does not."""
    [turn] = render_format(form, PROBE[:2])
    named = spoken(tokenizer, turn.prompt + turn.response).strip()
    if named == own:
        return None
    at = next((i for i, (a, b) in enumerate(zip(named, own)) if a != b), min(len(named), len(own)))
    shown = lambda text: repr(text[max(0, at - 15) : at + 35])
    return f"{shown(named)}, and the model's own {shown(own)}"


def same_text(tokenizer: Any, own: Callable[..., list[Turn]]) -> list[str]:
    """Names of the formats that render one question and answer, thoughts apart, as the chat template does."""
    from jtune.data.templates.table import TABLE

    try:
        asked = own(PROBE[:2])[0]
    except FaultyRow:
        return []
    wanted = "".join(map(str, asked.prompt + asked.response))

    def text(form: ChatFormat) -> str:
        [turn] = render_format(form, PROBE[:2])
        return spoken(tokenizer, turn.prompt + turn.response)

    return [name for name, form in TABLE.items() if text(form).strip() == wanted.strip()]


def answer_end(tokenizer: Any, turns: Callable[..., list[Turn]] | None = None) -> int | None:
    """The token that ends an answer: the first behind its text that was added to the vocabulary; None without one.

    Args:
      turns: a format's `render`; None: the tokenizer's own chat template.
    """
    try:
        [turn] = (turns or partial(render, tokenizer, options={}))(PROBE[:2])
    except FaultyRow:
        return None
    _, _, behind = spoken(tokenizer, turn.response).rpartition(PROBE[1]["content"])
    marks = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    found = [mark for mark in marks if mark in behind]
    return marks[min(found, key=lambda mark: (behind.index(mark), -len(mark)))] if found else None


def spoken(tokenizer: Any, pieces: Pieces) -> str:
    """The text of pieces."""
    special = {Special.BOS: tokenizer.bos_token or "", Special.EOS: tokenizer.eos_token or ""}
    return "".join(special[p] if isinstance(p, Special) else p if isinstance(p, str) else p.name for p in pieces)


def _holds_answers(turns: Sequence[Turn]) -> bool:
    answers = [message["content"] for message in PROBE if message["role"] == "assistant"]
    return all(answer in str(turn.response[0]) for answer, turn in zip(answers, turns))


def keys_read(tokenizer: Any) -> frozenset[str]:
    """The keys that the chat template reads, of messages and of whatever else it is given."""
    own = tokenizer.chat_template
    return _keys_read(own if isinstance(own, str) else own["default"])


@cache
def _keys_read(source: str) -> frozenset[str]:
    return frozenset(re.findall(r"""(?<=[.'"])[A-Za-z_]\w*|\btools\b""", source))


def original(message: Mapping[str, Any], read: Set[str]) -> list[dict[str, Any]]:
    """A message in OpenAI's form, which chat templates expect; thoughts under the keys that it reads."""
    role, content = message["role"], message["content"]
    spoken = {"function": "assistant", "observation": "tool"}.get(role, role)
    [first, *rest] = originals(message) or [{"role": spoken, "content": content if role != "function" else ""}]
    if role == "function" and "tool_calls" not in read:
        raise FaultyRow("the chat template writes no tool calls")
    if role == "function" and "tool_calls" not in first:
        before, calls = split_calls(content, TOOL_CALL, THOUGHT)
        first["content"] = f"{before}{first['content'] or ''}"
        first["tool_calls"] = [{"type": "function", "function": call} for call in load_calls(calls)]
    if thought := first.pop("reasoning_content", None):
        keys = [key for key in THOUGHTS if key in read]
        written = {} if keys else {"content": f"{THOUGHT[0]}\n{thought}\n{THOUGHT[1]}\n\n{first['content'] or ''}"}
        first |= written | dict.fromkeys(keys, thought)
    return [first, *rest]
