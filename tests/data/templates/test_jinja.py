"""The Jinja text of a chat format renders what the format writes: the ids that a model was trained on.

tests/interop/test_asked_as_trained.py asks the same of every template, as others do: of a folder that was written.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small import add_words, rows
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jtune.data import get_template
from jtune.data.templates import chat_template
from jtune.data.templates.jinja import to_jinja
from jtune.data.templates.jinja_tools import CALLS
from jtune.data.templates.table import TABLE
from jtune.data.templates.tools import FORMATS
from jtune.errors import DataError
from jtune.interop.probes import other_ids, probes
from jtune.quickstart.make_model import make_tokenizer

TOOLS = json.loads(Path(__file__).with_name("llamafactory_templates.json").read_text())["conversations"]["tools"]
WEATHER = [
    {"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}}, "required": ["city"]},
    {"type": "object", "properties": {"days": {"type": "array", "items": {"type": "integer"}}}},
]


def chat(*texts, system=None):
    opening = [{"role": "system", "content": system}] if system else []
    return opening + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CHATS = (
    chat("Hi", "Hello"),
    chat("What is 1 + 1?", 'It\'s "2".', "And \\ {{ 2 }}?\n", "Two."),
    chat("Hi", "Hello", "x", "y", system="Be kind.\n'{%'"),
    chat("Q", "<think>\nhm\n</think>\n\nA", "R", "<think>\nso\n</think>\n\nB", system="S"),
)


@pytest.fixture(scope="module")
def words():
    return make_tokenizer([" ".join(row.values()) for row in rows(50)]).backend_tokenizer.to_str()


def tokenizer_for(name, words, **names):
    """A tokenizer that has, as special tokens, the words in brackets of a format."""
    names = names or {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(words), **names)
    add_words(tokenizer, TABLE[name])
    return tokenizer


def ids_of(tokenizer, messages, text, **options):
    written = tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, **options)
    return tokenizer(written, add_special_tokens=False)["input_ids"]


def parts(messages):
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    return messages[bool(system) :], system


def check(template, text, messages):
    """A whole conversation, and its prompt, rendered as `template` writes them."""
    tokenizer, (turns, system) = template.tokenizer, parts(messages)
    whole = [i for turn in template.encode(turns, system) for part in turn for i in part]
    pairs = [
        (ids_of(tokenizer, messages, text), whole),
        (ids_of(tokenizer, messages[:-1], text, add_generation_prompt=True), template.prompt(turns[:-1], system)),
    ]
    for found, expected in pairs:
        assert tokenizer.decode(found) == tokenizer.decode(expected)
        assert found == expected


def openai_form(message):
    [made] = chat_template.original(message, {"tool_calls"})
    return made


@pytest.mark.parametrize("name", sorted(name for name, form in TABLE.items() if form.tool_format in CALLS))
def test_tools_and_calls_are_rendered_as_they_are_trained_on(name, words):
    tokenizer = tokenizer_for(name, words)
    template, text = get_template(name, tokenizer), to_jinja(TABLE[name], tokenizer)
    messages = [{"role": role, "content": content} for role, content in TOOLS["messages"]]
    if TABLE[name].tool_format == "glm4":
        messages = messages[:4]  # it has no parallel calls
    openai = [{"role": "system", "content": TOOLS["system"]}, *map(openai_form, messages)]
    two = [{"name": f"f{i}", "description": "It's", "parameters": schema} for i, schema in enumerate(WEATHER)]
    forms = [
        {"type": "function", **two[0]},
        {"function": two[1]},
        {"type": "function", "function": two[0], "strict": True},
    ]
    for tools in (json.loads(TOOLS["tools"]), two, forms):
        expected = template.encode(messages, TOOLS["system"], json.dumps(tools, ensure_ascii=False))
        found = tokenizer.apply_chat_template(openai, chat_template=text, tools=tools, tokenize=False)
        assert found == "".join(tokenizer.decode(part) for turn in expected for part in turn)


@pytest.mark.parametrize("tool_format", sorted(FORMATS.keys() & CALLS.keys()))
def test_every_tool_format_writes_calls_in_jinja_as_in_training(tool_format, words):
    tokenizer = tokenizer_for("qwen", words)
    template = get_template("qwen", tokenizer, tool_format=tool_format)
    call = {"name": "f", "arguments": {"a": "x", "b": [1, {"c": "é"}], "d": None, "e": True}}
    messages = [{"role": "user", "content": "Q"}, {"role": "function", "content": json.dumps(call)}]
    found = tokenizer.apply_chat_template(
        [openai_form(message) for message in messages],
        chat_template=to_jinja(template.form, tokenizer),
        tokenize=False,
    )
    assert found == "".join(tokenizer.decode(part) for turn in template.encode(messages) for part in turn)


def test_tools_that_were_learned_in_another_way_raise_and_plain_chats_do_not(words):
    tokenizer = tokenizer_for("qwen", words)
    text = to_jinja(TABLE["qwen"], tokenizer, tools=False)
    assert FORMATS.keys() == CALLS.keys()
    tokenizer.apply_chat_template(CHATS[0], chat_template=text, tokenize=False)
    with pytest.raises(Exception, match="renders no tools: they were learned in another way"):
        tokenizer.apply_chat_template(CHATS[0], chat_template=text, tools=[WEATHER[0]], tokenize=False)


def test_results_of_parallel_calls_become_one_message_as_in_rows(words):
    tokenizer = tokenizer_for("qwen", words)
    template = get_template("qwen", tokenizer)
    calls = [{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]
    joined = [
        {"role": "user", "content": "Q"},
        {"role": "function", "content": json.dumps(calls)},
        {"role": "observation", "content": "1\n</tool_response>\n<tool_response>\n2"},
    ]
    openai = [*map(openai_form, joined[:2]), *({"role": "tool", "content": text} for text in "12")]
    found = ids_of(tokenizer, openai, to_jinja(TABLE["qwen"], tokenizer), add_generation_prompt=True)
    assert tokenizer.decode(found) == tokenizer.decode(template.prompt(joined))


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "glm4_7", "gpt_oss"])
def test_thoughts_are_rendered_as_the_stage_renders_them(name, preserve, last_only, words):
    """With mask_history earlier thoughts are taken out; preferences leave earlier answers without an empty one, too."""
    tokenizer, how = tokenizer_for(name, words), {"discard_history": not preserve, "last_only": last_only}
    opening, closing = TABLE[name].thought
    template = get_template(name, tokenizer, preserve_thinking=preserve)
    text = to_jinja(template.form, tokenizer, **how)
    answers = [f"{opening}a{closing}A", "B", f"{opening}{opening}c{closing}{closing}C", f"x{closing}D", "E"]
    messages = chat(*(text for answer in answers for text in ("Q", answer)))
    pieces = [piece for turn in template.render(messages, **how) for part in turn for piece in part]
    assert ids_of(tokenizer, messages, text) == template.tokenise([pieces]).lists()[0]
    asked = ids_of(tokenizer, messages[:-1], text, add_generation_prompt=True)
    assert asked == template.prompt(messages[:-1])


def test_what_asks_without_thoughts_is_rendered_so_unless_told_otherwise(words):
    tokenizer = tokenizer_for("qwen3", words)
    plain, thinking = (get_template("qwen3", tokenizer, enable_thinking=x) for x in (False, True))
    text = to_jinja(plain.form, tokenizer)
    ask = lambda **options: ids_of(tokenizer, chat("Q"), text, add_generation_prompt=True, **options)
    assert ask() == plain.prompt(chat("Q"))
    assert ask(enable_thinking=True) == thinking.prompt(chat("Q"))
    apart = [{**chat("Q", "A")[1], "reasoning_content": "hm"}]
    assert ids_of(tokenizer, [*chat("Q"), *apart], text, enable_thinking=True) == ids_of(
        tokenizer, chat("Q", "<think>\nhm\n</think>\n\nA"), text, enable_thinking=True
    )


@pytest.mark.parametrize("messages", [chat("a", "b")[1:], [*chat("a"), *chat("b")], [*chat("a", "b"), {"role": "x"}]])
def test_what_is_no_conversation_is_refused(messages, words):
    tokenizer = tokenizer_for("chatml", words)
    with pytest.raises(Exception, match=r"must alternate|unknown role"):
        tokenizer.apply_chat_template(messages, chat_template=to_jinja(TABLE["chatml"], tokenizer), tokenize=False)


@pytest.mark.parametrize("glue", ["first", "always", "prepend"])
@pytest.mark.parametrize(
    "name", ["llama2", "mistral", "gemma", "vicuna", "zephyr", "alpaca", "default", "chatglm3", "empty", "mimo"]
)
def test_a_space_that_the_tokenizer_puts_before_each_text_is_rendered(name, glue):
    whole = Tokenizer(models.BPE(unk_token="<unk>"))
    if glue == "prepend":
        whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        whole.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=glue)
    texts = [" ".join(row.values()) for row in rows(50)]
    special = ["<unk>", "<s>", "</s>"]
    whole.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    tokenizer = tokenizer_for(name, whole.to_str(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    template = get_template(name, tokenizer)
    for messages in (*CHATS[:1], *CHATS[2:3], chat(" Hi", " Hello", " x", " y")):
        check(template, to_jinja(template.form, tokenizer, glue=glue), messages)
    for probe in probes(template, {}):  # with tools and thoughts, too
        assert other_ids(template, to_jinja(template.form, tokenizer, glue=glue), probe) is None, probe.what
    if name == "vicuna":
        with pytest.raises(AssertionError):
            check(template, to_jinja(template.form, tokenizer), CHATS[0])


def test_an_answer_ends_with_the_first_special_token_behind_it(words):
    tokenizer = tokenizer_for("phi", words)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    template = get_template(None, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert (template.end_id, template.eos_id) == (end, tokenizer.eos_token_id)
    assert set(template.stop_ids) == {end, tokenizer.eos_token_id}


def test_options_that_a_format_was_changed_by_are_rendered(words):
    tokenizer = tokenizer_for("qwen", words)
    template = get_template("qwen", tokenizer, default_system='It\'s\ta \\n "test"\r\n你好')
    assert template.form == replace(TABLE["qwen"], default_system='It\'s\ta \\n "test"\r\n你好')
    for messages in CHATS:
        check(template, to_jinja(template.form, tokenizer), messages)
    with pytest.raises(DataError):
        get_template("chatglm3", tokenizer).encode(CHATS[0])
