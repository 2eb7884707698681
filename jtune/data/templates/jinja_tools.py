"""How tools and calls are written in Jinja, for `jtune.data.templates.jinja`."""

import json
from collections.abc import Sequence
from datetime import date

from jtune.data.templates import tools as tool_formats

_DAY, _NAMES = date(2001, 2, 3), ("@one@", "@two@")  # stand for the day and for tools in what is said of tools


def quote(text: str) -> str:
    """`text` as a literal of Jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r") + "'"


def indented(lines: Sequence[str], depth: int = 1) -> list[str]:
    return ["    " * depth + line for line in lines]


# ---------------------------------------------------------------------- calls

# How each tool format writes a call, of `name` and `arguments`; what stands before, between and behind calls.
_ARGUMENTS = "{{- arguments if arguments is string else arguments | tojson -}}"


def _object(key: str = "arguments") -> str:
    return "{{- '{\"name\": ' + (name | tojson) + ', \"" + key + "\": ' -}}" + _ARGUMENTS + "{{- '}' -}}"


def _parameters(before: str, key: str, value: str, behind: str) -> str:
    """Calls in XML: each argument between `key` and `value`, which is text or JSON."""
    return (
        f"{{{{- {before} -}}}}{{%- for key, value in arguments.items() -%}}{{{{- {key} -}}}}"
        f"{{{{- value if value is string else value | tojson -}}}}{{{{- {value} -}}}}{{%- endfor -%}}"
        f"{{{{- {behind} -}}}}"
    )


def _glm4_moe(end: str) -> str:
    return _parameters(
        r"'\n<tool_call>' + name",
        r"'\n<arg_key>' + key + '</arg_key>\n<arg_value>'",
        "'</arg_value>'",
        f"'{end}'",
    )


def _seed_oss(end: str) -> str:
    return _parameters(
        rf"'\n<seed:tool_call>\n<function=' + name + '{end}'",
        r"'\n<parameter=' + key + '>'",
        "'</parameter>'",
        r"'\n</function>\n</seed:tool_call>'",
    )


_MINIMAX2 = _parameters(
    """'<invoke name="' + name + '">'""",
    r"""'\n<parameter name="' + key + '">'""",
    "'</parameter>'",
    r"'\n</invoke>'",
)
_QWEN = r"{{- '<tool_call>\n' -}}" + _object() + r"{{- '\n</tool_call>' -}}"
_LFM2 = (
    "{{- name + '(' -}}{%- for key, value in arguments.items() -%}{{- '' if loop.first else ', ' -}}"
    "{{- key + '=' + ('\"' + value + '\"' if value is string else value | tojson) -}}{%- endfor -%}{{- ')' -}}"
)
_ACTION = r"{{- 'Action: ' + name + '\nAction Input: ' -}}" + _ARGUMENTS
_GEMMA4 = (  # `items` stands in what describes the tools
    "{{- '<|tool_call>call:' + name + '{' + (arguments if arguments is string else items(arguments))"
    " + '}<tool_call|>' -}}"
)
_GLM4 = (
    "{%- if not loop.first -%}{{- raise_exception('this template has no parallel calls') -}}{%- endif -%}"
    r"{{- name + '\n' -}}" + _ARGUMENTS
)
CALLS: dict[str, tuple[str, str, str, str]] = {  # a call, and the text before, between and behind calls
    "default": (_ACTION, "", "\n", ""),
    "gemma4": (_GEMMA4, "", "", ""),
    "glm4": (_GLM4, "", "", ""),
    "glm4_moe": (_glm4_moe(""), "", "\n", ""),
    "glm4_moe_whole": (_glm4_moe(r"\n</tool_call>"), "", "\n", ""),
    "lfm2": (_LFM2, "<|tool_call_start|>[", ", ", "]<|tool_call_end|>"),
    "ling": (_QWEN, "", "\n", ""),
    "minimax1": (_object(), "<tool_calls>\n", "\n", "\n</tool_calls>"),
    "minimax2": (_MINIMAX2, "", "\n", ""),
    "minimax2_whole": (_MINIMAX2, "<minimax:tool_call>\n", "\n", "\n</minimax:tool_call>"),
    "mistral": (_object(), "[", ", ", "]"),
    "phi4_mini": (_ACTION, "", "\n", ""),
    "qwen": (_QWEN, "", "\n", ""),
    "qwen3_5": (
        _parameters(
            r"'<tool_call>\n<function=' + name + '>'",
            r"'\n<parameter=' + key + '>\n'",
            r"'\n</parameter>'",
            r"'\n</function>\n</tool_call>'",
        ),
        "",
        "\n",
        "",
    ),
    "seed_oss": (_seed_oss(""), "", "\n", ""),
    "seed_oss_whole": (_seed_oss(">"), "", "\n", ""),
    "llama3": (_object("parameters"), "", ", ", ""),  # several are a list
}


def tool_macros(tool_format: str | None) -> list[str]:
    """`describe(tools)`, what the system message says of them, and `written(tool_calls)`; None: both raise."""
    if tool_format is None:
        refusal = "{{- raise_exception('this chat template renders no tools: they were learned in another way') -}}"
        return [
            f"{{%- macro {name} -%}}{refusal}{{%- endmacro -%}}" for name in ("describe(tools)", "written(tool_calls)")
        ]
    call, before, between, behind = CALLS[tool_format]
    described = _described(tool_format)
    if tool_format == "llama3":
        first, last = ("{{- '" + bracket + "' if tool_calls | length > 1 else '' -}}" for bracket in "[]")
    else:
        first, last = (f"{{{{- {quote(text)} -}}}}" for text in (before, behind))
    return [
        *described,
        "{%- macro written(tool_calls) -%}",
        f"    {first}",
        "    {%- for tool_call in tool_calls -%}",
        "        {%- set function = tool_call['function'] if 'function' in tool_call else tool_call -%}",
        "        {%- set name = function['name'] -%}",
        "        {%- set arguments = function['arguments'] or {} -%}",
        f"        {{{{- '' if loop.first else {quote(between)} -}}}}",
        f"        {call}",
        "    {%- endfor -%}",
        f"    {last}",
        "{%- endmacro -%}",
    ]


_BARE = (  # as tools.py's `bare`, and `_WRAPPED` as its `wrapped`
    "(tool['function'] if 'function' in tool else dict(tool.items() | rejectattr(0, 'equalto', 'type'))"
    " if tool['type'] == 'function' else tool)"
)
_WRAPPED = (
    "(tool if 'function' in tool and tool['type'] == 'function' else {'type': 'function', 'function': " + _BARE + "})"
)
_WORDS = (  # of one tool, in the format default
    "{%- set tool = " + _BARE + " -%}",
    r"{{- '> Tool Name: ' + tool['name'] + '\nTool Description: ' + (tool['description'] or '') + '\nTool Args:\n' -}}",
    "{%- set parameters = tool['parameters'] or {} -%}",
    "{%- for name, about in (parameters['properties'] or {}).items() -%}",
    "    {%- set about = about or {} -%}",
    "    {%- set required = ', required' if name in (parameters['required'] or []) else '' -%}",
    "    {{- '  - ' + name + ' (' ~ (about['type'] or '') ~ required + '): ' -}}",
    "    {{- about['description'] or '' -}}",
    "    {%- if about['enum'] is defined and about['enum'] -%}",
    "        {{- ', should be one of [' + (about['enum'] | join(', ')) + ']' -}}",
    "    {%- endif -%}",
    "    {%- if about['items'] is defined and about['items'] is mapping and about['items'] -%}",
    "        {{- ', where each item should be ' ~ (about['items']['type'] or '') -}}",
    "    {%- endif -%}",
    r"    {{- '\n' -}}",
    "{%- endfor -%}",
    r"{{- '\n' -}}",
)


_GEMMA4_VALUES = (  # a value in the arguments of a call, and the words in their marks
    """{%- macro quoted(text) -%}{{- '<|"|>' ~ text ~ '<|"|>' -}}{%- endmacro -%}""",
    "{%- macro items(values) -%}",
    "    {%- for key in values.keys() | sort(case_sensitive=true) -%}",
    "        {{- ('' if loop.first else ',') + key + ':' + value_of(values[key]) -}}",
    "    {%- endfor -%}",
    "{%- endmacro -%}",
    "{%- macro value_of(value) -%}",
    "    {%- if value is string -%}",
    "        {{- quoted(value) -}}",
    "    {%- elif value is mapping -%}",
    "        {{- '{' + items(value) + '}' -}}",
    "    {%- elif value is iterable -%}",
    "        {{- '[' -}}",
    "        {%- for part in value -%}{{- ('' if loop.first else ',') + value_of(part) -}}{%- endfor -%}",
    "        {{- ']' -}}",
    "    {%- else -%}",
    "        {{- value | tojson -}}",
    "    {%- endif -%}",
    "{%- endmacro -%}",
    "{%- macro about(schema) -%}",
    "    {{- 'description:' + quoted(schema['description']) if schema['description'] else '' -}}",
    "    {{- ',' if schema['description'] and schema['type'] else '' -}}",
    "    {{- 'type:' + quoted(schema['type'] | string | upper) if schema['type'] else '' -}}",
    "{%- endmacro -%}",
)
_GEMMA4_TOOL = (
    f"{{%- set tool = {_BARE} -%}}",
    "{{- 'declaration:' + tool['name'] + '{description:' + quoted(tool['description'] or '') -}}",
    "{%- set parameters = tool['parameters'] -%}",
    "{%- if parameters -%}",
    "    {%- set properties, required = parameters['properties'], parameters['required'] -%}",
    "    {{- ',parameters:{' -}}",
    "    {%- if properties -%}",
    "        {{- 'properties:{' -}}",
    "        {%- for name, schema in properties.items() -%}",
    "            {{- ('' if loop.first else ',') + name + ':{' + about(schema) + '}' -}}",
    "        {%- endfor -%}",
    "        {{- '}' -}}",
    "    {%- endif -%}",
    "    {%- if required -%}",
    "        {{- (',' if properties else '') + 'required:[' -}}",
    "        {%- for name in required -%}{{- ('' if loop.first else ',') + quoted(name) -}}{%- endfor -%}",
    "        {{- ']' -}}",
    "    {%- endif -%}",
    "    {%- if parameters['type'] -%}",
    "        {{- (',' if properties or required else '') + 'type:' + quoted(parameters['type'] | string | upper) -}}",
    "    {%- endif -%}",
    "    {{- '}' -}}",
    "{%- endif -%}",
    "{%- set response = tool['response'] -%}",
    "{%- if response -%}",
    "    {%- set kind = 'OBJECT' if response['type'] | string | upper == 'OBJECT' else none -%}",
    "    {{- ',response:{' + about({'description': response['description'], 'type': kind}) + '}' -}}",
    "{%- endif -%}",
    "{{- '}' -}}",
)


def _described(tool_format: str) -> list[str]:
    """`describe(tools)` for a format.

    For formats that write each tool as JSON, the words around are found where two tools stand in what they say.
    """
    if tool_format == "phi4_mini":
        return ["{%- macro describe(tools) -%}{{- '<|tool|>' + (tools | tojson) + '<|/tool|>' -}}{%- endmacro -%}"]
    if tool_format == "gemma4":
        return [*_GEMMA4_VALUES, *_macro("", _GEMMA4_TOOL, "\n", "")]
    if tool_format in ("default", "glm4"):
        return _described_in_words(tool_format)
    tools = [
        {"type": "function", "function": {"name": name, "description": "", "parameters": {"properties": {}}}}
        for name in _NAMES
    ]
    said = tool_formats.describe_tools(tool_format, json.dumps(tools), _DAY)
    ways = [(tools, _WRAPPED)]
    ways.append(([tool["function"] for tool in tools], _BARE))
    if tool_format.startswith("seed_oss"):
        ways = [(tools, "tool")]  # as they are given
    for indent in (None, 4):
        for as_written, expression in ways:
            one, other = (tool_formats.dump(tool, indent=indent) for tool in as_written)
            before, found, rest = said.partition(one)
            between, also, behind = rest.partition(other)
            if not found or not also:
                continue
            spaces = f"(indent={indent})" if indent else ""
            return _macro(before, [f"{{{{- {expression} | tojson{spaces} -}}}}"], between, behind)
    raise NotImplementedError(f"no Jinja for the tools of {tool_format}")


def _described_in_words(tool_format: str) -> list[str]:
    """`describe(tools)` where words of a tool stand between those that are the same for all."""
    tools = [{"name": name, "parameters": {"properties": {}}} for name in _NAMES]
    said = tool_formats.describe_tools(tool_format, json.dumps(tools), _DAY)
    if tool_format == "default":
        lines = list(_WORDS)
        one, other = (f"> Tool Name: {name}\nTool Description: \nTool Args:\n\n" for name in _NAMES)
    else:
        lines = [
            f"{{%- set tool = {_BARE} -%}}",
            r"{{- '## ' + tool['name'] + '\n\n' + (tool | tojson(indent=4)) -}}",
        ]
        one, other = (f"## {tool['name']}\n\n{tool_formats.dump(tool, indent=4)}" for tool in tools)
    before, _, rest = said.partition(one)
    between, _, behind = rest.partition(other)
    return _macro(before, lines, between, behind)


def _macro(before: str, tool: Sequence[str], between: str, behind: str) -> list[str]:
    """`describe(tools)`, from the words around tools and the lines that write one."""
    day, names = f"{_DAY:%d %b %Y}", ", ".join(_NAMES)
    before, between, behind = map(quote, (before, between, behind))
    listed = names in behind
    return [
        "{%- macro describe(tools) -%}",
        *(["    {%- set names = namespace(all=[]) -%}"] if listed else []),
        "    {{- " + before.replace(day, "' + strftime_now('%d %b %Y') + '") + " -}}",
        "    {%- for tool in tools -%}",
        f"        {{{{- '' if loop.first else {between} -}}}}",
        *([f"        {{%- set names.all = names.all + [{_BARE}['name']] -%}}"] if listed else []),
        *indented(tool, 2),
        "    {%- endfor -%}",
        "    {{- " + behind.replace(names, "' + (names.all | join(', ')) + '") + " -}}",
        "{%- endmacro -%}",
    ]
