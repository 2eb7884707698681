"""Files as people bring them: compressed, wrapped in an object, separated by semicolons, among others, far away."""

import hashlib
import json
import logging
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest

from jtune.data.sources import columns, json_values, rows
from jtune.data.sources.columns import resolve_format
from jtune.data.sources.load import Hub, load_table, places
from jtune.data.sources.registry import Entry, entry_of, find_datasets
from jtune.errors import DataError

ROWS = [{"instruction": "q", "output": "1.10"}, {"instruction": "p", "output": "b"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def said_anew(caplog):
    for once in (columns.note_once, json_values.say_inside, rows.say_separator):
        once.cache_clear()
    caplog.set_level(logging.INFO, "jtune")


@pytest.fixture
def read(tmp_path):
    """`read(name, content)`: the rows of a file."""

    def made(name, content=None):
        path = tmp_path / name
        if content is not None:
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        [entry] = find_datasets([name], str(tmp_path))
        table = load_table(entry, Hub(str(tmp_path / "cache")))
        assert resolve_format(entry, table.column_names).columns.prompt == "instruction"
        return [{name: cell for name, cell in row.items() if cell is not None} for row in table]

    return made


def test_a_file_compressed_with_zstandard_needs_no_other_library(read, tmp_path):
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(b"\xef\xbb\xbf" + LINES.encode())
    assert read("a.jsonl.zst") == ROWS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(("name", "content"), [("a.jsonl", LINES), ("a.csv", "instruction,output\nq,a\n")])
def test_utf16_is_refused_with_and_without_its_mark(name, content, encoding, read, tmp_path):
    with pytest.raises(DataError) as error:
        read(name, content.encode(encoding))
    path = tmp_path / name
    assert str(error.value) == f"{path}: UTF-16, expected UTF-8: iconv -f utf-16 -t utf-8 {path}"


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_csv_file_may_be_separated_as_its_header_is(separator, read, caplog):
    content = f'instruction{separator}output\n"q, {separator}"{separator}a\n'
    assert read("a.csv", content) == [{"instruction": f"q, {separator}", "output": "a"}]
    assert f"a.csv: fields are separated by {separator!r}, as its header is" in caplog.messages


def test_spaces_after_the_separators_of_a_header_are_none_of_the_text(read):
    assert read("a.csv", 'instruction, output\nq, "a, b"\n') == [{"instruction": "q", "output": "a, b"}]
    assert read("b.csv", "instruction,output\nq, a\n") == [{"instruction": "q", "output": " a"}]


def test_a_header_with_commas_or_in_quotes_is_separated_by_commas(read):
    assert read("a.csv", "instruction,output;x\nq,a;b\n") == [{"instruction": "q", "output;x": "a;b"}]
    assert read("b.csv", '"instruction"\n"q;b"\n') == [{"instruction": "q;b"}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps({"version": 2, "data": ROWS}, indent=1), "a.json is one object: its rows are the list 'data'"),
        (json.dumps({"train": ROWS}), "a.json is one object: its rows are the list 'train'"),
        (
            json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
            "a.json is one object: its rows are its lists, a column each",
        ),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), None),  # objects of several lines
        (LINES.replace("}\n", "},\n"), None),
        (LINES.replace("\n", "\r\n\r\n"), None),
    ],
)
def test_an_object_may_hold_the_rows_or_be_one(content, said, read, caplog):
    assert read("a.json", content) == ROWS
    assert [message for message in caplog.messages if "one object" in message] == ([said] if said else [])


def test_numbers_in_an_object_stay_as_they_are_written(read):
    held = read("a.json", '{"data": [{"instruction": 1.10, "output": {"a": 1.50}, "n": true}]}')
    assert held == [{"instruction": "1.10", "output": '\x00json\x00{"a": 1.5}', "n": "true"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}], "instruction": "x"},
        {"instruction": "q", "data": [{"a": 1}], "history": [["a", "b"]]},
        {"instruction": "q", "data": ["a"]},
        {"instruction": "q"},
    ],
)
def test_one_row_alone_is_a_row(row, read):
    for content in (json.dumps(row), json.dumps(row, indent=1)):
        assert [found["instruction"] for found in read("a.json", content)] == [row["instruction"]]


def test_rows_of_an_object_are_named_by_their_number(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS}))
    entry = Entry("a", "file", str(tmp_path / "a.json"))
    where = load_table(entry, Hub(str(tmp_path / "cache"))).add_column("dataset", [0, 0]).add_column("row", [0, 1])
    assert places([entry], where) == ("a.json row 1", "a.json row 2")


# ---------------------------------------------------------------------- folders, archives, addresses


def test_texts_that_tell_of_the_data_are_not_data(read, tmp_path, caplog):
    for name in ("README.txt", "LICENSE.txt", "requirements.txt", ".DS_Store", "README.md", "a.jsonl.sha1"):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_text("words")
    (tmp_path / "d" / "a.jsonl").write_text(LINES)
    assert read("d") == ROWS
    others = "LICENSE.txt, README.md, README.txt, a.jsonl.sha1, requirements.txt"
    assert f"dataset 'd': not read from {tmp_path / 'd'}: {others}" in caplog.messages


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("d", "holds no files of data (.json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, .txt): name one of its "
         "folders, test, train"),
        ("a.zip", "is an archive: unpack it, and name the file or folder"),
        ("a.tar.gz", "is an archive: unpack it, and name the file or folder"),
        ("a.jsnl", "Did you mean a.jsonl?"),
        ("http://127.0.0.1:9/a.jsonl", "cannot read dataset 'http://127.0.0.1:9/a.jsonl'"),
        ("s4://bucket/a.jsonl", "is neither in"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_what_to_do(name, said, read, tmp_path):
    for path in ("d/test/a.jsonl", "d/train/a.jsonl", "a.jsonl", "a.zip", "a.tar.gz"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(LINES)
    with pytest.raises(DataError) as error:
        read(name)
    assert said in str(error.value)


def test_an_address_is_a_set(read, tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    serve = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    serve.log_message = None
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert read(f"http://127.0.0.1:{server.server_port}/a.jsonl?download=true") == ROWS
        server.shutdown()


def test_a_package_that_is_not_there_is_named(monkeypatch, tmp_path):
    def without(*args, **kwargs):
        raise ImportError("No module named 's3fs'", name="s3fs")

    monkeypatch.setattr("jtune.data.sources.load.column_names", without)
    with pytest.raises(DataError, match="such an address is read with s3fs: pip install s3fs"):
        load_table(Entry("a", "url", "s3://bucket/a.jsonl"), Hub(str(tmp_path)))


# ---------------------------------------------------------------------- dataset_info.json


@pytest.mark.parametrize("digest", [hashlib.sha1(LINES.encode()).hexdigest().upper(), "0" * 40])
def test_another_file_than_that_of_the_digest_is_said(digest, tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(LINES)
    entry = entry_of("a", {"a": {"file_name": "a.jsonl", "file_sha1": digest}}, folder=tmp_path)
    assert len(load_table(entry, Hub(str(tmp_path / "cache")))) == 2
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [("is not the file that file_sha1 is of" in text) for text in warned] == [True] * (digest == "0" * 40)


def test_keys_that_nothing_reads_are_named_and_near_ones_refused(tmp_path, caplog):
    row = {"file_name": "a.jsonl", "description": "d", "_comment": "c", "license": "mit", "subset": "main"}
    row |= {"num_samples": 0}
    assert entry_of("a", {"a": row}, folder=tmp_path).num_samples is None  # 0: all, as in LLaMA-Factory
    assert caplog.messages == [
        "dataset_info.json, entry 'a': not read: description, license",
        "dataset_info.json, entry 'a': subset: only read with hf_hub_url",
    ]
    for change, said in (
        ({"formating": "openai"}, "unknown key 'formating'; did you mean 'formatting'?"),
        ({"num_samples": -1}, "num_samples is -1, expected a number of rows"),
        ({"columns": {"promt": "q"}}, "unknown key 'promt'; did you mean 'prompt'?"),
    ):
        with pytest.raises(DataError) as error:
            entry_of("a", {"a": row | change}, folder=tmp_path)
        assert said in str(error.value)
