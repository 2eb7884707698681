"""Text stays text however it is stored, and no column that is text for the model is dropped unsaid."""

import bz2
import codecs
import gzip
import json
import logging
import lzma
from dataclasses import replace

import datasets
import pyarrow as pa
import pytest

from jtune.config import DataArguments
from jtune.config.stages import rules_of
from jtune.data import load_datasets
from jtune.data.formats.align import align, align_row
from jtune.data.pipeline import Wanted
from jtune.data.sources import columns
from jtune.data.sources.columns import resolve_format
from jtune.data.sources.json_values import CHUNK, json_rows
from jtune.data.sources.load import Hub, load_table
from jtune.data.sources.registry import Columns, Entry, entry_of, find_datasets
from jtune.data.sources.rows import CELLS, say_late
from jtune.data.stream import open_stream
from jtune.errors import DataError

TEXTS = [
    "NA",
    "None",
    "null",
    "nan",
    "N/A",
    "007",
    "1.10",
    "2",
    "1e5",
    "true",
    "True",
    "2031-05-09",
    "1999-08-14T10:00Z",
]
TEXTS += ["2031-05-09 10:00:00", "123456789012345678901234567890", "-0", "a\nb", 'say "x", y', "é\x00e", " 7 "]


@pytest.fixture(autouse=True)
def said_anew():
    columns.note_once.cache_clear()
    say_late.cache_clear()


def answers(table):
    return [messages[-1]["content"] for messages in table["messages"][:]]


def read(path, stage="sft", **entry):
    found = Entry("a", "file", str(path), **({"formatting": None} | entry))
    rules = replace(rules_of("sft"), rows="prompt") if stage == "predict" else rules_of(stage)
    table = load_table(found, Hub(str(path.parent / "cache")))
    return align(table, resolve_format(found, table.column_names, rules, table[0]), stage=rules)


def streamed(path, template, **args):
    arguments = DataArguments(
        **{"dataset": (str(path),), "dataset_dir": str(path.parent), "template": "chatml", "streaming": True} | args
    )
    stream, _ = open_stream(arguments, rules_of("sft"), 0, template, hub=Hub(str(path.parent / "cache")))
    return list(stream.rows)


def write(path, rows):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        import csv

        with path.open("w", newline="") as file:
            out = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            out.writeheader()
            out.writerows(rows)
    else:
        lines = "\n".join(json.dumps(row) for row in rows)
        path.write_text(json.dumps(rows, indent=1) if path.suffix == ".json" else lines)
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson", "csv", "tsv", "parquet"])
def test_text_stays_text(suffix, template, tmp_path):
    path = write(tmp_path / f"a.{suffix}", [{"instruction": t, "input": "", "output": t} for t in TEXTS])
    for rows in (read(path)["messages"][:], [row["messages"] for row in streamed(path, template)]):
        assert [row[0]["content"] for row in rows] == [row[1]["content"] for row in rows] == TEXTS


@pytest.mark.parametrize("texts", [["2031-05-09"] * 2, ["2031-05-09 10:00:00"] * 2, ["007", "1.10"], ["None", "NA"]])
def test_columns_of_nothing_but_dates_or_digits_stay_text(texts, tmp_path):
    for suffix in ("jsonl", "csv"):
        path = write(tmp_path / f"{texts[0][:4]}.{suffix}", [{"instruction": "?", "output": t} for t in texts])
        assert answers(read(path)) == texts


def test_numbers_and_truth_values_become_their_literals(tmp_path):
    literals = ["2", "1.10", "1e5", "true", "12345678901234567890123", '"hi"', "-0.0"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"instruction": "?", "output": {literal}}}\n' for literal in literals))
    assert answers(read(path)) == ["2", "1.10", "1e5", "true", "12345678901234567890123", "hi", "-0.0"]
    typed = pa.table({"instruction": ["?", "?"], "output": pa.array([1, 2]), "input": pa.array([True, False])})
    datasets.Dataset(typed).to_parquet(tmp_path / "b.parquet")
    assert [[m["content"] for m in row] for row in read(tmp_path / "b.parquet")["messages"][:]] == [
        ["?\ntrue", "1"],
        ["?\nfalse", "2"],
    ]


def test_numbers_inside_messages_are_text_and_dates_stay(tmp_path):
    turn = lambda role, content: {"role": role, "content": content}
    rows = [{"messages": [turn("user", "2031-05-09"), turn("assistant", answer)]} for answer in ("2031-05-10", 7)]
    assert answers(read(write(tmp_path / "a.jsonl", rows))) == ["2031-05-10", "7"]


def test_a_list_is_still_no_text(tmp_path):
    rows = [{"instruction": "?", "output": answer} for answer in ("a", ["b"], {"c": 1})]
    found = read(write(tmp_path / "a.jsonl", rows))["fault"][:]
    assert found == ["", "output is not text but list", "output is not text but dict"]


def test_types_may_change_and_columns_may_come_late(template, tmp_path):
    rows = [{"instruction": "?", "input": None, "output": "a"}] * 10_500
    rows = [*rows, {"instruction": "?", "input": 7, "output": 8, "system": "S", "history": [["q", "a"]]}]
    path = write(tmp_path / "a.jsonl", rows)
    for last in (read(path)[-1], streamed(path, template)[-1]):
        assert [m["content"] for m in last["messages"]] == ["q", "a", "?\n7", "8"]
        assert last["system"] == "S"


def test_feedback_may_be_written_as_text(tmp_path):
    rows = [{"instruction": "?", "output": "a", "kto_tag": tag} for tag in ("true", "False", "1", 0, True, "maybe")]
    for suffix in ("csv", "jsonl"):
        found = read(write(tmp_path / f"a.{suffix}", rows), stage="kto")
        assert found["desirable"][:] == [True, False, True, False, True, None]
        assert found["fault"][-1] == "kto_tag is neither true nor false"


# ---------------------------------------------------------------------- columns


def test_a_file_named_directly_gives_all_its_usual_columns(tmp_path):
    row = {"instruction": "And now?", "input": "", "output": "Teal.", "system": "S", "history": [["q", "a"]]}
    [found] = read(write(tmp_path / "a.json", [row]))
    assert ([m["content"] for m in found["messages"]], found["system"]) == (["q", "a", "And now?", "Teal."], "S")
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for name in ("conversations", "messages"):  # the names in the messages tell whose form it is
        for names in (("from", "value", "human", "gpt"), ("role", "content", "user", "assistant")):
            role, content, user, assistant = names
            chat = [{role: user, content: "q"}, {role: assistant, content: "a"}]
            assert answers(read(write(tmp_path / f"{name}_{role}.jsonl", [{name: chat}]))) == ["a"]
    tools = [{"name": "now", "description": "", "parameters": {"n": {"default": 1.5}}}]
    [found] = read(write(tmp_path / "b.json", [{"conversations": turns, "system": "S", "tools": tools}]))
    assert (found["system"], json.loads(found["tools"])) == ("S", tools)


@pytest.mark.parametrize(
    ("names", "stage", "formatting", "columns"),
    [
        (["prompt", "completion"], "sft", "alpaca", {"prompt": "prompt", "response": "completion"}),
        (["question", "answer"], "sft", "alpaca", {"prompt": "question", "response": "answer"}),
        (["instruction", "output", "label"], "sft", "alpaca", {"prompt": "instruction", "kto_tag": None}),
        (["text", "question", "answer"], "pt", "alpaca", {"prompt": "text"}),
        (["content"], "pt", "alpaca", {"prompt": "content", "response": None}),
        (["input", "output"], "sft", "alpaca", {"prompt": "input", "query": None}),
        (["Instruction", "Input", "Output"], "sft", "alpaca", {"prompt": "Instruction", "query": "Input"}),
        (["instruction", "context", "response"], "sft", "alpaca", {"query": "context", "response": "response"}),
        (["query", "response"], "sft", "alpaca", {"prompt": "query", "query": None}),
        (["instruction", "query", "response"], "sft", "alpaca", {"prompt": "instruction", "query": "query"}),
        (["system_prompt", "question", "response"], "sft", "alpaca", {"system": "system_prompt"}),
        (["dialogue", "question", "answer"], "sft", "alpaca", {"prompt": "question"}),  # a text
        (["instruction", "chosen", "rejected"], "dpo", "alpaca", {"chosen": "chosen", "rejected": "rejected"}),
        (
            ["messages", "system", "tools", "label"],
            "kto",
            "openai",
            {"system": "system", "tools": "tools", "kto_tag": "label"},
        ),
    ],
)
def test_usual_names_are_known(names, stage, formatting, columns):
    found = resolve_format(Entry("a", "file", "a.json", formatting=None), names, rules_of(stage))
    assert found.formatting == formatting
    assert {key: getattr(found.columns, key) for key in columns} == columns


@pytest.mark.parametrize("name", ["conversation", "dialogue", "Messages", "chat"])
def test_a_column_of_messages_may_have_other_names(name, tmp_path):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert answers(read(write(tmp_path / "a.jsonl", [{"id": "1", name: chat}]))) == ["a"]


HISTORIES = [
    [["q", "a"]],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    [{"instruction": "q", "output": "a"}],
    [{"human": "q", "assistant": "a"}],
    '[["q", "a"]]',
]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_history_is_pairs_objects_or_messages(history, suffix, tmp_path):
    found = read(write(tmp_path / f"a.{suffix}", [{"instruction": "p", "output": "b", "history": history}] * 2))
    assert [m["content"] for m in found["messages"][0]] == ["q", "a", "p", "b"]


@pytest.mark.parametrize("history", [["q", "a"], "none", [{"role": "user", "content": "q"}], [{"x": 1}], {"a": "b"}])
def test_a_history_that_is_none_of_these_is_the_fault_of_its_row(history, tmp_path):
    rows = [{"instruction": "p", "output": "b", "history": held} for held in (None, history)]
    assert read(write(tmp_path / "a.jsonl", rows))["fault"][:] == ["", "history is not a list of [question, answer]"]


@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_a_row_without_its_text_is_counted_and_left_out(stage, template, tmp_path):
    name = "output" if stage == "sft" else "instruction"
    rows = [{"instruction": "?", "output": "a"}] * 3 + [{"instruction": "?", "output": "a"} | {name: None}]
    path = write(tmp_path / "a.jsonl", rows)
    for streaming in (False, True):
        arguments = DataArguments(dataset=(str(path),), dataset_dir=str(tmp_path), template="chatml", cutoff_len=8,
                                  packing=False, streaming=streaming)  # fmt: skip
        hub = Hub(str(tmp_path / "cache"))
        report = load_datasets(arguments, rules_of(stage), 0, template, Wanted(True, False), hub=hub).report.sets[0]
        assert [str(dropped) for dropped in report.dropped] == [
            f"1 nothing in column {name} (a.jsonl{' row ' if streaming else ':'}4)"
        ]


def test_columns_that_are_not_used_are_named_once(template, tmp_path, caplog):
    caplog.set_level(logging.INFO, "jtune")
    row = {"instruction": "?", "output": "a", "system": "S", "id": 1, "score": 0.5}
    write(tmp_path / "a.json", [row])
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "a.json"}}))
    arguments = DataArguments(dataset=("a",), dataset_dir=str(tmp_path), template="chatml")
    for _ in range(2):
        load_datasets(arguments, rules_of("sft"), 0, template, Wanted(True, False))
    said = [(r.levelname, r.getMessage()) for r in caplog.records if "not used" in r.getMessage()]
    assert said == [
        (
            "WARNING",
            "dataset 'a': 'system' is usually text for the model, but not used. To use it, say what it is in "
            'dataset_info.json: "columns": {"system": "system"}',
        ),
        ("INFO", "dataset 'a': columns not used: system, id, score"),
    ]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "jsonl.gz"])
def test_a_column_that_comes_late_and_is_not_used_is_named_once(suffix, template, tmp_path, caplog):
    caplog.set_level(logging.INFO, "jtune")
    rows = [{"instruction": "?", "output": "a"}] * CELLS + [{"instruction": "?", "output": "a", "notes": 1, "mood": 2}]
    path = write(tmp_path / f"a.{suffix.removesuffix('.gz')}", rows * 2)
    if suffix.endswith(".gz"):
        zipped = path.with_name(f"a.{suffix}")
        zipped.write_bytes(gzip.compress(path.read_bytes()))
        path = zipped
    for _ in range(2):
        assert "notes" not in load_table(Entry("a", "file", str(path)), Hub(str(tmp_path))).column_names
    place = f"{path.name} row {CELLS + 1}" if suffix == "json" else f"{path.name}:{CELLS + 1}"
    said = [r.getMessage() for r in caplog.records if "not used" in r.getMessage()]
    assert said == [f"dataset 'a': columns not used: notes, mood (first: {place})"]
    caplog.clear()
    for _ in range(2):
        streamed(path, template)
    said = [r.getMessage() for r in caplog.records if "not used" in r.getMessage()]
    assert said == [f"dataset '{path.name}': columns not used: notes, mood (first: {place})"]


def test_preferences_are_no_text_in_other_stages(tmp_path, caplog):
    caplog.set_level(logging.INFO, "jtune")
    entry = resolve_format(Entry("a", "file", "a", formatting=None), ["instruction", "output", "label", "chosen"])
    columns.say_unused(entry, ["instruction", "output", "label", "chosen"], rules_of("sft"))
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "dataset 'a': columns not used: label, chosen")
    ]


def test_what_stage_pt_leaves_of_a_conversation_is_said(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [{"instruction": "text", "output": "a", "history": [["q", "a"]]}])
    assert read(path, stage="pt")["messages"][0][0]["content"] == "text"
    chat = Entry("a", "file", "a", formatting="openai", columns=Columns(messages="messages"))
    history = Entry("b", "file", "b", columns=Columns(history="history"))
    for entry, found in ((chat, ["messages"]), (history, ["instruction", "history"]), (history, ["instruction"])):
        columns.say_unused(entry, found, rules_of("pt"))
    assert [r.getMessage() for r in caplog.records] == [
        f"dataset '{name}': stage pt learns the first message of a row only" for name in ("a", "b")
    ]


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_a_byte_order_mark_and_compression_change_nothing(suffix, tmp_path):
    rows = [{"instruction": "é", "output": "NA"}]
    content = write(tmp_path / f"a.{suffix}", rows).read_bytes()
    ways = {"": codecs.BOM_UTF8.__add__, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    for ending, way in ways.items():
        path = tmp_path / f"b.{suffix}{ending}"
        path.write_bytes(way(content))
        assert read(path)["messages"][0][0]["content"] == "é"
    path.with_suffix("").write_bytes(content.decode().encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16, expected UTF-8"):
        read(path.with_suffix(""))


def test_a_folder_may_hold_what_is_no_data(tmp_path, caplog):
    caplog.set_level(logging.INFO, "jtune")
    folder = tmp_path / "rows"
    (folder / "more").mkdir(parents=True)
    for name in ("README.md", "LICENSE", "dataset_infos.json", ".hidden.jsonl"):
        (folder / name).write_text("{}")
    write(folder / "a.jsonl", [{"instruction": "?", "output": "a"}])
    assert answers(read(folder)) == ["a"]
    assert [r.getMessage() for r in caplog.records if "not read" in r.getMessage()] == [
        f"dataset 'a': not read from {folder}: LICENSE, README.md, dataset_infos.json, more/"
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "instruction,output\na,b\na,b,c\n", ":3: 3 fields, but the header has 2 (instruction, output)"),
        ("a.csv", "instruction,output,output\na,b,c\n", ":1: column 'output' is there 2 times: name each once"),
        ("a.csv", "instruction,output\na,b,c\n", ": rows have more fields than the header, which has 2"),
        ("a.json", '{\n "data": [}', "Expected an array of rows, [{...}, ...], or a row on each line"),
        ("a.json", '{\n "data": []\n}', "has 0 rows"),
        ("a.json", '{"text": "a"}\n{"text":', ":2: not JSON: Expecting value"),
        ("a.jsonl", '{"instruction": ' + "[" * 100_000 + "]" * 100_000 + "}", ":1: not JSON: nested too deeply"),
        ("a.json", "[" * 100_000, ":1: not JSON: nested too deeply"),
        ("a.jsonl", '{"instruction": ' + "9" * 9999 + "}", ":1: not JSON: Exceeds the limit"),
        ("a.jsonl", '{"instruction": "\\ud800", "output": "a"}', r":1: '\ud800' is half a character"),
        ("a.json", '[{"instruction": "a"}\n {"instruction": "b"}]', ":2: not JSON: Expecting ',' delimiter"),
        ("a.json", '[{"instruction": "a"}', ":1: not JSON: Expecting ',' delimiter"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        read(tmp_path / name)
    assert said in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_an_array_is_read_in_parts(tmp_path):
    rows = [{"text": "é" * length} for length in (1, CHUNK, 3 * CHUNK, 0, 5)] * 2
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False))
    assert [row for _, row in json_rows(str(tmp_path / "a.json"))] == rows


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"file_name": 7}, "file_name must be text, found 7"),
        ({"file_name": "a.json", "ranking": "false"}, 'ranking is "false", expected true or false'),
        ({"file_name": "a.json", "columns": ["a"]}, 'columns is ["a"], expected an object'),
        ({"file_name": "a.json", "columns": {"prompt": 1}}, "columns: prompt is 1, expected text, or null"),
        ({"file_name": "a.json", "num_samples": "9"}, 'num_samples is "9", expected a number'),
    ],
)
def test_a_wrong_type_in_dataset_info_is_named(entry, said):
    with pytest.raises(DataError) as error:
        entry_of("a", {"a": entry})
    assert said in str(error.value)


def test_dataset_info_may_have_a_byte_order_mark_and_file_sha1(tmp_path):
    info = {"a": {"file_name": "a.json", "file_sha1": "0" * 40, "columns": None}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8-sig")
    assert find_datasets(["a"], str(tmp_path))[0].columns == Columns()


# ---------------------------------------------------------------------- predicting


def test_rows_without_an_answer_can_be_predicted_but_not_learned(template, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "?"}, {"instruction": "??", "output": "a"}])
    assert answers(read(path, stage="predict")) == ["", "a"]
    assert read(path)["fault"][:] == ["nothing in column output", ""]
    turns = {"messages": [{"role": "user", "content": "?"}]}
    openai = resolve_format(Entry("a", "file", "a", formatting=None), ["messages"])
    assert align_row(turns, openai, replace(rules_of("sft"), rows="prompt")).messages[-1] == {
        "role": "assistant",
        "content": "",
    }
    arguments = DataArguments(
        eval_dataset=(str(path),), dataset_dir=str(tmp_path), template="chatml", eval_on_each_dataset=False
    )
    wanted = Wanted(train=False, evaluate=True, predict=True)
    assert len(load_datasets(arguments, rules_of("sft"), 0, template, wanted).eval[""]) == 2


def test_an_error_is_no_cause_of_itself(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"instruction": "Say \xe9.", "output": "x"}\n')
    with pytest.raises(DataError, match="not UTF-8") as found:
        load_table(Entry("rows", "file", str(path)), Hub(str(tmp_path / "cache")))
    error, length = found.value, 0
    while error is not None and length < 100:  # who looks for what an error follows from would look for ever
        error, length = error.__cause__ or error.__context__, length + 1
    assert length < 100
