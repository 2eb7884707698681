"""From names to rows of one form: every source and format, and every fault by file, row and field."""

import json

import datasets
import numpy as np
import pytest
from sets import ALPACA, OPENAI, SHAREGPT, load, texts, write

from jtune.data.formats.align import align_row
from jtune.data.sources.columns import resolve_format
from jtune.data.sources.registry import Entry, entry_of, find_datasets
from jtune.errors import DataError

# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_files_of_every_kind_give_the_same_rows(suffix, template, tmp_path):
    write(tmp_path, f"a.{suffix}", ALPACA)
    found = texts(template, load(tmp_path, "a", template=template).train)
    assert found[3] == "<|im_start|>user\nSay 3.<|im_end|>\n<|im_start|>assistant\n3!<|im_end|>\n"
    assert len(found) == 20


def test_a_text_file_is_for_pretraining(template, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    found = load(tmp_path, "a.txt", stage="pt", packing=False, template=template, dataset_dir=str(tmp_path))
    assert texts(template, found.train)[1] == "two<|im_end|>"


def test_a_file_or_a_folder_needs_no_entry(template, tmp_path):
    (tmp_path / "rows").mkdir()
    for part in (0, 1):
        (tmp_path / "rows" / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ALPACA[part::2]))
    assert len(load(tmp_path, str(tmp_path / "rows"), template=template).train) == 20
    (tmp_path / "chat.json").write_text(json.dumps(OPENAI))
    assert "Sunny." in texts(template, load(tmp_path, str(tmp_path / "chat.json"), template=template).train)[0]


def test_a_name_of_a_file_or_folder_is_no_pattern(template, tmp_path):
    folder = tmp_path / "rows[1]*"
    folder.mkdir()
    (folder / "a{b}[c]?.json").write_text(json.dumps(ALPACA))
    assert len(load(folder, "a{b}[c]?.json", template=template).train) == 20
    assert len(load(tmp_path, str(folder), template=template).train) == 20


def test_the_format_of_a_file_without_an_entry_is_told_from_its_columns():
    bare = Entry("a", "file", "a.json", formatting=None)
    assert resolve_format(bare, ["messages", "tools"]).formatting == "openai"
    assert resolve_format(bare, ["conversations"]).formatting == "sharegpt"
    assert resolve_format(bare, ["text"]).columns.prompt == "text"
    assert resolve_format(bare, ["instruction", "output"]).formatting == "alpaca"


# ---------------------------------------------------------------------- formats


def test_alpaca_with_history_system_and_other_columns():
    info = {"a": {"file_name": "a.json", "columns": {"prompt": "q", "response": "r", "history": "h", "system": "s"}}}
    row = {"q": "Q", "r": "A", "h": [["q0", "a0"]], "s": "S"}
    made = align_row(row, entry_of("a", info))
    assert [(m["role"], m["content"]) for m in made.messages] == [
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "Q"),
        ("assistant", "A"),
    ]
    assert made.system == "S"


def test_sharegpt_and_openai_say_the_same():
    sharegpt = align_row(SHAREGPT[0], Entry("a", "file", "a", formatting="sharegpt"))
    columns = {"messages": "conversations", "system": "system", "tools": "tools"}
    info = {"a": {"file_name": "a", "formatting": "sharegpt", "columns": columns}}
    with_tools = align_row(SHAREGPT[0], entry_of("a", info))
    openai = align_row(OPENAI[0], entry_of("b", {"b": {"file_name": "b", "formatting": "openai"}}))
    roles = ["user", "function", "observation", "assistant"]
    for made in (sharegpt, with_tools, openai):
        assert [m["role"] for m in made.messages] == roles
    assert with_tools.system == openai.system == "Be kind."
    assert json.loads(with_tools.tools)[0]["name"] == "now"
    assert json.loads(openai.messages[1]["content"])[0]["name"] == "now"


def test_rows_that_cannot_be_learned_from_are_counted_and_named(template, tmp_path):
    turn = lambda role, text: {"from": role, "value": text}
    conversations = [
        [turn("human", "a"), turn("gpt", "b")],
        [turn("gpt", "a"), turn("human", "b")],
        [turn("human", "a"), turn("robot", "b")],
        [turn("human", "a")],
    ]
    write(tmp_path, "a.json", [{"conversations": c} for c in conversations], {"formatting": "sharegpt"})
    report = load(tmp_path, "a", template=template, max_dropped=3).report.sets[0]
    assert (report.read, report.encoded) == (4, 1)
    said = report.sentence()
    for word in ("role out of turn", "unknown role 'robot'", "does not end with an answer", "a.json row 2"):
        assert word in said
    with pytest.raises(DataError, match="3 of 4 rows are left out, and max_dropped is 0\\.5: 1 role out of turn"):
        load(tmp_path, "a", template=template)


# ---------------------------------------------------------------------- mixing and splitting


def test_max_samples_takes_the_first_rows(template, tmp_path):
    write(tmp_path, "a.json", ALPACA)
    assert "Say 4." in texts(template, load(tmp_path, "a", template=template, max_samples=5).train)[-1]


def test_several_sets_follow_each_other(template, tmp_path):
    write(tmp_path, "a.json", ALPACA)
    write(tmp_path, "b.json", SHAREGPT, {"formatting": "sharegpt"})
    assert len(load(tmp_path, "a", "b", template=template).train) == 21


@pytest.mark.parametrize("size", [4, 0.2])
def test_val_size_holds_out_the_rows_that_datasets_would(size, template, tmp_path):
    write(tmp_path, "a.json", ALPACA)
    found = load(tmp_path, "a", template=template, val_size=size, evaluate=True, seed=7)
    expected = datasets.Dataset.from_list(ALPACA).train_test_split(test_size=size, seed=7)
    assert [t.split("\n")[1] for t in texts(template, found.eval[""])] == [
        row["instruction"] + "<|im_end|>" for row in expected["test"]
    ]
    assert len(found.train) == 16


def test_each_evaluation_set_may_have_its_own_loss(template, tmp_path):
    write(tmp_path, "a.json", ALPACA)
    write(tmp_path, "b.json", ALPACA[:3])
    args = {"eval_dataset": ("a", "b"), "evaluate": True, "template": template}
    assert {k: len(v) for k, v in load(tmp_path, "a", **args).eval.items()} == {"": 23}
    each = load(tmp_path, "a", **args, eval_on_each_dataset=True)
    assert {k: len(v) for k, v in each.eval.items()} == {"a": 20, "b": 3}


# ---------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("name", "content", "info", "words"),
    [
        ("a.json", '[{"instruction": "a",\n]', None, ["a.json:2", "not JSON"]),
        ("a.jsonl", ALPACA, {"file_name": "b.jsonl"}, ["no file", "a.jsonl"]),
        ("a.json", [], None, ["0 rows"]),
        ("a.json", [{"question": "a", "output": "b"}], None, ["no column 'instruction'", "question, output"]),
        (
            "a.json",
            [{"instruction": "a"}, *ALPACA[:1], *[{"instruction": "a", "output": None}] * 2],
            None,
            ["a.json row 1: nothing in column 'output' (3 of 4 rows have none)"],
        ),
        ("a.json", ALPACA, {"formatting": "alpacca"}, ["'alpacca'", "alpaca, sharegpt"]),
        ("a.json", ALPACA, {"column": {}}, ["'column'", "columns"]),
        ("a.json", ALPACA, {"columns": {"promt": "instruction"}}, ["'promt'", "prompt"]),
        ("a.json", ALPACA, {"ranking": True}, ["preferences", "dpo"]),
        (
            "a.json",
            ALPACA,
            {"columns": {"prompt": "instruction", "response": "output", "images": "images"}},
            ["no column 'images'"],
        ),
        ("a.json", ALPACA, {"file_name": None, "script_url": "make.py"}, ["script"]),
        ("a.xyz", "{}", None, ["a.xyz", "json"]),
    ],
)
def test_a_fault_is_named_with_its_place(name, content, info, words, template, tmp_path):
    if name.endswith(".jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in content))
        (tmp_path / "dataset_info.json").write_text(json.dumps({"a": info}))
    else:
        write(tmp_path, name, content, info)
        index = tmp_path / "dataset_info.json"
        entries = json.loads(index.read_text())
        index.write_text(json.dumps({"a": {k: v for k, v in entries["a"].items() if v is not None}}))
    with pytest.raises(DataError) as error:
        load(tmp_path, "a", template=template)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_a_name_that_is_none_has_a_nearest(tmp_path):
    write(tmp_path, "alpaca.json", ALPACA)
    with pytest.raises(DataError, match="Did you mean alpaca"):
        find_datasets(["alpacca"], str(tmp_path))
    with pytest.raises(DataError, match=r"There is no dataset_info\.json"):
        find_datasets(["alpaca"], str(tmp_path / "nowhere"))


def test_names_with_a_slash_are_on_the_hub(tmp_path):
    entry = find_datasets(["owner/name"], str(tmp_path))[0]
    assert (entry.source, entry.path) == ("hub", "owner/name")
    info = {"a": {"hf_hub_url": "owner/name", "subset": "x", "split": "test", "num_samples": 5}}
    entry = entry_of("a", info)
    assert (entry.source, entry.path, entry.subset, entry.split, entry.num_samples) == (
        "hub",
        "owner/name",
        "x",
        "test",
        5,
    )


def test_num_samples_draws_as_llamafactory_does(template, tmp_path):
    """A permutation of the rows, then the first so many; with more than there are, rows are repeated at random."""
    write(tmp_path, "a.json", ALPACA, {"num_samples": 30})
    assert len(load(tmp_path, "a", template=template).train) == 30
    write(tmp_path, "a.json", ALPACA, {"num_samples": 5})
    drawn = texts(template, load(tmp_path, "a", template=template, seed=3).train)
    order = np.random.RandomState(3).permutation(20)[:5]
    assert [f"Say {n}." in text for n, text in zip(order, drawn)] == [True] * 5
