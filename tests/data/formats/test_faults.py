"""What is wrong with data is said before anything is computed: the exact message, for each fault that users meet."""

import json

import pytest
from sets import ALPACA, load, texts, write

from jtune.commands.data import check_rows
from jtune.config import load_config
from jtune.data import get_template
from jtune.errors import DataError
from jtune.quickstart.make_model import make_tokenizer

TURN = {"human": "Hi", "gpt": "Hello", "observation": "sun", "function_call": '{"name": "f", "arguments": {}}'}


def said(template, folder, **args):
    with pytest.raises(DataError) as error:
        load(folder, "a", template=template, **args)
    return str(error.value)


def lines(folder, name, *rows):
    (folder / name).write_bytes(b"".join(row + b"\n" for row in rows))
    (folder / "dataset_info.json").write_text(json.dumps({"a": {"file_name": name}}))
    return folder / name


def chat(*roles):
    return {"conversations": [{"from": role, "value": TURN.get(role, "x")} for role in roles]}


GOOD = b'{"instruction": "Say 1.", "output": "1"}'


def test_a_row_that_is_not_json(template, tmp_path):
    path = lines(tmp_path, "a.jsonl", GOOD, b'{"instruction": "Say 2.", "output": "2', GOOD)
    assert said(template, tmp_path) == (
        f'{path}:2: not JSON: Unterminated string starting at: {{"instruction": "Say 2.", "output": "2'
    )


def test_bytes_that_are_not_utf8(template, tmp_path):
    path = lines(tmp_path, "a.jsonl", GOOD, b'{"instruction": "Say \xe9.", "output": "2"}')
    assert said(template, tmp_path) == (
        f"{path}:2: not UTF-8 at byte 22 of the line: "
        f"""b'{{"instruction": "Say \\xe9.", "output": "2"}}\\n'. If it is Latin-1: iconv -f latin1 -t utf8 {path}"""
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "dataset 'a' ({path}) has 0 rows: the file is empty"),
        ("a.json", "[]", "dataset 'a' ({path}) has 0 rows"),
        (
            "a.json",
            json.dumps([chat("human"), chat("gpt", "human")]),
            "train: nothing is left of 2 rows: 1 the conversation does not end with an answer (a.json row 1), "
            "1 role out of turn (gpt as a question) (a.json row 2)",
        ),
    ],
)
def test_nothing_to_learn_from(name, content, message, template, tmp_path):
    info = {"formatting": "sharegpt"} if "from" in content else None
    write(tmp_path, name, ALPACA if name.endswith("l") else content, info)
    (tmp_path / name).write_text(content)
    assert said(template, tmp_path) == message.format(path=tmp_path / name).replace("gpt as", "assistant as")


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["gpt", "human"], "role out of turn (assistant as a question)"),
        (["human", "human"], "role out of turn (user as an answer)"),
        (["human", "robot"], "unknown role 'robot' (known are human, gpt, observation, function_call, system)"),
        (["human", "gpt", "human"], "the conversation does not end with an answer"),
        (["human", "system"], "role out of turn (system as an answer)"),
    ],
)
def test_roles_out_of_turn_are_counted_and_named_by_line(roles, reason, template, tmp_path):
    rows = [chat("human", "gpt"), chat(*roles), chat("human", "gpt")]
    write(tmp_path, "a.jsonl", rows, {"formatting": "sharegpt"})
    report = load(tmp_path, "a", template=template).report.sets[0]
    assert report.sentence().endswith(f"left out: 1 {reason} (a.jsonl:2)")
    assert (report.read, report.kept) == (3, 2)
    assert said(template, tmp_path, max_dropped=0) == (
        f"train: 1 of 3 rows are left out, and max_dropped is 0: 1 {reason} (a.jsonl:2). "
        "`jtune data CASE.yaml --check` names them all"
    )


def test_a_column_that_is_not_there(template, tmp_path):
    path = lines(tmp_path, "a.jsonl", b'{"question": "Say 1.", "output": "1"}')
    assert said(template, tmp_path) == (
        f"dataset 'a' ({path}), row 1: no column 'instruction' for the prompt. Its columns are question, output. In "
        'dataset_info.json, say which one it is: "columns": {"prompt": "question"}'
    )
    lines(tmp_path, "a.jsonl", GOOD, *[b'{"instruction": "Say 1."}'] * 2)
    assert said(template, tmp_path) == (
        "a.jsonl:2: nothing in column 'output' (2 of 3 rows have none). Fill it in, or name the right column in "
        "dataset_info.json"
    )
    lines(tmp_path, "a.jsonl", GOOD)  # a column that may be missing is missed by nobody
    assert len(load(tmp_path, "a", template=template).train) == 1


def test_a_file_outside_the_folder_is_only_read_when_that_is_allowed(template, tmp_path):
    (tmp_path / "data").mkdir()
    lines(tmp_path, "a.jsonl", GOOD)
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "../a.jsonl"}}))
    assert said(template, tmp_path / "data") == (
        f"{tmp_path}/data/dataset_info.json, entry 'a': file_name '../a.jsonl' lies outside {tmp_path}/data. Move the "
        "file into dataset_dir and give file_name, name its path in `dataset:`, or set allow_outside_dataset_dir: true"
    )
    assert len(load(tmp_path / "data", "a", template=template, allow_outside_dataset_dir=True).train) == 1


def test_rows_that_are_too_long(template, tmp_path):
    turns = [chat("human", "gpt", "human", "gpt", "human", "gpt"), chat("human", "gpt")]
    write(tmp_path, "a.jsonl", turns, {"formatting": "sharegpt"})
    short, long = (len(row) for row in reversed(load(tmp_path, "a", template=template).train.rows["input_ids"][:]))
    cut = long - 2
    policy = lambda overlong: load(tmp_path, "a", template=template, cutoff_len=cut, overlong=overlong)
    assert policy("truncate").report.sets[0].cut == 1
    assert policy("truncate").train.lengths.tolist() == [cut, short]
    assert policy("drop").train.lengths.tolist() == [short]
    assert f"left out: 1 longer than cutoff_len {cut} (a.jsonl:1)" in policy("drop").report.sets[0].sentence()
    split = policy("split").train
    assert len(split) == 3
    assert sum(text.count("Hello") for text in texts(template, split)) == 4
    assert all(text.startswith("<|im_start|>user") for text in texts(template, split))
    with pytest.raises(DataError) as error:
        policy("error")
    assert str(error.value) == (
        f"train: 1 longer than cutoff_len {cut} (a.jsonl:1). Raise it, or say what is to become of them: overlong: "
        "truncate, drop or split"
    )
    assert said(template, tmp_path, cutoff_len=2) == (
        "train: nothing is left of 2 rows: 2 nothing to learn (no token of an answer is left) (a.jsonl:1, a.jsonl:2). "
        "Is cutoff_len 2 too small?"
    )


def test_texts_that_are_too_long(template, tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five six\nseven\n")
    text = {"template": template, "stage": "pt", "packing": False}
    whole = load(tmp_path, "a.txt", **text).train.lengths
    cut = int(whole[0]) - 1
    policy = lambda overlong: load(tmp_path, "a.txt", **text, cutoff_len=cut, overlong=overlong)
    assert policy("truncate").report.sets[0].cut == 1
    assert policy("split").train.lengths.sum() == whole.sum() - 1  # one token alone predicts nothing
    assert policy("drop").train.lengths.tolist() == [whole[1]]
    assert f"1 longer than cutoff_len {cut} (a.txt row 1)" in policy("drop").report.sets[0].sentence()


def test_a_chat_template_that_gives_no_mask():
    tokenizer = make_tokenizer(["a b c"])
    tokenizer.chat_template = "{% for m in messages[-1:] %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError) as error:
        get_template(None, tokenizer)
    assert str(error.value) == (
        "no sound loss mask can be had from the tokenizer's own chat template: the chat template rewrites earlier "
        "turns. Set `template` to the format of the model"
    )


def test_no_pad_token():
    tokenizer = make_tokenizer(["a b c"])
    tokenizer.pad_token = None
    get_template("empty", tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token  # rows are never padded with it: segment 0 is padding


def test_a_check_names_every_row_and_ends_with_3_past_the_limit(template, tmp_path, capsys):
    template.tokenizer.save_pretrained(tmp_path / "model")
    rows = [chat("human", "gpt")] * 4 + [chat("human"), chat("robot", "gpt")] * 4
    write(tmp_path, "a.jsonl", rows, {"formatting": "sharegpt"})
    words = [f"model_name_or_path={tmp_path / 'model'}", "template=chatml", "dataset=a", f"dataset_dir={tmp_path}"]
    assert check_rows(load_config(words, command="data")) == 3
    printed = capsys.readouterr().out.splitlines()
    assert "a.jsonl:5: the conversation does not end with an answer" in printed
    assert sum(line.startswith("a.jsonl:") for line in printed) == 8
    assert printed[-1] == "train: 8 of 12 rows are left out, and max_dropped is 0.5"
    assert check_rows(load_config([*words, "max_dropped=8"], command="data")) == 0


def test_sets_in_tokenized_path_are_read_again_and_only_with_the_same_settings(template, tmp_path):
    write(tmp_path, "a.jsonl", [{"instruction": "Say 1.", "output": "1"}, {"instruction": "Say 2.", "output": "2"}])
    made = load(tmp_path, "a", template=template, tokenized_path=str(tmp_path / "t"))
    (tmp_path / "a.jsonl").unlink()
    again = load(tmp_path, "a", template=template, tokenized_path=str(tmp_path / "t"))
    assert texts(template, again.train) == texts(template, made.train)
    assert again.report == made.report
    assert said(template, tmp_path, tokenized_path=str(tmp_path / "t"), cutoff_len=99) == (
        f"tokenized_path {tmp_path / 't'} was made with other settings: cutoff_len (2048 then, 99 now). Set them back, "
        "or give another folder"
    )
    (tmp_path / "t" / "jtune_data.json").rename(tmp_path / "t" / "other.json")
    assert "was not written by jtune" in said(template, tmp_path, tokenized_path=str(tmp_path / "t"))
