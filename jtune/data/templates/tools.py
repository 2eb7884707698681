# ruff: noqa: RUF001 - full-width punctuation is what the models use
"""How each family of models is told of its tools, and how it writes a call.

`describe` is what follows the system message, `call` what stands in a function message. The words are those the models
were trained on. LLaMA-Factory writes the calls of three formats in another way than it tells the model to: glm4_moe
does not close <tool_call>, minimax2 leaves out <minimax:tool_call>, seed_oss does not close <function=name>. So do
these here, and whoever uses them is told of `tool_format: glm4_moe_whole` and so on, where calls are as told.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from typing import Any, NamedTuple

from jtune.data.formats.messages import FaultyRow, read_call

Call = tuple[str, Any]  # name, arguments

# What stands between the text of an answer and its calls, where it is not "\n".
BETWEEN = {"gemma4": "", "glm4": "<|assistant|>", "lfm2": "", "mistral": "", "qwen3_5": "\n\n"}

# Formats whose calls are not as the model is told to write them -> those that are.
WHOLE = {name: f"{name}_whole" for name in ("glm4_moe", "minimax2", "seed_oss")}


def describe_tools(tool_format: str, text: str, today: date) -> str:
    """The text that makes tools known to the model; "" without tools.

    Args:
      text: JSON, a list of functions, each alone or as `{"type": "function", "function": ...}`.

    Raises:
      FaultyRow: it is something else.
    """
    tools = load_tools(text)
    if tool_format == "phi4_mini":
        return f"<|tool|>{text}<|/tool|>"  # as it stands in the data
    if not tools:
        return ""
    try:
        return FORMATS[tool_format].describe(tools, today)
    except (KeyError, TypeError, AttributeError) as error:
        raise FaultyRow(f"a tool is no function schema with name and parameters ({type(error).__name__})") from error


def load_tools(text: str) -> list[Any]:
    """The list of functions that `text` holds as JSON; one alone is a list of one.

    Raises:
      FaultyRow: it is something else.
    """
    try:
        tools = json.loads(text)
        tools = [tools] if isinstance(tools, Mapping) else tools
        if not isinstance(tools, list):
            raise FaultyRow("tools are not a JSON list")
        return [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
    except (ValueError, RecursionError) as error:
        raise FaultyRow("tools are not JSON") from error


def load_calls(text: str) -> list[dict[str, Any]]:
    """The calls, `{name, arguments}`, that `text` holds as JSON: a list, or one.

    Raises:
      FaultyRow: it holds something else.
    """
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FaultyRow("a function call is not JSON") from error
    return [read_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def between(tool_format: str, calls: str) -> str:
    """What stands between the text of an answer and its calls, as they are written."""
    return "" if calls.startswith("\n") else BETWEEN.get(tool_format, "\n")


def call(tool_format: str, calls: Sequence[Call]) -> str:
    """The text of function calls.

    >>> call("qwen", [("add", {"a": 1})])
    '<tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>'
    """
    try:
        return FORMATS[tool_format].call(calls)
    except (AttributeError, TypeError) as error:
        raise FaultyRow(f"arguments of a function call are no JSON object ({type(error).__name__})") from error


class ToolFormat(NamedTuple):
    describe: Callable[[Sequence[Any], date], str]
    call: Callable[[Sequence[Call]], str]


def dump(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def text_or_json(value: Any) -> str:
    return value if isinstance(value, str) else dump(value)


def bare(tool: Any) -> Any:
    """`{"name": ...}`, without the wrapper."""
    if "function" in tool:
        return tool["function"]
    return {key: value for key, value in tool.items() if (key, value) != ("type", "function")}


def wrapped(tool: Any) -> Any:
    """`{"type": "function", "function": {"name": ...}}`."""
    is_wrapped = "function" in tool and tool.get("type") == "function"
    return tool if is_wrapped else {"type": "function", "function": bare(tool)}


def named(name: str, arguments: Any) -> str:
    return dump({"name": name, "arguments": arguments})


# ---------------------------------------------------------------------- default: thought and action, in words


def _describe_default(tools: Sequence[Any], today: date) -> str:
    tools = [bare(tool) for tool in tools]
    described = "".join(
        f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description') or ''}\nTool Args:\n"
        + "".join(_arguments(tool.get("parameters") or {}))
        + "\n"
        for tool in tools
    )
    names = ", ".join(tool["name"] for tool in tools)
    return (
        f"You have access to the following tools:\n{described}"
        "Use the following format if using a tool:\n"
        f"```\nAction: tool name (one of [{names}])\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
    )


def _arguments(parameters: Any) -> Iterator[str]:
    needed = parameters.get("required") or []
    for name, about in (parameters.get("properties") or {}).items():
        about = about or {}
        required = ", required" if name in needed else ""
        choices = f", should be one of [{', '.join(map(str, about['enum']))}]" if about.get("enum") else ""
        items = f", where each item should be {about['items'].get('type', '')}" if about.get("items") else ""
        kind, meaning = about.get("type") or "", about.get("description") or ""
        yield f"  - {name} ({kind}{required}): {meaning}{choices}{items}\n"


def _call_default(calls: Sequence[Call]) -> str:
    return "\n".join(f"Action: {name}\nAction Input: {dump(arguments)}" for name, arguments in calls)


# ---------------------------------------------------------------------- qwen, and those that follow it

_XML_SIGNATURES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_CALL_AS_OBJECT = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def _lines(tools: Sequence[Any]) -> str:
    return "".join("\n" + dump(tool) for tool in tools)


def _describe_qwen(tools: Sequence[Any], today: date) -> str:
    return "\n\n" + _XML_SIGNATURES + _lines([wrapped(tool) for tool in tools]) + _CALL_AS_OBJECT


def _call_qwen(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{named(*call)}\n</tool_call>" for call in calls)


def _describe_ling(tools: Sequence[Any], today: date) -> str:
    return _XML_SIGNATURES + _lines([wrapped(tool) for tool in tools]) + _CALL_AS_OBJECT + "\ndetailed thinking off"


def _describe_qwen3_5(tools: Sequence[Any], today: date) -> str:
    return (
        f"\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>{_lines([bare(t) for t in tools])}"
        "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
        "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
        "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
        "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n"
        "- Function calls MUST follow the specified format: "
        "an inner <function=...></function> block must be nested within <tool_call></tool_call> XML tags\n"
        "- Required parameters MUST be specified\n"
        "- You may provide optional reasoning for your function call in natural language "
        "BEFORE the function call, but NOT after\n"
        "- If there is no function call available, answer the question like normal with your current knowledge "
        "and do not tell the user about function calls\n</IMPORTANT>"
    )


def _call_qwen3_5(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<tool_call>\n<function={name}>"
        + "".join(f"\n<parameter={key}>\n{text_or_json(value)}\n</parameter>" for key, value in arguments.items())
        + "\n</function>\n</tool_call>"
        for name, arguments in calls
    )


def _describe_glm4_moe(tools: Sequence[Any], today: date) -> str:
    return (
        f"\n\n{_XML_SIGNATURES}{_lines([wrapped(tool) for tool in tools])}"
        "\n</tools>\n\nFor each function call, output the function name and arguments within the following XML format:"
        "\n<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>"
        "\n<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>\n"
    )


def _call_glm4_moe(calls: Sequence[Call], end: str = "") -> str:
    return "\n".join(
        f"\n<tool_call>{name}"
        + "".join(
            f"\n<arg_key>{key}</arg_key>\n<arg_value>{text_or_json(value)}</arg_value>"
            for key, value in arguments.items()
        )
        + end
        for name, arguments in calls
    )


# ---------------------------------------------------------------------- llama3, mistral, glm4


def _describe_llama3(tools: Sequence[Any], today: date) -> str:
    return (
        f"Cutting Knowledge Date: December 2023\nToday Date: {today:%d %b %Y}\n\n"
        "You have access to the following functions. To call a function, please respond with JSON for a function call. "
        'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. '
        "Do not use variables.\n\n" + "".join(dump(wrapped(tool), indent=4) + "\n\n" for tool in tools)
    )


def _call_llama3(calls: Sequence[Call]) -> str:
    written = [{"name": name, "parameters": arguments} for name, arguments in calls]
    return dump(written[0] if len(written) == 1 else written)


def _describe_mistral(tools: Sequence[Any], today: date) -> str:
    return f"[AVAILABLE_TOOLS] {dump([wrapped(tool) for tool in tools])}[/AVAILABLE_TOOLS]"


def _call_mistral(calls: Sequence[Call]) -> str:
    return dump([{"name": name, "arguments": arguments} for name, arguments in calls])


def _describe_glm4(tools: Sequence[Any], today: date) -> str:
    described = "".join(
        f"\n\n## {tool['name']}\n\n{dump(tool, indent=4)}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
        for tool in map(bare, tools)
    )
    return (
        "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
        f"你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具{described}"
    )


def _call_glm4(calls: Sequence[Call]) -> str:
    if len(calls) != 1:
        raise FaultyRow("the tool format glm4 has no parallel calls")
    name, arguments = calls[0]
    return f"{name}\n{dump(arguments)}"


# ---------------------------------------------------------------------- others


def _describe_minimax1(tools: Sequence[Any], today: date) -> str:
    return (
        "You are provided with these tools:\n<tools>\n"
        + "".join(dump(bare(tool)) + "\n" for tool in tools)
        + "</tools>\n\nIf you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide "
        "tool-name and json-object of arguments, following the format below:\n<tool_calls>\n"
        '{"name": <tool-name-1>, "arguments": <args-json-object-1>}\n...\n</tool_calls>'
    )


def _call_minimax1(calls: Sequence[Call]) -> str:
    return "<tool_calls>\n" + "\n".join(named(*call) for call in calls) + "\n</tool_calls>"


def _describe_minimax2(tools: Sequence[Any], today: date) -> str:
    return (
        "\n\n# Tools\n\nYou may call one or more tools to assist with the user query.\n"
        "Here are the tools available in JSONSchema format:\n\n<tools>\n"
        + "".join(f"<tool>{dump(bare(tool))}</tool>\n" for tool in tools)
        + "</tools>\n\nWhen making tool calls, use XML format to invoke tools and pass parameters:\n"
        '\n<minimax:tool_call>\n<invoke name="tool-name-1">\n'
        '<parameter name="param-key-1">param-value-1</parameter>\n'
        '<parameter name="param-key-2">param-value-2</parameter>\n...\n</invoke>\n</minimax:tool_call>'
    )


def _call_minimax2(calls: Sequence[Call]) -> str:
    return "\n".join(
        f'<invoke name="{name}">'
        + "".join(f'\n<parameter name="{key}">{text_or_json(value)}</parameter>' for key, value in arguments.items())
        + "\n</invoke>"
        for name, arguments in calls
    )


def _call_minimax2_whole(calls: Sequence[Call]) -> str:
    return f"<minimax:tool_call>\n{_call_minimax2(calls)}\n</minimax:tool_call>"


def _describe_seed_oss(tools: Sequence[Any], today: date) -> str:
    return (
        "system\nYou are Doubao, a helpful AI assistant. You may call one or more functions to assist with the user "
        "query.Tool List:\nYou are authorized to use the following tools (described in JSON Schema format). Before "
        "performing any task, you must decide how to call them based on the descriptions and parameters of these "
        f"tools.\n{dump(tools)}\n"
        "工具调用请遵循如下格式:\n<seed:tool_call>\n<function=example_function_name>\n"
        "<parameter=example_parameter_1>value_1</parameter>\n<parameter=example_parameter_2>This is the value for the "
        "second parameter\nthat can span\nmultiple lines</parameter>\n</function>\n</seed:tool_call>\n"
    )


def _call_seed_oss(calls: Sequence[Call], end: str = "") -> str:
    return "\n".join(
        f"\n<seed:tool_call>\n<function={name}{end}"
        + "".join(f"\n<parameter={key}>{text_or_json(value)}</parameter>" for key, value in arguments.items())
        + "\n</function>\n</seed:tool_call>"
        for name, arguments in calls
    )


def _describe_lfm2(tools: Sequence[Any], today: date) -> str:
    return f"List of tools: <|tool_list_start|>{dump([bare(tool) for tool in tools])}<|tool_list_end|>"


def _call_lfm2(calls: Sequence[Call]) -> str:
    def keyword(key: str, value: Any) -> str:
        return f'{key}="{value}"' if isinstance(value, str) else f"{key}={dump(value)}"

    written = (f"{name}({', '.join(keyword(*item) for item in arguments.items())})" for name, arguments in calls)
    return f"<|tool_call_start|>[{', '.join(written)}]<|tool_call_end|>"


_QUOTE = '<|"|>'


def _describe_gemma4(tools: Sequence[Any], today: date) -> str:
    quoted = lambda text: f"{_QUOTE}{text}{_QUOTE}"

    def parameter(schema: Mapping[str, Any]) -> str:
        parts = [f"description:{quoted(schema['description'])}"] if schema.get("description") else []
        parts += [f"type:{quoted(str(schema['type']).upper())}"] if schema.get("type") else []
        return ",".join(parts)

    def declaration(tool: Mapping[str, Any]) -> str:
        fields = [f"description:{quoted(tool.get('description') or '')}"]
        if parameters := tool.get("parameters"):
            parts = []
            if properties := parameters.get("properties"):
                items = (f"{name}:{{{parameter(schema)}}}" for name, schema in properties.items())
                parts.append(f"properties:{{{','.join(items)}}}")
            if required := parameters.get("required"):
                parts.append(f"required:[{','.join(map(quoted, required))}]")
            if kind := parameters.get("type"):
                parts.append(f"type:{quoted(str(kind).upper())}")
            fields.append(f"parameters:{{{','.join(parts)}}}")
        if response := tool.get("response"):
            parts = [f"description:{quoted(response['description'])}"] if response.get("description") else []
            kind = str(response.get("type", "")).upper()
            parts += [f"type:{quoted(kind)}"] if kind == "OBJECT" else []
            fields.append(f"response:{{{','.join(parts)}}}")
        return f"declaration:{tool['name']}{{{','.join(fields)}}}"

    return "\n".join(declaration(bare(tool)) for tool in tools)


def _call_gemma4(calls: Sequence[Call]) -> str:
    def written(value: Any) -> str:
        if isinstance(value, Mapping):
            return "{" + items(value) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(written, value)) + "]"
        return f"{_QUOTE}{value}{_QUOTE}" if isinstance(value, str) else dump(value)

    def items(values: Mapping[str, Any]) -> str:
        return ",".join(f"{key}:{written(values[key])}" for key in sorted(values))

    def inside(arguments: Any) -> str:
        if isinstance(arguments, Mapping):
            return items(arguments)
        return arguments if isinstance(arguments, str) else written(arguments)

    return "".join(f"<|tool_call>call:{name}{{{inside(arguments)}}}<tool_call|>" for name, arguments in calls)


FORMATS = {
    "default": ToolFormat(_describe_default, _call_default),
    "gemma4": ToolFormat(_describe_gemma4, _call_gemma4),
    "glm4": ToolFormat(_describe_glm4, _call_glm4),
    "glm4_moe": ToolFormat(_describe_glm4_moe, _call_glm4_moe),
    "glm4_moe_whole": ToolFormat(_describe_glm4_moe, partial(_call_glm4_moe, end="\n</tool_call>")),
    "lfm2": ToolFormat(_describe_lfm2, _call_lfm2),
    "ling": ToolFormat(_describe_ling, _call_qwen),
    "llama3": ToolFormat(_describe_llama3, _call_llama3),
    "minimax1": ToolFormat(_describe_minimax1, _call_minimax1),
    "minimax2": ToolFormat(_describe_minimax2, _call_minimax2),
    "minimax2_whole": ToolFormat(_describe_minimax2, _call_minimax2_whole),
    "mistral": ToolFormat(_describe_mistral, _call_mistral),
    "phi4_mini": ToolFormat(_describe_default, _call_default),
    "qwen": ToolFormat(_describe_qwen, _call_qwen),
    "qwen3_5": ToolFormat(_describe_qwen3_5, _call_qwen3_5),
    "seed_oss": ToolFormat(_describe_seed_oss, _call_seed_oss),
    "seed_oss_whole": ToolFormat(_describe_seed_oss, partial(_call_seed_oss, end=">")),
}
