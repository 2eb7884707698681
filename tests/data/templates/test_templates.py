"""Chats are written as LLaMA-Factory 0.9.5 writes them: llamafactory_templates.json holds what it made of three.

Templates that it has no more are written as 0.9.3 writes them: older_templates.json.
"""

import json
from datetime import date
from pathlib import Path

import pytest
from small import add_words, rows
from tokenizers.pre_tokenizers import ByteLevel

from jtune.data import get_template
from jtune.data.templates.table import TABLE
from jtune.errors import ConfigError
from jtune.quickstart.make_model import make_tokenizer

RECORDED = json.loads(Path(__file__).with_name("llamafactory_templates.json").read_text())
OLDER = json.loads(Path(__file__).with_name("older_templates.json").read_text())
DAY = date(2026, 11, 24)  # on which they were recorded


@pytest.fixture(scope="module")
def trained():
    return make_tokenizer([" ".join(row.values()) for row in rows(50)]).backend_tokenizer.to_str()


@pytest.fixture
def tokenizer(trained):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained), **names)


def messages(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize("name", TABLE)
def test_chats_are_written_as_llamafactory_writes_them(name, tokenizer):
    if name in OLDER:
        add_words(tokenizer, TABLE[name])
    template = get_template(name, tokenizer, date=DAY)
    for kind, expected in (RECORDED["templates"] | OLDER)[name].items():
        chat = RECORDED["conversations"][kind]
        turns = template.encode(messages(chat["messages"]), chat["system"] or None, chat["tools"] or None)
        assert [[tokenizer.decode(prompt), tokenizer.decode(answer)] for prompt, answer in turns] == expected, kind


def test_gigatoken_gives_the_same_ids_or_is_not_used(tokenizer, caplog):
    pytest.importorskip("gigatoken")
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # one that gigatoken knows
    chat = messages([("user", "naïve 你好\n\n"), ("assistant", " <|im_end|> 12345 e\u0301")])
    plain, fast = (get_template("qwen", tokenizer, backend=name) for name in ("huggingface", "gigatoken"))
    assert fast.encode(chat) == plain.encode(chat)
    assert fast._fast is not None
    assert not caplog.messages
    tokenizer.split_special_tokens = True  # which gigatoken does not know
    assert get_template("qwen", tokenizer, backend="gigatoken")._fast is None
    assert "gives other ids" in caplog.text


def test_the_tokenizers_own_chat_template_is_the_default(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = messages([("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")])
    turns = get_template(None, tokenizer).encode(chat)
    text = [(tokenizer.decode(prompt), tokenizer.decode(answer)) for prompt, answer in turns]
    assert text == [("<user>1<|eot_id|><assistant>", "2<|eot_id|>"), ("<user>3<|eot_id|><assistant>", "4<|eot_id|>")]


def test_a_named_template_that_is_not_the_models_own_is_told(tokenizer, caplog):
    chatml = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.chat_template = chatml
    with caplog.at_level("INFO", logger="jtune"):
        get_template("chatml", tokenizer)
        assert "model's own" not in caplog.text
        get_template("phi", tokenizer)
    assert caplog.messages[-1] == (
        "template phi is not the model's own chat template: it writes '<|user|>\\nWhat is 1 + 1?<|end|>\\n<|assi', and "
        "the model's own '<|im_start|>user\\nWhat is 1 + 1?<|im_e'"
    )


def test_stop_words_become_special_and_may_replace_eos(tokenizer):
    template = get_template("qwen", tokenizer)
    assert tokenizer.eos_token == "<|im_end|>"
    assert template.stop_ids == (tokenizer.eos_token_id,)
    before = len(tokenizer)
    get_template("qwen", tokenizer)
    assert len(tokenizer) == before


def test_a_template_of_another_name_is_an_error_with_the_nearest(tokenizer):
    with pytest.raises(ConfigError, match="did you mean llama3"):
        get_template("lama3", tokenizer)
    with pytest.raises(ConfigError, match="tool_format 'qwenn'"):
        get_template("llama3", tokenizer, tool_format="qwenn")


def test_options_of_the_system_message_and_of_thinking(tokenizer):
    text = lambda template, chat: "".join(tokenizer.decode(part) for turn in template.encode(chat) for part in turn)
    chat = messages([("user", "Q"), ("assistant", "A")])
    assert "Be kind." in text(get_template("chatml", tokenizer, default_system="Be kind."), chat)
    assert "You are" not in text(get_template("qwen", tokenizer, default_system=""), chat)
    joined = lambda turns: [tokenizer.decode(part) for turn in turns for part in turn]
    on = joined(get_template("qwen3", tokenizer, enable_thinking=True).encode(chat))
    off = joined(get_template("qwen3", tokenizer, enable_thinking=False).encode(chat))
    assert "<think>" in on[1]
    assert "<think>" in off[0]
    assert "<think>" not in off[1]
