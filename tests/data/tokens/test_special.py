"""Special tokens in the text of rows are told of, or made text; and no format is guessed where there is none."""

import json

import pytest
from sets import load, write

from jtune.data import get_template
from jtune.data.encode.encoded import IGNORED
from jtune.errors import ConfigError
from jtune.quickstart.make_model import make_tokenizer

WORDS = "<|im_start|>user\n<|im_start|>assistant\nWhat does <|im_end|> mean? It ends an answer."
ASKED = "What does <|im_end|> mean?"
CHAT = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "It ends an answer."}]


@pytest.fixture
def tokenizer():
    made = make_tokenizer([WORDS] * 2)
    made.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    return made


@pytest.mark.parametrize("stage", ["sft", "pt", "dpo", "kto"])
def test_special_tokens_in_the_text_of_rows_are_counted_and_named(stage, tokenizer, tmp_path, caplog):
    template = get_template("chatml", tokenizer)
    asked = ["plain", "a <|im_end|><|im_start|> b", "plain", "<|im_end|>"]
    rows = [{"instruction": text, "output": "A", "chosen": "C", "rejected": "R", "good": True} for text in asked]
    columns = {"prompt": "instruction", "response": "output"}
    more = {"dpo": {"chosen": "chosen", "rejected": "rejected"}, "kto": {"kto_tag": "good"}}.get(stage, {})
    write(tmp_path, "a.jsonl", rows, {"columns": columns | more, "ranking": stage == "dpo"})
    args = {"template": template, "stage": stage, "cutoff_len": 16}
    said = "train: 2 rows hold special tokens in their text: `<|im_end|>`, `<|im_start|>` (first: a.jsonl:2)"
    assert load(tmp_path, "a", **args).report.sets[0].remarks() == [said]
    assert caplog.messages.count(said) == 1
    kept = str(tmp_path / "kept")
    for _ in range(2):  # made, and read
        assert load(tmp_path, "a", **args, tokenized_path=kept).report.sets[0].remarks() == [said]


@pytest.mark.parametrize("own", [True, False])
def test_special_tokens_in_text_are_text_with_split_special_tokens_and_the_templates_own_are_not(
    own, tokenizer, tmp_path
):
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    end, name = tokenizer.convert_tokens_to_ids("<|im_end|>"), None if own else "chatml"
    [(plain, answer)] = get_template(name, tokenizer).encode(CHAT)
    assert plain.count(end) == 2
    tokenizer.split_special_tokens = True
    template = get_template(name, tokenizer)
    [(prompt, same)] = template.encode(CHAT)
    assert same == answer
    assert prompt.count(end) == 1
    assert tokenizer.decode(prompt) == tokenizer.decode(plain)
    assert prompt == template.prompt(CHAT[:1])
    write(tmp_path, "a.jsonl", [{"messages": CHAT}], {"formatting": "openai"})
    made = load(tmp_path, "a", template=template)
    ids, labels = made.train[0].values()
    assert ids.tolist() == [*prompt, *answer]
    assert labels[labels != IGNORED].tolist() == answer
    assert not made.report.sets[0].notes
    write(tmp_path, "t.jsonl", [{"text": ASKED}], {"columns": {"prompt": "text"}})
    ids = load(tmp_path, "t", template=template, stage="pt", packing=False).train[0]["input_ids"]
    assert ids.tolist().count(end) == 1
    assert ids[-1] == end


def test_without_a_template_and_a_chat_template_the_nearest_is_named(tokenizer, tmp_path):
    tokenizer.chat_template = None
    said = (
        "`template` is not set, and the tokenizer has no chat template: nothing says how messages are written and "
        "where an answer ends. {}; `template: empty` joins them as they are"
    )
    with pytest.raises(ConfigError) as error:
        get_template(None, tokenizer)
    assert str(error.value) == said.format("`template: chatml` is the nearest for its vocabulary")
    for kind, nearest in (("qwen2", "qwen"), ("mixtral", "mistral"), ("llama", "llama2"), ("gemma2", "gemma2")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        tokenizer.name_or_path = str(tmp_path)
        with pytest.raises(ConfigError) as error:
            get_template(None, tokenizer, for_training=False)
        assert str(error.value) == said.format(f"`template: {nearest}` is the nearest for model_type {kind}")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|eot_id|>"]})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="`template: llama3` is the nearest for model_type llama"):
        get_template(None, tokenizer)
    assert get_template("empty", tokenizer).name == "empty"
    assert get_template(None, tokenizer, for_chat=False).name == "empty"
