"""One message, from the forms that data comes in to the one that templates render; no text in it is lost unsaid.

    {"role", "content"}   and, only where they are needed,
    "original"            JSON: the messages in OpenAI's form that it stands for, with what `content` does not hold:
                          thoughts, the text beside calls, names, the ids of calls and results
    "learned"             false: the message is given, not learned
    "unused"              keys of the message that no template reads, joined by ", "

The content of a `function` message is JSON, a list of calls `{name, arguments}`; thoughts may stand before it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jtune.data.sources.registry import Tags
from jtune.errors import DataError

Message = dict[str, Any]

THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # what a message may call its thoughts
SWITCHES = ("weight", "train", "training", "loss")  # what may say whether it is learned
CALLS = ("tool_calls", "function_call")  # the second is OpenAI's older form
# Keys that tell nothing to a model: when and where a message was written.
ABOUT = {"id", "message_id", "uuid", "index", "timestamp", "time", "date", "created", "created_at", "type", "object"}
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_PARTS = ("thinking", "reasoning")
MEDIA_PARTS: dict[str, str] = dict.fromkeys(("image", "image_url", "input_image"), "an image")
MEDIA_PARTS |= dict.fromkeys(("audio", "audio_url", "input_audio"), "audio")
MEDIA_PARTS |= dict.fromkeys(("video", "video_url", "input_video"), "a video")
MEDIA_PARTS |= dict.fromkeys(("file", "input_file", "document"), "a file")
TEXT_ONLY = ": jtune trains on text"  # ends the fault of a row that has an image or the like


class FaultyRow(DataError):
    """One row cannot be learned from; the message is a reason that rows can be counted by."""


def is_learned(turn: Mapping[Any, Any]) -> bool:
    """Whether none of `SWITCHES` says that a message is not learned.

    >>> is_learned({"role": "assistant", "content": "No.", "weight": 0})
    False

    Raises:
      FaultyRow: a switch is neither on nor off.
    """
    learned = True
    for key in SWITCHES:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise FaultyRow(f"{key} {value!r} of a message is neither 0 nor 1: a message is learned or it is not")
        learned &= bool(value)
    return learned


def split_parts(content: Any, what: str | None) -> tuple[Any, str]:
    """Content without its parts: OpenAI's list of text parts, or a list of texts, as one text; and its thoughts.

    >>> split_parts([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a message")
    ('ab', '')

    Raises:
      FaultyRow: a part is an image or the like, or something else than text.
    """
    parts = [content] if isinstance(content, Mapping) else content
    if not isinstance(parts, list) or not all(isinstance(part, str | Mapping) for part in parts):
        return content, ""
    if not parts:
        return None, ""
    texts, thoughts = [], []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part_kind(part)
        key = "text" if kind in TEXT_PARTS else kind
        if kind in MEDIA_PARTS:
            raise FaultyRow(f"{MEDIA_PARTS[kind]} in {what}{TEXT_ONLY}")
        if kind not in TEXT_PARTS + THOUGHT_PARTS or not isinstance(part.get(key), str):
            raise FaultyRow(f"{what} holds a part of type {kind!r}, which is not text")
        (texts if kind in TEXT_PARTS else thoughts).append(part[key])
    return "".join(texts), "\n".join(thoughts)


def part_kind(part: Mapping[Any, Any]) -> str:
    """The type of a part of a content; of one that does not say it, the key that it has.

    >>> part_kind({"type": "input_text", "text": "a"}), part_kind({"text": "a"}), part_kind({"image": "a.png"})
    ('input_text', 'text', 'image')
    """
    kinds = (*TEXT_PARTS, *THOUGHT_PARTS, *MEDIA_PARTS)
    kind = part.get("type") or next((key for key in kinds if part.get(key) is not None), None)
    return kind if isinstance(kind, str) else repr(kind)


def read_call(call: Any) -> dict[str, Any]:
    """A function call as `{name, arguments}`, arguments an object, whether or not they came as JSON text.

    >>> read_call({"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}})
    {'name': 'add', 'arguments': {'a': 1}}
    >>> read_call({"name": "now", "arguments": None})
    {'name': 'now', 'arguments': {}}

    Raises:
      FaultyRow: it has no name, or arguments are no JSON object.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise FaultyRow("a function call has no name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else None
        except (ValueError, RecursionError) as error:
            raise FaultyRow("arguments of a function call are text that is not JSON") from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise FaultyRow(f"arguments of a function call are no JSON object but {type(arguments).__name__}")
    return {"name": name, "arguments": arguments}


def answer_calls(turn: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """The calls of an answer in OpenAI's form, `{id, type, function: {name, arguments}}`; none: [].

    Raises:
      FaultyRow: `tool_calls` is not a list of calls.
    """
    calls, older = (turn.get(key) for key in CALLS)
    if isinstance(calls, str):
        try:
            calls = json.loads(calls) if calls.strip() else None
        except (ValueError, RecursionError) as error:
            raise FaultyRow("tool_calls are text that is not JSON") from error
    if not calls and isinstance(older, Mapping) and older.get("name") is not None:
        calls = [older]
    if not calls:
        return []
    if not isinstance(calls, list) or not all(
        isinstance(c, Mapping) and ("function" in c or "name" in c) for c in calls
    ):
        raise FaultyRow("tool_calls is not a list of {function: {name, arguments}}")
    ids = lambda call: {"id": call["id"]} if call.get("id") is not None and "function" in call else {}
    return [{**ids(call), "type": "function", "function": read_call(call)} for call in calls]


def message_of(turn: Mapping[Any, Any], role: str, tags: Tags, text: Callable, what: str | None = None) -> Message:
    """A question or an answer as `{role, content}`, with `original` where that does not say all.

    Args:
      turn: the message as it came.
      text: (value, what it is) -> the value as text; raises a FaultyRow where it is none.

    Raises:
      FaultyRow: there is no content, or a key does not hold what it should.
    """
    what = what or "a message"
    calls = answer_calls(turn) if role in ("assistant", "function") else []
    content, thought = split_parts(turn.get(tags.content_tag), what)
    if content is None and not calls:
        raise FaultyRow(f"{what} without content")
    said = None if content is None else text(content, what)
    more, unused = _others(turn, tags, role)
    thoughts = {key: more.pop(key) for key in THOUGHTS if key in more and key not in unused}
    thought = thought or next(iter(thoughts.values()), "")
    unused += [key for key, value in thoughts.items() if value != thought]
    if said and "<think>" in said and thought.strip() in said:
        thought = ""  # the content holds it, too
    made: Message = {"role": role, "content": said or ""}
    if calls:
        functions = [call["function"] for call in calls]
        made = {"role": "function", "content": json.dumps(functions, ensure_ascii=False)}
    if thought or more or (calls and (said or any("id" in call for call in calls))):
        spoken = "assistant" if role == "function" else role
        original: dict[str, Any] = {"role": spoken, "content": said}
        original |= {"reasoning_content": thought} if thought else {}
        original |= {"tool_calls": calls} if calls else {}
        if role == "function" and not calls:
            original["content"] = ""  # it is the calls, which `content` of the message holds
        made["original"] = json.dumps([original | more], ensure_ascii=False)
    return _marked(made, [turn], unused)


def observation_of(turns: Sequence[Mapping[Any, Any]], tags: Tags) -> Message:
    """The results of calls that one answer made, as one message.

    They are joined as LLaMA-Factory joins them, which is how Qwen's models see them; `original` keeps them apart.

    Raises:
      FaultyRow: a result is an image or the like.
    """
    what = "a tool result"
    texts, originals, unused = [], [], []
    for turn in turns:
        content = turn.get(tags.content_tag)
        if isinstance(content, list | Mapping):
            parts = content if isinstance(content, list) else [content]
            kinds = [str(part.get("type")) if isinstance(part, Mapping) else None for part in parts]
            if parts and all(kind in TEXT_PARTS for kind in kinds):
                content, _ = split_parts(content, what)
            elif media := next((kind for kind in kinds if kind in MEDIA_PARTS), None):
                raise FaultyRow(f"{MEDIA_PARTS[media]} in {what}{TEXT_ONLY}")
        written = content if isinstance(content, str) else "" if content is None else _dump(content)
        texts.append(written)
        more, others = _others(turn, tags, "tool")
        originals.append({"role": "tool", "content": written if content is None else content} | more)
        unused += others
    made: Message = {"role": "observation", "content": "\n</tool_response>\n<tool_response>\n".join(texts)}
    if len(turns) > 1 or originals[0] != {"role": "tool", "content": texts[0]}:
        made["original"] = json.dumps(originals, ensure_ascii=False)
    return _marked(made, turns, unused)


def _others(turn: Mapping[Any, Any], tags: Tags, role: str) -> tuple[dict[str, Any], list[str]]:
    """What a message holds beside role, content, calls and switches; and the keys of it that no format has a place for.

    The tokenizer's own chat template may read any key, so it is given them all.
    """
    known = {tags.role_tag, tags.content_tag, *SWITCHES, *CALLS, *ABOUT}
    more = {key: value for key, value in turn.items() if key not in known and value not in (None, "", [], {}, False)}
    is_thought = lambda key: key in THOUGHTS and isinstance(more[key], str) and role in ("assistant", "function")
    return more, [str(key) for key in more if key != "tool_call_id" and not is_thought(key)]


def _marked(made: Message, turns: Sequence[Mapping[Any, Any]], unused: Sequence[str]) -> Message:
    if not all(map(is_learned, turns)):
        made["learned"] = False
    if unused:
        made["unused"] = ", ".join(dict.fromkeys(unused))
    return made


def originals(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`original` as objects; [] where there is none."""
    return json.loads(message["original"]) if message.get("original") else []


def thought_of(message: Mapping[str, Any]) -> str:
    """The thoughts that a message holds beside its content."""
    return originals(message)[0].get("reasoning_content", "") if message.get("original") else ""


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def padded_columns(features: Mapping[str, Any] | None, tools: str | None) -> list[str] | None:
    """Columns where Arrow puts a null for a key that a row lacks, below the keys of a message; None: not known.

    Args:
      features: of a table of `datasets`; `tools` is the column of tools.
    """
    depth = lambda name: 1 if name == tools else 2
    return None if features is None else [name for name, feature in features.items() if _depth(feature) >= depth(name)]


def _depth(feature: Any) -> int:
    """How many objects lie in each other."""
    if isinstance(feature, Mapping):
        return 1 + max(map(_depth, feature.values()), default=0)
    return _depth(feature.feature) if hasattr(feature, "feature") else 0
