"""A chat format as the Jinja text of a `chat_template.jinja`, which transformers, vLLM and others render.

It renders what `chat_format.render` writes of a whole conversation, and what `chat_format.ask` writes where
`add_generation_prompt` is set. Messages are in OpenAI's form: roles system (first, once), user, assistant (also with
`tool_calls` and `reasoning_content`) and tool; results of parallel calls follow each other.

Slots are tokenised one by one in training, while the rendered text is tokenised whole: `glue` puts back the space that
some tokenisers add in front of each text (see `to_jinja`), and `interop.endings` compares the ids.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jtune.data.formats.messages import THOUGHTS
from jtune.data.templates.chat_format import CONTENT, ChatFormat, Slots, Special, Token, call_slots
from jtune.data.templates.jinja_tools import indented, quote, tool_macros
from jtune.data.templates.tools import BETWEEN

PARALLEL = "\n</tool_response>\n<tool_response>\n"  # between the results of parallel calls, as rows are aligned


def to_jinja(
    form: ChatFormat,
    tokenizer: Any,
    *,
    discard_history: bool = False,
    last_only: bool = False,
    glue: str = "",
    tools: bool = True,
) -> str:
    """The Jinja text of `form`, for the special tokens of `tokenizer`.

    Args:
      discard_history, last_only: as the conversations that were learned were rendered (see `chat_format.render`). What
        asks for an answer is always rendered as by `chat_format.ask`.
      glue: where a space is put, for tokenisers that put one in front of each text. "prepend": where a text follows a
        text; "always": there, but not before a space; "first": where a text that begins with none follows anything, for
        those that do it at the beginning only. "": nowhere.
      tools: False: tools and calls raise, where they would not be rendered as they were learned.
    """
    words = {Special.BOS: tokenizer.bos_token or "", Special.EOS: tokenizer.eos_token or ""}
    marks = tuple(str(token) for token in tokenizer.get_added_vocab())
    answers = (form.thought[0], form.tool_call[0])
    openings = tuple(mark for mark in marks if any(word.startswith(mark) for word in answers))
    emit = partial(_emit, words, marks, openings, glue)
    system = _with_content(form.system, "system")
    lines = [
        "{%- set state = namespace(asked=false, glue='', results='') -%}",
        *(_thoughts(form) if form.thinking else ()),
        *tool_macros(form.tool_format if tools else None),
        "{%- set turns = messages[1:] if messages and messages[0]['role'] == 'system' else messages -%}",
        "{%- set system = messages[0]['content'] if messages and messages[0]['role'] == 'system' else '' -%}",
        f"{{%- set system = system or {quote(form.default_system)} -%}}",
        "{%- if tools is defined and tools -%}",
        "    {%- set system = system + describe(tools) -%}",
        "{%- endif -%}",
        *emit(form.prefix),
    ]
    if not form.system_in_user:
        lines += ["{%- if system -%}", *indented(emit(form.system, "system")), "{%- endif -%}"]
    lines += [
        "{%- for message in turns -%}",
        "    {%- set role = message['role'] -%}",
        "    {%- set text = message['content'] or '' -%}",
        "    {%- set again = role == 'tool' and not loop.first and loop.previtem['role'] == 'tool' -%}",
        "    {%- if (role == 'assistant') != state.asked and not again -%}",
        "        {{- raise_exception('question and answer must alternate, and the first is a question') -}}",
        "    {%- elif role == 'user' -%}",
    ]
    if form.system_in_user:
        lines.append(f"        {{%- set text = {system} + text if loop.first and system else text -%}}")
    lines += [
        *indented(emit(form.user, "text"), 2),
        "    {%- elif role == 'tool' -%}",
        f"        {{%- set state.results = state.results + {quote(PARALLEL)} + text if again else text -%}}",
        "        {%- if loop.last or loop.nextitem['role'] != 'tool' -%}",
        "            {%- set text = state.results -%}",
        *indented(emit(form.user if form.observation is None else form.observation, "text"), 3),
        "        {%- endif -%}",
        "    {%- elif role == 'assistant' -%}",
        *indented(_beside(form), 2),
        *indented(_thinking(form, emit, discard_history, last_only) if form.thinking else [], 2),
        *indented(_answer(form, emit), 2),
        "    {%- else -%}",
        "        {{- raise_exception('unknown role ' + role + ' (system, first; user, assistant, tool)') -}}",
        "    {%- endif -%}",
        "    {%- set state.asked = role != 'assistant' -%}",
        "{%- endfor -%}",
    ]
    if form.thinking:
        lines += [
            "{%- if add_generation_prompt and state.asked and not think -%}",
            *indented(emit((_empty_thought(form),))),
            "{%- endif -%}",
        ]
    return "\n".join(lines) + "\n"


def _emit(
    words: Mapping[Special, str],
    marks: tuple[str, ...],
    openings: tuple[str, ...],
    glue: str,
    slots: Slots,
    variable: str = "",
) -> list[str]:
    """Slots as Jinja lines, which keep in `state.glue` what a text that follows begins with.

    Args:
      marks: the tokenizer's special tokens.
      openings: those that an answer may begin with.
      variable: what stands for the message.
    """
    lines = []
    for slot in slots:
        text = slot if isinstance(slot, str) else slot.name if isinstance(slot, Token) else words[slot]
        if not text:
            continue
        filled = bool(variable) and isinstance(slot, str)
        if glue and isinstance(slot, str) and not text.startswith(marks):
            lines += _glued(glue, text, variable if filled else "", openings)
        lines.append(f"{{{{- {_with_content((text,), variable) if filled else quote(text)} -}}}}")
        if glue:
            special = not isinstance(slot, str) or text.endswith(marks)
            after = "" if special and glue != "first" else " "
            lines.append(f"{{%- set state.glue = '{after}' -%}}")
    return lines


def _glued(glue: str, text: str, variable: str, openings: tuple[str, ...]) -> list[str]:
    """What comes before a text that is tokenised on its own."""
    spaces = () if glue == "prepend" else (" ",)
    if not (variable and text.startswith(CONTENT)):
        return [] if text.startswith(spaces) else ["{{- state.glue -}}"]
    begins = " or ".join(f"{variable}[:{len(word)}] == {quote(word)}" for word in (*spaces, *openings))
    return [f"{{{{- '' if {begins or 'false'} else state.glue -}}}}"]


def _with_content(slots: Slots, variable: str) -> str:
    """An expression: the slots, all text, with a variable in the place of the message."""
    before, found, behind = "".join(map(str, slots)).partition(CONTENT)
    parts = [quote(before)] if before else []
    parts += [variable] if found else []
    parts += [quote(behind)] if behind else []
    return " + ".join(parts) or "''"


def _answer(form: ChatFormat, emit: Callable[..., list[str]]) -> list[str]:
    """An answer, of `text` or of calls or of both, as `chat_format` writes it."""
    slots, marker = call_slots(form)
    between = quote(BETWEEN.get(form.tool_format, "\n"))
    is_text = f"text.endswith({quote(form.thought[1])})"
    joined = quote(marker) if marker else f"('' if {is_text} or calls[:1] == '\\n' else {between})"
    return [
        "{%- if message['tool_calls'] is defined and message['tool_calls'] -%}",
        "    {%- set calls = written(message['tool_calls']) -%}",
        "    {%- if text -%}",
        f"        {{%- set text = text + {joined} + calls -%}}",
        *indented(emit(slots, "text"), 2),
        "    {%- else -%}",
        *indented(emit(form.assistant if form.function is None else form.function, "calls"), 2),
        "    {%- endif -%}",
        "{%- else -%}",
        *indented(emit(form.assistant, "text")),
        "{%- endif -%}",
    ]


# ---------------------------------------------------------------------- thoughts


def _empty_thought(form: ChatFormat) -> str:
    return form.empty_thought or "".join(form.thought)


def _beside(form: ChatFormat) -> list[str]:
    """Thoughts that came apart from the text, before it; unless it holds them, too."""
    opening, closing = map(quote, form.thought)
    apart = " or ".join(f"message['{key}']" for key in THOUGHTS)
    return [
        f"{{%- set apart = {apart} -%}}",
        r"{%- set apart = apart.strip('\n') if apart is string else '' -%}",
        "{%- if apart and not ('<think>' in text and apart.strip() in text) -%}",
        f"    {{%- set text = {opening} + apart + {closing} + text -%}}",
        "{%- endif -%}",
    ]


def _thoughts(form: ChatFormat) -> list[str]:
    """`without_thought(text)`, as `chat_format` takes thoughts out, and `think`, as it was trained unless asked."""
    opening, closing = map(quote, form.thought)
    return [
        "{%- macro without_thought(text) -%}",
        f"    {{%- set parts = text.split({opening}) -%}}",
        "    {%- set kept = namespace(text=parts[0], open='') -%}",
        "    {%- for part in parts[1:] -%}",
        f"        {{%- if {closing} in part -%}}",
        f"            {{%- set kept.text = kept.text + (part.split({closing})[1:] | join({closing})) -%}}",
        "            {%- set kept.open = '' -%}",
        "        {%- else -%}",
        f"            {{%- set kept.open = kept.open + {opening} + part -%}}",
        "        {%- endif -%}",
        "    {%- endfor -%}",
        r"    {{- (kept.text + kept.open).lstrip('\n') -}}",
        "{%- endmacro -%}",
        f"{{%- set think = enable_thinking if enable_thinking is defined else {str(form.enable_thinking).lower()} -%}}",
    ]


def _thinking(form: ChatFormat, emit: Callable[..., list[str]], discard_history: bool, last_only: bool) -> list[str]:
    """What becomes of the thoughts of `text`, an answer."""
    opening, closing = form.thought
    truth = lambda value: "true" if value else "false"
    discard = f"({truth(not form.preserve_thinking)} if add_generation_prompt else {truth(discard_history)})"
    return [
        "{%- set earlier = add_generation_prompt or not loop.last -%}",
        f"{{%- set discard = {discard} -%}}",
        f"{{%- set given = add_generation_prompt or {truth(last_only)} -%}}",
        "{%- if (think == false and not (earlier and given)) or (discard and earlier) -%}",
        "    {%- set text = without_thought(text) -%}",
        "{%- endif -%}",
        f"{{%- set thought = {quote(opening.strip())} in text or {quote(closing.strip())} in text -%}}",
        "{%- if not thought and not (earlier and (discard or given)) -%}",
        *indented(emit((_empty_thought(form),))),
        "{%- endif -%}",
    ]
