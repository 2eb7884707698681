"""Batches hold the examples they should, as segments that do not touch, in a few shapes, with little padding."""

import time

import numpy as np
import pytest
from sets import segments

from jtune.config.stages import rules_of
from jtune.data.batching.evaluation import eval_batches
from jtune.data.batching.order import grouped_by_length, permutation
from jtune.data.batching.shapes import Shape, place
from jtune.data.batching.train import Order, Size, plan_batches
from jtune.errors import DataError


class Examples:
    """A stand-in for an encoded dataset: example i is a run of distinct tokens, its tail is labelled."""

    def __init__(self, lengths, labelled=None, train_on_all=False):
        self.lengths = np.asarray(lengths, np.int32)
        tail = self.lengths * 2 // 3 if labelled is None else np.asarray(labelled)
        self.tail = self.lengths if train_on_all else np.minimum(tail, self.lengths - 1)
        self.labelled = np.minimum(self.tail, np.maximum(self.lengths - 1, 0)).astype(np.int32)
        self.first_labelled = (self.tail == self.lengths).astype(np.int32)
        self.first = np.cumsum(self.lengths) - self.lengths + 1  # token ids tell example and position

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        ids = self.first[i] + np.arange(self.lengths[i], dtype=np.int32)
        labels = np.where(np.arange(len(ids)) >= len(ids) - self.tail[i], ids, -100)
        return {"input_ids": ids.astype(np.int32), "labels": labels.astype(np.int32)}

    def segment(self, i):
        return self[i]


def chat(n, cap=512, seed=0, mean=4.7):
    return Examples(np.clip(np.random.default_rng(seed).lognormal(mean, 0.8, n), 2, cap))


def planned(encoded, per_device_batch_size, batch_shards, accumulation, seed, shuffle, num_epochs, **more):
    order = {name: more.pop(name) for name in ("max_steps", "drop_last", "by_length") if name in more}
    size = Size(per_device_batch_size, batch_shards, accumulation)
    return plan_batches(encoded, size, Order(seed, shuffle, num_epochs, **order), **more)


def plan(encoded, **kw):
    defaults = {
        "packing": False,
        "cutoff_len": 512,
        "per_device_batch_size": 2,
        "batch_shards": 1,
        "accumulation": 2,
        "seed": 42,
        "shuffle": True,
        "num_epochs": 1,
    }
    return planned(encoded, **(defaults | kw))


CASES = [
    {},
    {"packing": True},
    {"batch_shards": 4, "accumulation": 3},
    {"batch_shards": 4, "accumulation": 3, "packing": True},
    {"per_device_batch_size": 1, "accumulation": 8, "shuffle": False},
    {"per_device_batch_size": 8, "accumulation": 1, "num_epochs": 2},
    {"drop_last": True, "per_device_batch_size": 4, "packing": True},
]


@pytest.mark.parametrize("case", CASES)
def test_every_example_is_whole_in_one_segment_of_its_update(case):
    encoded = chat(83)
    batches = plan(encoded, **case)
    for step in range(batches.max_steps):
        expected = sorted(encoded.first[batches.examples(step)])
        found = []
        for tokens, targets, weights, positions in segments(batches.update(step)):
            i = int(np.searchsorted(encoded.first, tokens[0]))
            example = encoded[i]
            np.testing.assert_array_equal(tokens, example["input_ids"])
            np.testing.assert_array_equal(positions, np.arange(len(tokens)))
            for t in range(len(tokens)):
                label = example["labels"][t + 1] if t + 1 < len(tokens) else -100
                assert (targets[t], weights[t]) == ((label, 1) if label != -100 else (0, 0))
            found.append(encoded.first[i])
        assert sorted(found) == expected


@pytest.mark.parametrize("case", CASES)
def test_padding_is_zero_everywhere(case):
    batches = plan(chat(83), **case)
    for step in range(batches.max_steps):
        arrays = batches.update(step)
        padding = arrays["segment_ids"] == 0
        assert all((x[padding] == 0).all() for x in arrays.values() if x.ndim)
        assert (~padding).sum() == batches.tokens(step)


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_few_static_and_divisible_by_the_shards(case):
    batches = plan(chat(300), **case)
    assert 1 <= len(batches.shapes) <= 4
    shards = case.get("batch_shards", 1)
    for step in range(batches.max_steps):
        arrays = batches.update(step)
        divisor = arrays.pop("divisor")
        assert (divisor.shape, divisor.dtype) == ((), np.float32)
        assert divisor == arrays["loss_weights"].sum()
        assert {x.shape for x in arrays.values()} <= set(batches.shapes)
        assert arrays["loss_weights"].dtype == np.float32
        assert {x.dtype for k, x in arrays.items() if k != "loss_weights"} == {np.dtype(np.int32)}
    assert all(batch % shards == 0 for _, batch, _ in batches.shapes)


@pytest.mark.parametrize("case", CASES)
def test_label_capacity_holds_and_is_tight(case):
    shards = case.get("batch_shards", 1)
    batches = plan(chat(300), **case)
    peak = dict.fromkeys(batches.shapes, 0)
    for step in range(batches.max_steps):
        weights = batches.update(step)["loss_weights"]
        by_shard = weights.reshape(weights.shape[0], shards, -1).sum(axis=2)
        peak[weights.shape] = max(peak[weights.shape], int(by_shard.max()))
    for shape, most in peak.items():
        tokens = shape[1] * shape[2] // shards
        capacity = batches.label_capacity(shape)
        assert most <= capacity <= min(tokens, max(128, most + 127))
        assert capacity == tokens or capacity % 128 == 0


@pytest.mark.parametrize("case", CASES)
def test_used_microbatches_come_first(case):
    batches = plan(chat(83), **case)
    slots = 0
    for step in range(batches.max_steps):
        used = batches.update(step)["segment_ids"].any(axis=(1, 2))
        assert used[: used.sum()].all()
        slots += used.sum() * np.prod(batches.shapes[batches.shape_of[step]][1:])
    real = sum(batches.tokens(s) for s in range(batches.max_steps))
    assert batches.padding_share == pytest.approx(1 - real / slots)


@pytest.mark.parametrize("packing", [True, False])
def test_an_update_does_not_depend_on_those_before_it(packing):
    batches, again = (plan(chat(120), packing=packing, num_epochs=3) for _ in range(2))
    steps = list(range(batches.max_steps))
    forward = [batches.update(s) for s in steps]
    for s in reversed(steps):
        for key, x in again.update(s).items():
            np.testing.assert_array_equal(x, forward[s][key])


def test_unpacked_updates_hold_the_trainers_examples():
    batches = plan(chat(43), num_epochs=3)
    assert batches.examples(0).tolist() == [17, 24, 36, 0]
    assert (batches.updates_per_epoch, batches.max_steps) == (11, 33)
    assert batches.epoch_at(12) == 1.0909090909090908


def test_by_length_updates_hold_examples_of_similar_length():
    encoded = chat(400)
    spread = {
        by_length: np.mean([np.ptp(encoded.lengths[batches.examples(s)]) for s in range(batches.max_steps)])
        for by_length, batches in ((b, plan(encoded, by_length=b)) for b in (True, False))
    }
    assert spread[True] < spread[False] / 3
    assert encoded.lengths.max() in encoded.lengths[plan(encoded, by_length=True).examples(0)]
    packed = [plan(encoded, by_length=b, packing=True) for b in (True, False)]
    assert packed[0].examples(0).tolist() == packed[1].examples(0).tolist()


def test_packed_rows_have_one_shape_and_short_updates_end_in_empty_rows():
    encoded = Examples(np.full(43, 60))
    batches = plan(encoded, packing=True, cutoff_len=64)
    assert batches.shapes == ((2, 2, 64),)
    last = batches.update(10)["segment_ids"]
    assert (last > 0).any(axis=2).tolist() == [[True, True], [True, False]]


def test_pretraining_blocks_are_one_segment_each():
    encoded = Examples(np.full(12, 64), train_on_all=True)
    batches = plan(encoded, packing=True, cutoff_len=64, shuffle=False)
    arrays = batches.update(1)
    assert sorted(batches.examples(1)) == [4, 5, 6, 7]
    assert (arrays["segment_ids"] == 1).all()
    assert arrays["loss_weights"].sum() == 4 * 63
    assert batches.padding_share == 0


@pytest.mark.parametrize("shards", [1, 8])
def test_a_shard_never_holds_more_tokens_than_the_padded_layout(shards):
    encoded = chat(400, cap=500)
    batches = plan(encoded, per_device_batch_size=2, batch_shards=shards)
    assert all(batch // shards * seq <= 2 * 512 for _, batch, seq in batches.shapes)


def test_padding_is_small_on_a_realistic_mix(record_property):
    encoded = chat(20_000, cap=2048, mean=5.3)
    for kw, bound in [
        ({"per_device_batch_size": 4, "accumulation": 2}, 0.22),
        ({"per_device_batch_size": 1, "accumulation": 16}, 0.14),
        ({"per_device_batch_size": 4, "accumulation": 4, "batch_shards": 8}, 0.14),
        ({"packing": True, "per_device_batch_size": 4, "accumulation": 2}, 0.005),
    ]:
        share = plan(encoded, cutoff_len=2048, **kw).padding_share
        record_property(str(kw), round(share, 4))
        assert share < bound, kw


def test_planning_is_fast_and_seeking_does_not_grow_with_the_step():
    encoded = chat(300_000, cap=2048)
    start = time.perf_counter()
    batches = plan(encoded, cutoff_len=2048, per_device_batch_size=4)
    assert time.perf_counter() - start < 6  # 20 s for a million
    batches.update(0)

    def seconds(steps):
        start = time.perf_counter()
        for s in steps:
            batches.update(s)
        return time.perf_counter() - start

    end = batches.max_steps
    assert seconds(range(end - 50, end)) < 5 * seconds(range(1, 51)) + 0.1


def test_examples_of_length_one_and_without_labels_do_no_harm():
    encoded = Examples([1, 5, 1, 7, 30, 2], labelled=[0, 0, 0, 3, 0, 1])
    for packing in (True, False):
        batches = plan(encoded, packing=packing, cutoff_len=32)
        total = sum(batches.update(s)["loss_weights"].sum() for s in range(batches.max_steps))
        assert total == 4


def test_layout_refuses_what_does_not_fit():
    lengths = np.array([[60, 60, 60]])
    with pytest.raises(ValueError, match="3 rows of 64 tokens, and its shape has 2"):
        place(lengths, lengths, Shape(1, 2, 64), 1)
    with pytest.raises(ValueError, match="60 tokens does not fit into rows of 32"):
        place(lengths, lengths, Shape(1, 2, 32), 1)


def test_data_that_changed_under_the_plan_is_an_error():
    encoded = Examples(np.full(8, 300), labelled=np.full(8, 3))
    batches = plan(encoded)
    encoded.tail = np.full(8, 299)
    with pytest.raises(DataError, match="labelled targets on a shard"):
        batches.update(0)


def test_an_example_longer_than_the_row_is_an_error():
    with pytest.raises(DataError, match="example 2 has 70 tokens"):
        plan(Examples([3, 4, 70]), packing=True, cutoff_len=64)


EVALS = [
    {},
    {"packing": True},
    {"batch_shards": 4},
    {"batch_shards": 4, "packing": True},
    {"length_seed": 7},
    {"length_seed": 7, "packing": True},
]


@pytest.mark.parametrize("case", EVALS)
def test_evaluation_sees_every_example_once_in_one_shape(case):
    encoded = chat(50)
    defaults = {"stage": rules_of("sft"), "per_device_batch_size": 2, "batch_shards": 1, "cutoff_len": 512}
    evaluation = eval_batches(encoded, **(defaults | case))
    shards = (defaults | case)["batch_shards"]
    seen = []
    for arrays, example, indices in evaluation:
        assert {x.shape for x in arrays.values()} == {evaluation.shape} == {example.shape}
        assert len(indices) < evaluation.slots
        assert arrays["loss_weights"].reshape(shards, -1).sum(axis=1).max() <= evaluation.label_capacity
        for k, i in enumerate(indices):
            np.testing.assert_array_equal(np.sort(arrays["input_ids"][example == k]), encoded[i]["input_ids"])
        assert (arrays["segment_ids"][example == evaluation.slots - 1] == 0).all()
        seen += indices.tolist()
    assert sorted(seen) == list(range(50))


@pytest.mark.parametrize("stage", ["sft", "pt"])
@pytest.mark.parametrize("case", EVALS)
def test_eval_loss_is_the_trainers_mean_of_batch_means(case, stage):
    encoded = chat(50)
    defaults = {"per_device_batch_size": 3, "batch_shards": 1, "cutoff_len": 512}
    evaluation = eval_batches(encoded, stage=rules_of(stage), **(defaults | case))
    token_loss = np.random.default_rng(0).random(encoded.lengths.sum() + 1)
    losses, counts = np.zeros(50), np.zeros(50)
    for arrays, example, indices in evaluation:
        sums = np.zeros((2, evaluation.slots))
        np.add.at(sums[0], example, token_loss[arrays["targets"]] * arrays["loss_weights"])
        np.add.at(sums[1], example, arrays["loss_weights"])
        losses[indices], counts[indices] = sums[:, : len(indices)]

    size = 3  # whatever the number of shards
    units = [[i] for i in range(50)]
    if case.get("packing"):
        units = [list(evaluation.packs[r]) for r in range(len(evaluation.packs))]
    if seed := case.get("length_seed"):
        lengths = np.ones(len(units), int) if case.get("packing") else encoded.lengths
        units = [units[i] for i in grouped_by_length(permutation(len(units), seed), lengths, size)]
    means, weights = [], []
    for start in range(0, len(units), size):
        batch = [i for unit in units[start : start + size] for i in unit]
        labels = np.concatenate([encoded[i]["labels"][1:] for i in batch])
        means.append(token_loss[labels[labels != -100]].mean())
        weights.append(len(units[start : start + size]) if stage == "pt" else 1)
    assert len(units) % size, "the last batch is smaller"
    assert evaluation.mean_loss(losses, counts) == pytest.approx(np.average(means, weights=weights), rel=1e-6)


def test_a_loss_of_no_targets_is_nan_and_not_zero():
    evaluation = eval_batches(chat(4), stage=rules_of("sft"), per_device_batch_size=2, batch_shards=1, cutoff_len=512)
    evaluation.encoded.first_labelled[:] = 0
    assert np.isnan(evaluation.mean_loss(np.zeros(4), np.zeros(4)))


def test_evaluation_of_a_few_rows_is_not_padded_to_a_large_batch():
    evaluation = eval_batches(
        Examples([60, 60, 60]), stage=rules_of("sft"), per_device_batch_size=64, batch_shards=2, cutoff_len=64
    )
    assert evaluation.shape == (4, 64)
    with pytest.raises(DataError, match="no evaluation examples"):
        eval_batches(Examples([]), stage=rules_of("sft"), per_device_batch_size=1, batch_shards=1, cutoff_len=64)


def test_the_divisor_counts_the_first_label_as_the_trainer_does():
    encoded = Examples([10, 20, 30, 40], train_on_all=True)
    batches = planned(
        encoded, packing=False, cutoff_len=40, per_device_batch_size=2, batch_shards=1,
        accumulation=2, seed=0, shuffle=False, num_epochs=1,
    )  # fmt: skip
    arrays = batches.update(0)
    assert arrays["divisor"] == 100
    assert arrays["loss_weights"].sum() == 96
