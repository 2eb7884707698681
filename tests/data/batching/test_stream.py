"""A stream: windows that follow from a position, updates that follow from their number, wherever the run was cut."""

import json
from dataclasses import dataclass, field
from io import StringIO
from itertools import islice

import numpy as np
import pytest
from rich.console import Console
from sets import segments

from jtune.commands.data import check_rows, show
from jtune.config import DataArguments, FinetuningArguments, TrainingArguments, load_config
from jtune.config.stages import rules_of
from jtune.data import StreamPlan, plan_updates
from jtune.data.pipeline import Wanted, load_datasets
from jtune.data.stream import open_stream, windows
from jtune.errors import ConfigError, DataError


def row(name, number, words=1):
    return {"instruction": f"{name} {number}", "input": "", "output": " ".join(["word"] * words)}


def write(folder, **sets):
    """A dataset_dir of JSON lines."""
    for name, rows in sets.items():
        lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    info = {name: {"file_name": f"{name}.jsonl"} for name in sets}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def two(tmp_path):
    """The sets `a`, 50 rows, and `b`, 20 rows, of lengths that differ."""
    return write(
        tmp_path,
        a=[row("a", n, 1 + 7 * n % 23) for n in range(50)],
        b=[row("b", n, 1 + 5 * n % 11) for n in range(20)],
    )


def arguments(folder, **args):
    defaults = {"dataset": ("a", "b"), "dataset_dir": str(folder), "template": "chatml", "streaming": True}
    return DataArguments(**{**defaults, "buffer_size": 16, "packing": False, "cutoff_len": 64, **args})


def stream(folder, template, stage="sft", **args):
    return open_stream(arguments(folder, **args), rules_of(stage), 3, template)[0]


def asked(template, encoded):
    """The questions, in the order of the rows."""
    texts = [template.tokenizer.decode(encoded[i]["input_ids"]) for i in range(len(encoded))]
    return [text.split("user\n")[1].split("<|im_end|>")[0] for text in texts]


MIXES = {
    "concat": {},
    "under": {"mix_strategy": "interleave_under", "interleave_probs": (0.7, 0.3)},
    "over": {"mix_strategy": "interleave_over", "interleave_probs": (0.5, 0.5)},
    "once": {"mix_strategy": "interleave_once", "max_samples": 15, "val_size": 5},
}


# ---------------------------------------------------------------------- windows


def test_a_pass_has_every_row_once_and_the_next_pass_again(two, template):
    found = list(islice(windows(stream(two, template)), 10))
    assert [len(w.encoded) for w in found] == [16, 16, 16, 16, 6] * 2
    questions = [q for w in found for q in asked(template, w.encoded)]
    assert questions[:70] == [f"a {n}" for n in range(50)] + [f"b {n}" for n in range(20)]
    assert questions[70:] == questions[:70]


@pytest.mark.parametrize("mix", MIXES)
def test_the_rows_are_those_of_the_sets_on_disk(mix, two, template):
    args = {**MIXES[mix], "val_size": 0}
    on_disk = arguments(two, **args, streaming=False)
    expected = load_datasets(on_disk, rules_of("sft"), 3, template, Wanted(True, False)).train
    one_pass = next(windows(stream(two, template, **args, buffer_size=1000)))
    assert asked(template, one_pass.encoded) == asked(template, expected)


@pytest.mark.parametrize("mix", MIXES)
def test_a_position_leads_to_the_same_windows(mix, two, template):
    make = lambda: stream(two, template, **MIXES[mix])
    whole = list(islice(windows(make()), 9))
    for k, window in enumerate(whole[:-1]):
        rest = islice(windows(make(), json.loads(json.dumps(window.end))), len(whole) - k - 1)
        for expected, found in zip(whole[k + 1 :], rest, strict=True):
            assert asked(template, found.encoded) == asked(template, expected.encoded)
            assert (found.number, found.report, found.end) == (expected.number, expected.report, expected.end)


def test_the_first_val_size_rows_are_held_out_in_every_pass(two, template):
    args = arguments(two, val_size=7)
    splits = load_datasets(args, rules_of("sft"), 3, template, Wanted(True, True))
    assert asked(template, splits.eval[""]) == [f"a {n}" for n in range(7)]
    trained = [q for w in islice(windows(splits.stream), 8) for q in asked(template, w.encoded)]
    assert len(trained) == 126
    assert not set(trained) & {f"a {n}" for n in range(7)}
    assert asked(template, splits.train) == trained[:16]


def test_an_evaluation_set_is_read_whole(two, template):
    args = arguments(two, dataset=("a",), eval_dataset=("b",))
    splits = load_datasets(args, rules_of("sft"), 3, template, Wanted(True, True))
    assert len(splits.eval[""]) == 20


# ---------------------------------------------------------------------- faults


def test_rows_left_out_are_counted_over_a_pass_and_come_back_with_a_position(template, tmp_path):
    folder = write(tmp_path, a=[row("a", n) for n in range(20)] + [row("a", n, 90) for n in range(12)])
    make = lambda most: stream(folder, template, dataset=("a",), overlong="drop", max_dropped=most, buffer_size=8)
    # Windows of 8; the third holds 4 rows that fit, the fourth none, and is not seen.
    assert [(w.number, w.report.left_out) for w in islice(windows(make(12)), 5)] == [
        *((0, 0), (1, 0), (2, 4)),
        *((4, 0), (5, 0)),  # the next pass counts from nothing: a limit means the same however long the run is
    ]
    limited = windows(make(11))
    position = [w.end for w in islice(limited, 3)][-1]
    for reader in (limited, windows(make(11), json.loads(json.dumps(position)))):
        with pytest.raises(DataError, match="12 of 32 rows are left out, and max_dropped is 11: 12 longer than"):
            next(reader)


def test_a_column_that_is_empty_stops_the_first_window_and_is_counted_later(template, tmp_path):
    lacking = {"instruction": "q", "input": "", "output": None}
    folder = write(tmp_path, a=[row("a", 0), *[lacking] * 6, *(row("a", n) for n in range(18))])
    with pytest.raises(DataError, match=r"a\.jsonl:2: nothing in column 'output'"):
        next(windows(stream(folder, template, dataset=("a",), buffer_size=10)))
    folder = write(tmp_path, a=[*(row("a", n) for n in range(18)), lacking])
    _, second = islice(windows(stream(folder, template, dataset=("a",), buffer_size=10)), 2)
    assert str(second.report.dropped[0]) == "1 nothing in column output (a.jsonl row 19)"


def test_a_fault_in_a_file_is_named_with_its_line_when_it_is_reached(template, tmp_path):
    # datasets reads megabytes at a time: the fault is in the second of them.
    rows = [row("a", n, 3000) for n in range(1500)]
    folder = write(tmp_path, a=[*rows, '{"instruction": "a", "output": '])
    reader = windows(stream(folder, template, dataset=("a",), buffer_size=16))
    assert len(next(reader).encoded) == 16
    with pytest.raises(DataError, match=r"a\.jsonl:1501: not JSON"):
        list(islice(windows(stream(folder, template, dataset=("a",), buffer_size=1500)), 2))


def test_what_a_stream_cannot_give_is_refused(two, template, tmp_path):
    info = json.loads((two / "dataset_info.json").read_text())
    info["a"]["num_samples"] = 5
    (two / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"num_samples draws from all rows.*max_samples"):
        stream(two, template)
    with pytest.raises(DataError, match="the first 99 rows are held out"):
        next(windows(stream(two, template, dataset=("b",), val_size=99)))
    with pytest.raises(DataError, match=r"has 0 rows"):
        stream(write(tmp_path, a=[]), template, dataset=("a",))


def test_a_check_reads_all_windows_and_names_every_row(template, tmp_path, capsys):
    """Also rows of windows of which nothing is left, and what is held out."""
    bad = {"instruction": "q", "input": "", "output": None}
    rows = [*(row("a", n) for n in range(20)), *[bad] * 17, *(row("a", n) for n in range(3))]
    folder = write(tmp_path, a=rows, b=[row("b", 1), bad])
    template.tokenizer.save_pretrained(tmp_path / "model")
    words = [f"model_name_or_path={tmp_path / 'model'}", "template=chatml", f"dataset_dir={folder}", "dataset=a,b"]
    words += ["stage=sft", "streaming=true", "max_steps=1", "buffer_size=8", "val_size=2"]
    assert check_rows(load_config([*words, "max_dropped=17"], command="data")) == 3
    *named, last = capsys.readouterr().out.splitlines()
    assert named == [
        *(f"a.jsonl row {n}: nothing in column output" for n in range(21, 38)),
        "b.jsonl row 2: nothing in column output",
    ]
    assert last == "train: 18 of 40 rows are left out, and max_dropped is 17"
    assert check_rows(load_config([*words, "max_dropped=18"], command="data")) == 0


# ---------------------------------------------------------------------- updates


@dataclass
class Config:
    data: DataArguments
    training: TrainingArguments
    finetuning: FinetuningArguments = field(default_factory=FinetuningArguments)


def planned(folder, template, *, shards=1, stage="sft", training=None, **args) -> StreamPlan:
    data = arguments(folder, **args)
    splits = load_datasets(data, rules_of(stage), 3, template, Wanted(True, False))
    defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 30}
    config = Config(data, TrainingArguments(**{**defaults, **(training or {})}), FinetuningArguments(stage=stage))
    made = plan_updates(config, splits.train, shards, splits.stream)
    assert isinstance(made, StreamPlan)
    return made


WAYS = {
    "unpacked": {},
    "packed": {"packing": True},
    "neat": {"packing": True, "neat_packing": True, "preprocessing_batch_size": 5},
    "blocks": {"stage": "pt", "packing": None, "cutoff_len": 32},
    "windows smaller than an update": {"buffer_size": 4},
    "small windows, packed": {"buffer_size": 6, "packing": True},
    "mixed": MIXES["over"],
}


def contents(template, arrays):
    """The texts of an update's segments, sorted: what it holds, however it lies."""
    return sorted(template.tokenizer.decode(tokens) for tokens, *_ in segments(arrays))


@pytest.mark.parametrize("way", WAYS)
def test_an_update_is_what_it_is_wherever_the_run_was_cut(way, two, template):
    plan = planned(two, template, **WAYS[way])
    whole, positions = [], []
    for step in range(12):
        positions.append(json.loads(json.dumps(plan.position(step))) if step else {})
        whole.append(plan.update(step))
    for cut in (1, 5, 11):
        again = planned(two, template, **WAYS[way])
        again.seek(positions[cut])
        assert again.position(cut) == positions[cut]
        for step in range(cut, 12):
            found = again.update(step)
            assert found.keys() == whole[step].keys()
            for key, x in found.items():
                np.testing.assert_array_equal(x, whole[step][key])


def test_every_pass_holds_each_example_once_in_another_order(two, template):
    plan = planned(two, template, training={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 7})
    found = [[template.tokenizer.decode(tokens) for tokens, *_ in segments(plan.update(step))] for step in range(20)]
    assert {len(update) for update in found} == {7}  # 70 rows: no update is short, none reaches over a pass here
    first, second = ([text for update in found[k : k + 10] for text in update] for k in (0, 10))
    assert len(set(first)) == 70
    assert sorted(first) == sorted(second)
    assert first != second
    assert [sorted(update) for update in found[:10]] != [sorted(update) for update in found[10:]]


def test_what_an_update_holds_does_not_depend_on_how_it_is_split(two, template):
    size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    one = planned(two, template, training=size | {"per_device_train_batch_size": 8})
    four = planned(two, template, shards=4, training=size)
    for step in range(12):
        whole = four.update(step)
        assert contents(template, whole) == contents(template, one.update(step))
        shape = four.shape(step)
        halves = [four.update(step, part) for part in ((0, shape.batch // 2), (shape.batch // 2, shape.batch))]
        for key, x in whole.items():
            if x.ndim:
                np.testing.assert_array_equal(np.concatenate([half[key] for half in halves], axis=1), x)
            else:
                assert halves[0][key] == halves[1][key] == x


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_are_longer_than_those_of_the_first_window_fit_all_the_same(packing, template, tmp_path):
    rows = [row("a", n) for n in range(16)] + [row("a", n, 200) for n in range(32)]
    folder = write(tmp_path, a=rows)
    plan = planned(folder, template, dataset=("a",), packing=packing, train_on_prompt=False)
    found = [plan.update(step) for step in range(8)]
    shapes = [x["input_ids"].shape for x in found]
    assert set(shapes) <= set(plan.shapes)
    assert shapes[0] != plan.shapes[-1]
    if not packing:
        assert shapes[-1] == plan.shapes[-1]
    for step, x in enumerate(found):
        assert (x["segment_ids"] > 0).sum() == plan.tokens(step)
        assert x["divisor"] == x["loss_weights"].sum()
        used = (x["segment_ids"] > 0).any(axis=(1, 2))
        assert (np.diff(used.astype(int)) <= 0).all(), "used microbatches come first"
        per_shard = x["loss_weights"].sum(axis=(1, 2)).max()
        assert per_shard <= plan.label_capacity(plan.shape(step) if step == 7 else shapes[step])


def test_only_the_windows_that_are_used_are_in_memory(two, template):
    plan = planned(
        two, template, training={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 400}
    )
    for step in range(400):
        plan.update(step)
        assert len(plan._parts) <= 3
    with pytest.raises(IndexError, match="goes forward only"):
        plan.tokens(100)


def test_the_run_is_told_what_it_is(two, template):
    plan = planned(two, template)
    assert plan.describe() == "a stream in windows of 16 rows, 30 updates"
    assert [plan.epoch_at(step) for step in (0, 15, 30)] == [0, 0.5, 1]
    plan.update(0)
    assert plan.explain(0).startswith("a.jsonl row ")
    assert plan.mean_tokens(4) == pytest.approx(plan.tokens(0), rel=0.5)


# ---------------------------------------------------------------------- what is told before training


RUN = ["model_name_or_path=m", "dataset=a", "do_train=true", "streaming=true", "output_dir=out"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "streaming needs max_steps: the updates of an epoch"),
        (
            ["max_steps=5", "val_size=0.1"],
            "val_size: 0.1 is a share of rows, but streaming does not count rows: give a number",
        ),
        (["max_steps=5", "tokenized_path=x"], "tokenized_path stores all encoded rows"),
        (["max_steps=5", "buffer_size=0"], "buffer_size must be at least 1"),
    ],
)
def test_arguments_that_a_stream_cannot_honour_are_refused(words, said):
    with pytest.raises(ConfigError) as error:
        load_config([*RUN, *words])
    assert said in str(error.value)


def test_arguments_that_say_nothing_are_noted():
    config = load_config([*RUN, "max_steps=5", "preprocessing_num_workers=4"])
    assert any("preprocessing_num_workers applies to eval_dataset only" in note for note in config.notes)
    config = load_config([*RUN[:3], "buffer_size=100", "output_dir=out"])
    assert config.notes == ("command line: buffer_size is ignored without streaming: true",)


def test_a_preview_is_of_the_first_window_and_says_so(two, template):
    data = arguments(two)
    splits = load_datasets(data, rules_of("sft"), 3, template, Wanted(True, False))
    config = Config(data, TrainingArguments(max_steps=-1))
    out = StringIO()
    show(config, splits, template, 1, Console(file=out, width=200))
    assert "streaming: only the first rows were read, buffer_size 16" in out.getvalue()
    assert "16 rows, " in out.getvalue()
    assert "on one device: a stream in windows of 16 rows; batches" in out.getvalue()
