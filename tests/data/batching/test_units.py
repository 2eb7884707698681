"""Units in a plan: a pair is one item of two segments, in LLaMA-Factory's microbatches, wherever its rows lie."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from sets import write

from jtune.config import DataArguments, FinetuningArguments, TrainingArguments
from jtune.config.stages import rules_of
from jtune.data import eval_batches, load_datasets, plan_updates, units_of
from jtune.data.batching.shapes import Shape
from jtune.data.batching.train import Order, Size, plan_batches
from jtune.data.batching.units import Segments, UnitSet, array_shapes, grouped, segments_of, unit_arrays
from jtune.data.pipeline import Wanted

PROMPT = 3


class Answers:
    """A stand-in for one side of encoded rows: a prompt, and an answer that is labelled; tokens tell row and side."""

    def __init__(self, lengths, first=1, **columns):
        self.lengths = np.asarray(lengths, np.int32)
        self.labelled = self.lengths - PROMPT
        self.first_labelled = np.zeros_like(self.lengths)
        self.first, self.columns = first, columns

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        ids = np.full(self.lengths[i], self.first + i, np.int32)
        return {"input_ids": ids, "labels": np.where(np.arange(len(ids)) < PROMPT, -100, ids).astype(np.int32)}

    def column(self, name):
        return self.columns.get(name)


def lengths(count, seed):
    return np.random.default_rng(seed).integers(PROMPT + 1, 60, count)


def pairs(count=43, **options):
    """Unit i has tokens 1 + i and 1001 + i."""
    margins = {"margin": np.arange(count, dtype=np.float32)}
    return UnitSet((Answers(lengths(count, 0), **margins), Answers(lengths(count, 1), 1001)), **options)


def feedback(count=43):
    """Unit i has token 1 + i, and mismatched 2001 + i."""
    tags = {"kto_tags": (np.arange(count) % 3 > 0).astype(np.float32)}
    others = UnitSet((Answers(lengths(count, 2), 2001, **tags),))
    return UnitSet((Answers(lengths(count, 0), **tags),), mismatched=others)


def planned(units, *, per_device=2, shards=1, accumulation=3, **order):
    how = {"seed": 7, "shuffle": True, "num_epochs": 2, **order}
    return plan_batches(units, Size(per_device, shards, accumulation), Order(**how), packing=False, cutoff_len=64)


def found_units(batch, firsts, prefix=""):
    """Every unit of an update by plain loops: number -> (group, share, microbatch, fields of its slot)."""
    batch = {k.removeprefix(prefix): x for k, x in batch.items() if k.startswith(prefix) and x.ndim}
    width, sides = batch["counts"].shape[2:]
    fields = {k: batch[k] for k in ("counts", "margin", "wanted", "reference") if k in batch}
    found, used = {}, np.zeros(batch["share"].shape, bool)
    for m in range(len(batch["input_ids"])):
        tokens = {}  # of each segment of the microbatch
        for row in range(batch["input_ids"].shape[1]):
            ids, segment, weights = (batch[k][m, row] for k in ("input_ids", "segment_ids", "loss_weights"))
            assert (np.diff(segment[segment > 0]) >= 0).all()
            for k in range(segment.max()):
                (where,) = np.nonzero(segment == k + 1)
                assert len(set(ids[where])) == 1, "a segment of several answers"
                assert (np.diff(where) == 1).all()
                assert (batch["positions"][m, row][where] == np.arange(len(where))).all()
                owner = int(batch["owner"][m, row, k])
                assert owner not in tokens
                tokens[owner] = int(ids[where[0]]), int((weights[where] != 0).sum())
        assert len(tokens) % sides == 0, "half a unit"
        for owner in (owner for owner in tokens if owner % sides == 0):
            at = m, *divmod(owner // sides, width)
            segments = [tokens[owner + side] for side in range(sides)]
            numbers = {token - first for (token, _), first in zip(segments, firsts, strict=True)}
            assert len(numbers) == 1, "the segments of a unit are not those of its slot"
            assert [count for _, count in segments] == batch["counts"][at].tolist()
            (number,) = numbers
            assert number not in found
            found[number] = int(batch["group"][at]), float(batch["share"][at]), m, {k: x[at] for k, x in fields.items()}
            used[at] = True
    assert not batch["share"][~used].any()
    assert not any(x[~used].any() for x in fields.values())
    return found


# ---------------------------------------------------------------------- sets and arrays


def test_a_pair_is_as_long_as_its_answers_together():
    units = pairs(5)
    first, second = units.sides
    np.testing.assert_array_equal(units.lengths, first.lengths + second.lengths)
    np.testing.assert_array_equal(units.counts, np.stack([first.labelled, second.labelled], 1))
    np.testing.assert_array_equal(units.labelled, units.counts.sum(1))
    assert [int(s["input_ids"][0]) for s in units.segments(3)] == [4, 1004]
    assert units.fields.keys() == {"counts", "margin"}
    assert feedback(5).fields.keys() == {"counts", "wanted"}


def test_of_scores_the_last_token_counts_and_no_other():
    units = pairs(9, scores=True)
    assert (units.counts == 1).all()
    assert (units.labelled == 2).all()
    for segment in units.segments(4):
        assert segment["weights"].tolist() == [0] * (len(segment["input_ids"]) - 1) + [1]
    plan = planned(units)
    batch = plan.update(0)
    last = np.diff(batch["segment_ids"], axis=-1, append=0) != 0
    np.testing.assert_array_equal(batch["loss_weights"], (last & (batch["segment_ids"] > 0)).astype(np.float32))
    assert len(found_units(batch, (1, 1001))) == 6


def test_tokens_beyond_the_shorter_answer_weigh_alpha():
    """LD-DPO: of both answers the first so many tokens count whole, as many as the shorter one has."""
    units = pairs(20, beyond=0.25)
    for i in range(20):
        counts = units.counts[i].astype(int)
        for segment, count in zip(units.segments(i), counts, strict=True):
            weights = np.append(np.zeros(PROMPT - 1), [1] * counts.min() + [0.25] * (count - counts.min()))
            np.testing.assert_array_equal(segment["weights"], np.append(weights, 0))
    batch, plain = planned(units).update(0), planned(pairs(20)).update(0)
    assert set(np.unique(batch["loss_weights"])) == {0, 0.25, 1}
    np.testing.assert_array_equal(batch["loss_weights"] > 0, plain["loss_weights"] > 0)
    np.testing.assert_array_equal(batch["counts"], plain["counts"])
    free = planned(pairs(20, beyond=0.0))  # what has no weight still counts towards the length of an answer
    np.testing.assert_array_equal(free.update(0)["counts"], plain["counts"])


def test_groups_are_in_order_and_the_last_may_be_smaller():
    group, share = grouped(7, 3)
    assert group.tolist() == [0, 0, 0, 1, 1, 1, 2]
    np.testing.assert_allclose(share, [1 / 3] * 6 + [1])
    assert [len(x) for x in grouped(0, 3)] == [0, 0]


def test_fields_of_units_lie_beside_their_first_segments_and_segments_know_their_units():
    slots = np.array([[2, 2], [0, 1], [2, 0], [0, 0], [0, 5]])  # two microbatches of three rows
    laid = unit_arrays({"x": np.arange(1, 6), "y": np.arange(10).reshape(5, 2)}, slots, Shape(2, 3, 8), (3, 5))
    assert laid["x"].tolist() == [[2, 4, 5], [0] * 3, [1, 3, 0], *[[0] * 3] * 3]
    assert laid["y"][2].tolist() == [[0, 1], [4, 5], [0, 0]]
    # Of slot k of row r the sides are (3 r + k) * 2 and one more.
    assert laid["owner"].tolist() == [
        [0, 15, 2, 3, 4],
        [1, 0, 0, 0, 0],
        [12, 13, 14, 0, 0],
        *[[0] * 5] * 2,
        [5, *[0] * 4],
    ]
    empty = unit_arrays({"x": np.zeros(0)}, np.zeros((0, 1), np.int64), Shape(1, 2, 8), (1, 1))
    assert empty["x"].tolist() == empty["owner"].tolist() == [[0], [0]]


def test_segments_are_the_units_one_side_after_the_other():
    units = pairs(6)
    line = Segments(units)
    assert len(line) == 12
    assert [int(line.segment(k)["input_ids"][0]) for k in range(4)] == [1, 1001, 2, 1002]
    assert line.lengths[:2].tolist() == [int(side.lengths[0]) for side in units.sides]
    np.testing.assert_array_equal(line.labelled.reshape(6, 2), units.counts)
    first, second = units.sides
    first.rejected = second  # as an `Encoded` has it
    assert len(segments_of(first, rules_of("dpo"))) == 12
    assert units_of(first, rules_of("sft")) is first


def test_an_evaluation_weighs_and_finds_every_segment_once():
    line = Segments(pairs(11, scores=True))
    plan = eval_batches(line, stage=rules_of("rm"), per_device_batch_size=2, batch_shards=2, cutoff_len=64)
    seen = np.zeros(len(line), int)
    for batch in plan:
        weighted = batch.arrays["loss_weights"] > 0
        np.add.at(seen, batch.indices[batch.example[weighted]], 1)
    assert (seen == 1).all()


# ---------------------------------------------------------------------- plans


@pytest.mark.parametrize(
    "size",
    [{}, {"per_device": 1, "accumulation": 5}, {"shards": 4, "per_device": 1}, {"shuffle": False, "shards": 2}],
    ids=str,
)
@pytest.mark.parametrize("kind", [pairs, feedback])
def test_every_unit_comes_once_an_epoch_in_llamafactorys_microbatches(kind, size):
    units = kind()
    firsts = (1, 1001) if kind is pairs else (1,)
    plan = planned(units, **size)
    microbatch = size.get("per_device", 2) * size.get("shards", 1)
    seen = []
    for step in range(plan.max_steps):
        batch, rows = plan.update(step), plan.epochs.rows(step)
        found = found_units(batch, firsts)
        assert found.keys() == set(rows.tolist())
        for k, number in enumerate(rows.tolist()):
            group, share, _, slot = found[number]
            last = k // microbatch == (len(rows) - 1) // microbatch
            size_of_group = len(rows) - k // microbatch * microbatch if last else microbatch
            assert group == k // microbatch
            assert share == pytest.approx(1 / size_of_group)
            np.testing.assert_array_equal(slot["counts"], units.counts[number])
            if kind is pairs:
                assert slot["margin"] == number
            else:
                assert slot["wanted"] == units.fields["wanted"][number]
        assert batch["divisor"] == -(-len(rows) // microbatch) == pytest.approx(batch["share"].sum())
        seen += rows.tolist()
        if kind is feedback:
            others = found_units(batch, (2001,), "kl_")
            assert others.keys() == found.keys()
            for number, (group, share, _, slot) in others.items():
                assert (group, share) == found[number][:2]
                assert slot["wanted"] == units.fields["wanted"][number]
    assert sorted(seen[: len(units)]) == sorted(seen[len(units) :]) == list(range(len(units)))
    assert len(plan.epochs.rows(plan.updates_per_epoch - 1)) < microbatch * plan.epochs.accumulation, "no ragged end"


@pytest.mark.parametrize("kind", [pairs, lambda: pairs(scores=True), feedback], ids=["pairs", "scores", "feedback"])
def test_the_sizes_that_are_compiled_for_are_those_of_the_arrays(kind):
    made = planned(kind(), shards=2)
    first, other = made.encoded, made.encoded.mismatched
    zeros = lambda units: np.zeros((*units.counts.shape, 2), np.float32)
    with_reference = made.with_reference(zeros(first), None if other is None else zeros(other))
    for plan in (made, with_reference):
        for step in range(plan.max_steps):
            batch, shape = plan.update(step), plan.shape(step)
            expected = array_shapes(shape, plan.sizes(shape))
            found = {name: (x.shape, x.dtype) for name, x in batch.items() if name != "divisor"}
            assert found == expected
            sizes = plan.sizes(shape)
            for prefix, (of, most) in {"": (shape, sizes.labelled), "kl_": _other(sizes)}.items():
                if of is None:
                    continue
                weights = batch[f"{prefix}loss_weights"].reshape(of.accum, 2, -1)
                assert (weights > 0).sum(-1).max() <= most


def _other(sizes):
    return (None, 0) if sizes.other is None else (sizes.other[0], sizes.other[1].labelled)


@pytest.mark.parametrize("kind", [pairs, feedback])
def test_a_reference_comes_with_its_unit(kind):
    units = kind()
    plan = planned(units, shards=2)
    sides = len(units.sides)
    numbers = np.arange(len(units) * sides * 2, dtype=np.float32).reshape(len(units), sides, 2)
    of_other = None if kind is pairs else -1 - numbers
    batch = plan.with_reference(numbers, of_other).update(1)
    for number, (_, _, _, slot) in found_units(batch, (1, 1001)[:sides]).items():
        np.testing.assert_array_equal(slot["reference"], numbers[number])
    if kind is feedback:
        for number, (_, _, _, slot) in found_units(batch, (2001,), "kl_").items():
            np.testing.assert_array_equal(slot["reference"], of_other[number])


@pytest.mark.parametrize("kind", [pairs, feedback])
def test_the_parts_of_processes_are_the_whole(kind):
    plan = planned(kind(), shards=4, per_device=1)
    read = []
    for step in (0, plan.updates_per_epoch - 1):
        whole, shape = plan.update(step), plan.shape(step)
        halves = [plan.update(step, part) for part in ((0, shape.batch // 2), (shape.batch // 2, shape.batch))]
        for name, x in whole.items():
            if x.ndim:
                np.testing.assert_array_equal(np.concatenate([half[name] for half in halves], axis=1), x)
            else:
                assert halves[0][name] == halves[1][name] == x
        read.append(int(halves[0]["segment_ids"].max(axis=-1).sum()))
    assert 0 < read[0] < 12 * len(plan.encoded.sides)


# ---------------------------------------------------------------------- streams


@pytest.fixture
def sets(tmp_path):
    words = lambda n, k: " ".join(["word"] * (1 + k * n % 17))
    asked = [{"instruction": f"q {n}"} for n in range(50)]
    chosen = [row | {"chosen": words(n, 7), "rejected": words(n, 5) + "!", "m": n} for n, row in enumerate(asked)]
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected", "margin": "m"}
    write(tmp_path, "pairs.jsonl", chosen, {"ranking": True, "columns": columns})
    marked = [row | {"output": words(n, 7), "good": n % 3 == 0} for n, row in enumerate(asked)]
    columns = {"prompt": "instruction", "response": "output", "kto_tag": "good"}
    write(tmp_path, "marked.jsonl", marked, {"columns": columns})
    return tmp_path


def plan_of(folder, template, stage, streaming, shards=1, **changes):
    name = "marked" if stage == "kto" else "pairs"
    # In one window, whose rows are shuffled as those of a set are.
    args = {"dataset": (name,), "dataset_dir": str(folder), "template": "chatml", "cutoff_len": 48, **changes}
    args |= {"streaming": True, "buffer_size": changes.get("buffer_size", 50)} if streaming else {}
    data = DataArguments(**args)
    splits = load_datasets(data, rules_of(stage), 42, template, Wanted(True, False))
    size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 12}
    config = SimpleNamespace(
        data=data, training=TrainingArguments(**size), finetuning=FinetuningArguments(stage=stage, ld_alpha=0.5)
    )
    return plan_updates(config, splits.train, shards, splits.stream)


def texts_of(template, batch, prefix=""):
    """group -> the texts, weights and fields of its units, whatever rows they lie in."""
    batch = {k.removeprefix(prefix): x for k, x in batch.items() if k.startswith(prefix) and x.ndim}
    (width, sides), found = batch["counts"].shape[2:], {}
    for m in range(len(batch["input_ids"])):
        told = {}
        for row in range(batch["input_ids"].shape[1]):
            ids, segment, weights = (batch[k][m, row] for k in ("input_ids", "segment_ids", "loss_weights"))
            for k in range(segment.max()):
                where = segment == k + 1
                told[int(batch["owner"][m, row, k])] = template.tokenizer.decode(ids[where]), weights[where].tolist()
        for owner in (owner for owner in told if owner % sides == 0):
            at = m, *divmod(owner // sides, width)
            unit = [told[owner + side] for side in range(sides)]
            unit += [np.asarray(batch[k][at]).tolist() for k in ("share", "counts", "margin", "wanted") if k in batch]
            found.setdefault(int(batch["group"][at]), []).append(unit)
    return {group: sorted(units) for group, units in found.items()}


@pytest.mark.parametrize("stage", ["dpo", "rm", "kto"])
def test_a_stream_gives_the_updates_of_a_set(stage, sets, template):
    on_disk, stream = (plan_of(sets, template, stage, streaming) for streaming in (False, True))
    for step in range(12):  # of 4 rows: the set of 50 begins anew after 12.5
        ours, theirs = stream.update(step), on_disk.update(step)
        assert texts_of(template, ours) == texts_of(template, theirs)
        assert ours["divisor"] == theirs["divisor"] == 2
        if stage == "kto":
            assert texts_of(template, ours, "kl_") == texts_of(template, theirs, "kl_")
        shape = stream.shape(step)
        found = {name: (x.shape, x.dtype) for name, x in ours.items() if name != "divisor"}
        other = ours["kl_input_ids"].shape if stage == "kto" else None
        assert found == array_shapes(shape, stream.sizes(shape, other))


@pytest.mark.parametrize("stage", ["dpo", "kto"])
@pytest.mark.parametrize("buffer_size", [3, 14])
def test_a_stream_that_is_cut_goes_on_with_the_same_units(buffer_size, stage, sets, template):
    make = lambda shards=1: plan_of(sets, template, stage, True, shards, buffer_size=buffer_size)
    plan, whole, positions = make(), [], []
    for step in range(12):
        positions.append(json.loads(json.dumps(plan.position(step))) if step else {})
        whole.append(plan.update(step))
    again = make()
    again.seek(positions[5])
    for step in range(5, 12):
        for name, x in again.update(step).items():
            np.testing.assert_array_equal(x, whole[step][name])


def test_the_parts_of_a_stream_are_the_whole(sets, template):
    plan = plan_of(sets, template, "kto", True, shards=2)
    for step in range(4):
        whole, shape = plan.update(step), plan.shape(step)
        halves = [plan.update(step, part) for part in ((0, shape.batch // 2), (shape.batch // 2, shape.batch))]
        for name, x in whole.items():
            if x.ndim:
                np.testing.assert_array_equal(np.concatenate([half[name] for half in halves], axis=1), x)


def test_a_pair_longer_than_those_of_the_first_window_fits_all_the_same(template, tmp_path):
    row = lambda n, words: {"instruction": f"q {n}", "chosen": "word " * words, "rejected": "no " * words}
    rows = [row(n, 1) for n in range(16)] + [row(n, 90) for n in range(16, 48)]
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    write(tmp_path, "pairs.jsonl", rows, {"ranking": True, "columns": columns})
    plan = plan_of(tmp_path, template, "dpo", True, buffer_size=16)
    shapes = [plan.update(step)["input_ids"].shape for step in range(12)]
    assert shapes[0] != plan.shapes[-1]
    assert shapes[-1] == plan.shapes[-1]
    assert sum(map(len, texts_of(template, plan.update(11)).values())) == 4
