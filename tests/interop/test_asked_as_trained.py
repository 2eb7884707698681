"""Programs that render the chat template of a written folder get the ids that the model was trained on."""

import json
from functools import partial

import pytest
import yaml
from small import add_words, rows
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jtune.config import load_config
from jtune.data import get_template
from jtune.data.templates.table import TABLE
from jtune.interop import endings
from jtune.quickstart.make_model import make_tokenizer

# The last word of what opens an answer, or the first of a message, is one token with what is beside it.
MERGED = {"belle", "breeze", "ernie_nothink", "xverse"}
PARAMETERS = [
    {"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}}, "required": ["city"]},
    {"type": "object", "properties": {"days": {"type": "array", "items": {"type": "integer"}, "description": "é"}}},
    None,
]
TOOLS = [
    {"type": "function", "function": {"name": f"f{i}", "description": "It's", **({"parameters": x} if x else {})}}
    for i, x in enumerate(PARAMETERS)
]
SYSTEM = {"role": "system", "content": "Be kind.\n'{%'"}
ASK, TELL = {"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": 'It\'s "2".'}
RESULT = {"role": "tool", "content": '{"weather": "dry"}'}


def call(*arguments, **message):
    functions = [{"name": f"f{i}", "arguments": x} for i, x in enumerate(arguments)]
    calls = [{"type": "function", "function": x} for x in functions]
    return {"role": "assistant", "content": "", "tool_calls": calls, **message}


ONE = call({"city": "Rome", "b": [1, {"b": "é", "C": None}], "e": True})
TWO = call({"city": "Rome"}, {})
THINK = {"reasoning_content": "\nhm\n"}
PLAIN = {
    "plain": [ASK, TELL],
    "two turns": [ASK, TELL, {"role": "user", "content": "And \\ {{ 2 }}?\n"}, TELL],
    "system": [SYSTEM, ASK, TELL, ASK, TELL],
}
CALLS = {
    "a call": [SYSTEM, ASK, ONE, RESULT, TELL],
    "parallel calls": [ASK, TWO, RESULT, RESULT, TELL, ASK, TELL],
    "text and a call": [ASK, ONE | {"content": "I look."}, RESULT, TELL],
    "the call is the answer": [ASK, ONE],
    "thoughts and a call": [ASK, ONE | THINK, RESULT, TELL | THINK],
    "thoughts, text, and calls": [ASK, TWO | THINK | {"content": "I look."}, RESULT, RESULT, TELL],
}


@pytest.fixture(scope="module")
def words():
    return make_tokenizer([" ".join(row.values()) for row in rows(50)]).backend_tokenizer.to_str()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "export.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "x", "export_dir": "y", "template": "qwen"}))
    return load_config([str(path)], command="export")


def chats(name):
    """What it is, messages, tools, and what the chat template is told of thinking."""
    form = TABLE[name]
    for what, messages in (PLAIN | CALLS).items():
        tools = TOOLS if what in CALLS else None
        if form.tool_format == "glm4" and "calls" in what:
            continue  # it has no parallel calls
        yield what, messages, tools, {}
    if form.thinking:
        inline = TELL | {"content": f"{form.thought[0]}so{form.thought[1]}A"}
        for thinks in (True, False):
            for what, messages in (
                ("no thoughts", PLAIN["system"]),
                ("thoughts", [ASK, TELL | THINK, ASK, TELL | THINK]),
                ("thoughts in the text", [ASK, inline, ASK, inline | {"reasoning_content": "so"}]),
                ("a call", CALLS["thoughts and a call"]),
            ):
                tools = TOOLS if what == "a call" else None
                yield f"{what}, enable_thinking={thinks}", messages, tools, {"enable_thinking": thinks}


def names():
    """Each format once; those that differ from another only in words are slow."""
    kinds = {}
    for form, name in {form: name for name, form in TABLE.items()}.items():
        kind = (form.tool_format, form.thinking, form.system_in_user, form.function is None, name in MERGED and name)
        yield pytest.param(name, marks=() if kinds.setdefault(kind, name) == name else pytest.mark.slow)


@pytest.mark.parametrize("name", names())
def test_a_folder_gives_the_ids_that_are_trained_on(name, words, config, tmp_path):
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(words), **special)
    add_words(tokenizer, TABLE[name])
    template = get_template(name, tokenizer)
    found = endings.resolve_endings(config, template, tokenizer, {"vocab_size": len(tokenizer)}, tmp_path)
    assert found.source["eos_token_id"] == tokenizer.eos_token_id
    endings.write_tokenizer(tmp_path, tokenizer)
    written = AutoTokenizer.from_pretrained(tmp_path)
    assert (written.eos_token_id, (tmp_path / "chat_template.jinja").exists()) == (tokenizer.eos_token_id, True)
    for what, messages, tools, options in chats(name):
        template = get_template(name, tokenizer, **options)
        apply = partial(written.apply_chat_template, tools=tools, tokenize=True, return_dict=False, **options)
        system, turns = (messages[0]["content"], messages[1:]) if messages[0] is SYSTEM else (None, messages)
        given = json.dumps(tools, ensure_ascii=False) if tools else None
        whole = [i for turn in template.encode(turns, system, given) for part in turn for i in part]
        pairs = [
            (apply(messages), whole),
            (apply(messages[:-1], add_generation_prompt=True), template.prompt(turns[:-1], system, given)),
        ]
        for ids, expected in pairs:
            assert tokenizer.decode(ids) == tokenizer.decode(expected), what
            assert ids == expected or name in MERGED, what
