"""Rows in parts: the same rows and files whoever makes them, each once, and none that is half there."""

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from sets import load, write

from jtune.config.stages import rules_of
from jtune.data.cache.shards import Sharing, make_in_shards
from jtune.data.formats.align import _align_batch, _align_rows
from jtune.data.formats.alpaca import alpaca_table
from jtune.data.formats.fields import ALIGNED
from jtune.data.sources.registry import Columns, Entry
from jtune.distributed import exchange
from jtune.errors import DataError

NUMBERS = datasets.Features({"n": datasets.Value("int64")})
ROWS = [{"instruction": f"Say {n}.", "input": "", "output": "! " * (n % 7)} for n in range(53)]


class Pair:
    """One of two hosts that share all folders, as threads."""

    is_partial = False

    def __init__(self, place, meeting, counted):
        self.place, self.meeting, self.counted = place, meeting, counted

    def first(self, what, work):
        if self.place:
            self.meeting.wait()
        result = work()
        if not self.place:
            self.meeting.wait()
        return result

    def share(self, what, sign, work):
        self.counted.setdefault(what, []).append(work(self.place, 2, lambda: None))
        self.meeting.wait()
        return [1, 1]


def both(work):
    """`work(group_of)` of two hosts at a time, and how many rows each of them has made, by what it did."""
    counted, meeting = {}, threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: work(lambda folder: Pair(i, meeting, counted)), range(2)))
    return found, counted


def numbers(start, stop):
    return pa.table({"n": np.arange(start, stop)}, NUMBERS.arrow_schema)


def stuck(start, stop):
    raise DataError(f"rows {start} to {stop}")


def killed(start, stop):
    os._exit(9)


@pytest.fixture
def table(tmp_path):
    datasets.Dataset.from_dict({"x": list(range(95))}).save_to_disk(tmp_path / "rows")
    return datasets.load_from_disk(tmp_path / "rows")


def made(table, make=numbers, **options):
    named = {name: options.pop(name) for name in ("name", "batched_for") if name in options}
    sharing = Sharing(**{"batch_size": 10, **options})
    return make_in_shards(make, table, NUMBERS, sharing, what="Counting", **{"name": "x", **named})


def test_workers_are_forked_also_where_python_starts_others_by_default(table, monkeypatch):
    """As Python 3.14 does: a worker then is a child of a server of its own, and gets what can be pickled only."""
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_default_context", multiprocessing.get_context("forkserver")
    )
    assert made(table, num_proc=2)["n"][:] == list(range(95))


@pytest.mark.parametrize("workers", [None, 2])
def test_all_rows_are_there_in_their_order_and_are_made_once(workers, table):
    assert made(table, num_proc=workers)["n"][:] == list(range(95))
    again = made(table, make=stuck, num_proc=3)
    assert again["n"][:] == list(range(95))
    assert again._fingerprint == made(table)._fingerprint != made(table, batch_size=20)._fingerprint
    with pytest.raises(DataError, match="rows "):
        made(table, make=stuck, num_proc=workers, overwrite=True)
    for worker in multiprocessing.active_children():  # the error is not kept back until others have ended their part
        worker.join(60)
    assert not list(Path(table.cache_files[0]["filename"]).parent.glob(".*")), "nothing half written is left"


def test_a_worker_that_is_killed_is_an_error(table):
    with pytest.raises(DataError, match="one of 2 workers was killed"):
        made(table, make=killed, num_proc=2)


def test_what_was_cut_short_goes_on_where_it_was(table):
    def until_60(start, stop):
        return numbers(start, stop) if start < 60 else stuck(start, stop)

    def from_60(start, stop):
        return numbers(start, stop) if start >= 60 else stuck(start, stop)

    with pytest.raises(DataError, match="rows 60 to 70"):
        made(table, make=until_60)
    assert made(table, make=from_60)["n"][:] == list(range(95))


def test_a_damaged_part_is_named(table):
    part = made(table).cache_files[3]["filename"]
    with open(part, "r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"00003-of-00010\.arrow is damaged.*overwrite_cache"):
        made(table)
    assert made(table, overwrite=True)["n"][:] == list(range(95))


def test_no_rows_are_no_parts(table):
    assert len(made(table.select([]))) == 0


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("stage", ["sft", "pt", "kto"])
def test_two_hosts_make_the_rows_of_one_each_its_share(stage, kept, template, tmp_path, monkeypatch):
    """Also where rows depend on their batch: blocks of stage pt are joined batch by batch."""
    info = {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"}} if stage == "kto" else None
    write(tmp_path, "a.jsonl", [row | {"good": True} for row in ROWS] if info else ROWS, info)
    args = {"stage": stage, "template": template, "preprocessing_batch_size": 10, "val_size": 0.2, "evaluate": True}
    args |= {"cutoff_len": 24 if stage == "pt" else 60, "overlong": "truncate"}
    cache = lambda name: monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / name)
    where = lambda name: {"tokenized_path": str(tmp_path / name)} if kept else {}
    monkeypatch.setattr("jtune.data.formats.align.BATCH", 10)

    cache("cache-1")
    one = load(tmp_path, "a", **args, **where("kept-1"))
    cache("cache-2")
    pair, counted = both(lambda group_of: load(tmp_path, "a", **args, **where("kept-2"), group_of=group_of))
    assert counted.keys() == {"Aligning a", "Encoding"}
    assert sorted(counted["Aligning a"]) == [23, 30]
    assert sorted(counted["Encoding"]) == [1, 10, 20, 22]  # of 42 rows, and of the 11 that are held out
    again, counted = both(lambda group_of: load(tmp_path, "a", **args, **where("kept-2"), group_of=group_of))
    assert not any(sum(counts) for counts in counted.values()), "all is there"
    later = load(tmp_path, "a", **args, **where("kept-2"))
    for two in (*pair, *again, later):
        assert two.report == one.report
        assert two.train.table._fingerprint == one.train.table._fingerprint
        for a, b in ((one.train, two.train), (one.eval[""], two.eval[""])):
            assert len(a) == len(b) > 0
            assert all(np.array_equal(a[i][key], b[i][key]) for i in range(len(a)) for key in a[i])


def test_tokenized_path_goes_on_where_it_was_cut_short_and_keeps_nothing_else(template, tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl", ROWS)
    args = {"template": template, "preprocessing_batch_size": 10, "tokenized_path": str(tmp_path / "kept")}
    args |= {"cutoff_len": 27, "overlong": "drop"}
    with pytest.raises(DataError, match="max_dropped"):  # encoded, but not good enough
        load(tmp_path, "a", **args | {"cutoff_len": 26}, max_dropped=1)
    first = set(os.listdir(tmp_path / "kept" / "parts"))
    with pytest.raises(DataError, match="max_dropped"):
        load(tmp_path, "a", **args, max_dropped=1)
    with monkeypatch.context() as patch:
        patch.setattr("jtune.data.templates.template.Template.tokenise", lambda *_: pytest.fail("encoded again"))
        load(tmp_path, "a", **args)
    parts = set(os.listdir(tmp_path / "kept" / "parts"))
    assert len(first) == len(parts) == 6
    assert not first & parts


# ---------------------------------------------------------------------- alignment of many rows at once


@pytest.mark.parametrize("stage", ["sft", "pt"])
@pytest.mark.parametrize(
    "columns",
    [{}, {"prompt": None}, {"query": None}, {"prompt": "input", "query": "instruction"}, {"system": "s", "tools": "t"}],
)
def test_texts_are_aligned_at_once_as_each_row_is(columns, stage):
    random, names = np.random.default_rng(0), ("instruction", "input", "output", "s", "t")
    values = [None, "", "x", "é\n ", "more words"]
    rows = [{name: values[random.integers(5)] for name in names} for _ in range(200)]
    table = datasets.Dataset.from_list(rows, features=datasets.Features(dict.fromkeys(names, datasets.Value("string"))))
    how = {"entry": Entry("a", "file", "a.json", columns=Columns(**columns)), "stage": rules_of(stage), "index": 3}
    picked = random.permutation(1000)[:200]
    arrow = table.with_format("arrow")
    assert alpaca_table(arrow[:], how["entry"], how["stage"]) is not None
    for rows in (None, picked):
        at_once = _align_rows(table, arrow, 20, 90, rows=rows, **how)
        one_by_one = _align_batch(table[20:90], range(20, 90), rows=rows, **how)
        at_once.validate(full=True)
        assert at_once.equals(pa.Table.from_pydict(one_by_one, schema=ALIGNED.arrow_schema))
        assert 0 < sum(map(bool, one_by_one["fault"])) < 70 or stage == "pt"


@pytest.mark.parametrize("value", [3, ["x"], True])
def test_what_is_no_text_is_looked_at_row_by_row(value):
    table = datasets.Dataset.from_list([{"instruction": "q", "output": value}])
    assert alpaca_table(table.with_format("arrow")[:], Entry("a", "file", "a.json"), rules_of("sft")) is None
    made = _align_rows(
        table,
        table.with_format("arrow"),
        0,
        1,
        rows=None,
        entry=Entry("a", "file", "a.json"),
        stage=rules_of("sft"),
        index=0,
    )
    assert made["fault"].to_pylist() == ["output is not text but list" if isinstance(value, list) else ""]


# ---------------------------------------------------------------------- who shares a folder


def test_processes_that_see_a_mark_of_another_are_with_it():
    assert exchange.connected([[0, 1], [1], [2]]) == [(0, 1), (0, 1), (2,)]
    assert exchange.connected([[0], [1, 2], [2, 3], [3]]) == [(0,), (1, 2, 3), (1, 2, 3), (1, 2, 3)]
    assert exchange.connected([[0, 3], [1, 2], [2], [3, 2]]) == [(0, 1, 2, 3)] * 4
