"""Whether a chat template asks as the model was trained: small conversations, rendered by both and compared.

template ── probes ── (conversation, the pieces of training) ── other_ids(Jinja text) ── None, or where they differ
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from itertools import product
from typing import Any, NamedTuple

from jtune.data import Template
from jtune.data.formats.align import as_messages
from jtune.data.formats.messages import FaultyRow
from jtune.data.templates import chat_template
from jtune.data.templates.chat_format import Pieces, ask, render
from jtune.data.templates.tools import dump

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "The weather of today.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where?"}},
                "required": ["city"],
            },
        },
    }
    for name in ("weather", "forecast")
]
SYSTEM = "Be brief."
THOUGHT = "One thing at a time."


class Probe(NamedTuple):
    """A conversation that shows whether a chat template asks as a template does.

    Attributes:
      kind: "plain"; "tools", where tools are given and called; "thinking", where answers have thoughts.
      asks: whether it ends with a question, behind which the words that open an answer are wanted.
      options: what the chat template is given beside the messages.
    """

    kind: str
    what: str
    turns: int
    chat: Sequence[Mapping[str, Any]]
    asks: bool
    expected: Pieces
    options: dict[str, Any]


def probes(template: Template, how: Mapping[str, bool]) -> Iterator[Probe]:
    """The conversations that a template by name is asked of, with what it makes of them today.

    Args:
      how: the options of `chat_format.render` that the conversations were learned with.
    """
    for system, turns in product((None, SYSTEM), (1, 2)):
        what = f"{turns} turn{'s' if turns > 1 else ''}{', with a system message' if system else ''}"
        yield from _both(template, how, "plain", what, chat_template.PROBE[: 2 * turns], system)
    for calls in (1, 2):
        what = "a call" if calls == 1 else "parallel calls"
        yield from _both(template, how, "tools", what, _called(calls), SYSTEM, tools=TOOLS)
    assert template.form is not None
    if template.form.thinking:
        thought = [message | _thought(message) for message in chat_template.PROBE]
        yield from _both(template, how, "thinking", "2 turns with thoughts", thought, None)
        for thinks in (True, False):
            what = f"a turn with enable_thinking={thinks}"
            yield from _both(template, how, "thinking", what, chat_template.PROBE[:2], None, enable_thinking=thinks)


def _thought(message: Mapping[str, Any]) -> dict[str, str]:
    return {"reasoning_content": THOUGHT} if message["role"] == "assistant" else {}


def _called(count: int) -> list[dict[str, Any]]:
    """A question, `count` calls at once, their results, the answer; and again, with a text beside the calls."""
    calls = [
        {"type": "function", "function": {"name": tool["function"]["name"], "arguments": {"city": "Rome"}}}
        for tool in TOOLS[:count]
    ]
    asked, answered = chat_template.PROBE[:2]
    results = [{"role": "tool", "content": "It rains."} for _ in calls]
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    return [asked, called, *results, answered, asked, called | {"content": "I look."}, *results, answered]


def _both(
    template: Template,
    how: Mapping[str, bool],
    kind: str,
    what: str,
    chat: Sequence[Mapping[str, Any]],
    system: str | None,
    **options: Any,
) -> Iterator[Probe]:
    """The prompt of the last answer of a conversation, and the whole."""
    assert template.form is not None
    form = replace(template.form, day=date.today())  # the chat template tells the day it is rendered
    if "enable_thinking" in options:
        form = replace(form, enable_thinking=options["enable_thinking"])
    tools = dump(options["tools"]) if "tools" in options else None
    opening = [{"role": "system", "content": system}] if system else []
    turns = sum(message["role"] == "user" for message in chat)
    messages = as_messages(chat)
    try:
        asked, whole = ask(form, messages[:-1], system, tools), render(form, messages, system, tools, **how)
    except FaultyRow:  # a format without parallel calls
        return
    yield Probe(kind, f"the prompt of {what}", turns, [*opening, *chat[:-1]], True, asked, options)
    pieces = [piece for turn in whole for part in turn for piece in part]
    yield Probe(kind, f"a conversation of {what}", turns, [*opening, *chat], False, pieces, options)


def differs(template: Template, text: str, probe: Probe, *, ends: bool = True) -> bool:
    """Whether neither the rendered text nor its ids are those of `template`.

    Args:
      text: Jinja.
      ends: False: white space at the end of the text does not count.
    """
    found = _rendered(template.tokenizer, text, probe)
    expected = chat_template.spoken(template.tokenizer, probe.expected)
    if found is None:
        return True
    same = found == expected if ends else found.rstrip() == expected.rstrip()
    return not same and other_ids(template, text, probe) is not None


def other_ids(template: Template, text: str, probe: Probe) -> tuple[Sequence[int], Sequence[int]] | None:
    """From where they differ on: the ids of the rendered text, as others tokenise it, and those of `template`."""
    found = _rendered(template.tokenizer, text, probe)
    ids = [] if found is None else template.token_ids([found]).lists()[0]
    expected = template.tokenise([probe.expected]).lists()[0]
    if ids == expected:
        return None
    at = next((i for i, (a, b) in enumerate(zip(ids, expected)) if a != b), min(len(ids), len(expected)))
    return ids[at:], expected[at:]


def _rendered(tokenizer: Any, text: str, probe: Probe) -> str | None:
    """What the Jinja text makes of the conversation; None where it refuses it."""
    try:
        return chat_template.rendered(tokenizer, probe.chat, text, open_answer=probe.asks, **probe.options)
    except FaultyRow:
        return None
