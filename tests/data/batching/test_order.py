"""The order of examples and the arithmetic of epochs are the Trainer's."""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest

from jtune.data.batching.order import epoch_order, grouped_by_length, permutation, plan_epochs
from jtune.errors import DataError

# Recorded from LLaMA-Factory 0.9.5 (transformers 5.6): 43 rows, per_device_train_batch_size 2, accumulation 2, seed 42.
RECORDED_43 = {
    0: [17, 24, 36, 0, 34, 38, 11, 39, 8, 30],
    1: [18, 19, 29, 20, 5, 25],
    2: [17, 42, 32, 8, 22, 40],
}
# 10 rows, batch 3, accumulation 2: microbatches of three epochs with seed 7, and of 1.5 epochs with data_seed 123.
RECORDED_10 = [
    (7, 3, [[5, 0, 3], [4, 1, 7], [9, 6, 8], [2], [3, 5, 0], [1, 2, 6], [4, 7, 8], [9], [0, 5, 8], [7, 6, 2],
            [9, 1, 4], [3]]),
    (123, 1.5, [[2, 0, 8], [1, 3, 7], [4, 9, 5], [6], [4, 3, 1], [9, 6, 0]]),
]  # fmt: skip


def plan(n, batch, accumulation, epochs=1.0, **kw):
    return plan_epochs(n, batch=batch, accumulation=accumulation, num_train_epochs=epochs, **kw)


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32 + 5, 123456789012, -3])
@pytest.mark.parametrize("n", [1, 2, 3, 43, 1000, 30000])
def test_permutation_is_torch_randperm(n, seed):
    torch = pytest.importorskip("torch")
    expected = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    np.testing.assert_array_equal(permutation(n, seed), expected)


@pytest.mark.parametrize(("n", "batch"), [(1, 4), (43, 4), (43, 43), (1000, 3), (1003, 2), (64, 16)])
def test_rows_of_similar_length_come_together_as_in_the_trainer(n, batch):
    torch = pytest.importorskip("torch")
    sampler = pytest.importorskip("transformers.trainer_pt_utils")
    lengths = np.random.default_rng(n).integers(1, 40, n).astype(np.int32)  # many are equal: the sort is stable
    expected = sampler.get_length_grouped_indices(
        lengths.tolist(), batch, generator=torch.Generator().manual_seed(42 + 1)
    )
    order = epoch_order(n, 42, 1, True)
    before = order.copy()
    assert grouped_by_length(order, lengths, batch).tolist() == expected
    np.testing.assert_array_equal(order, before)


def test_updates_of_a_run_by_length():
    lengths = np.arange(40, dtype=np.int32)
    epochs = replace(plan(40, 2, 2, epochs=2.0), lengths=lengths)
    for epoch in range(2):
        updates = [epochs.rows(step) for step in range(10 * epoch, 10 * epoch + 10)]
        expected = grouped_by_length(epoch_order(40, 42, epoch, True), lengths, 4)
        np.testing.assert_array_equal(np.concatenate(updates), expected)
        np.testing.assert_array_equal(epochs.table(epoch), updates)


def test_order_is_what_the_trainer_was_seen_to_feed():
    for epoch, rows in RECORDED_43.items():
        assert epoch_order(43, 42, epoch, True)[: len(rows)].tolist() == rows
    assert permutation(0, 1).tolist() == []


@pytest.mark.parametrize(("seed", "num_epochs", "microbatches"), RECORDED_10)
def test_updates_are_what_the_trainer_was_seen_to_feed(seed, num_epochs, microbatches):
    epochs = plan(10, 3, 2, num_epochs, seed=seed)
    expected = [
        [row for microbatch in microbatches[i : i + 2] for row in microbatch] for i in range(0, len(microbatches), 2)
    ]
    assert [epochs.rows(step).tolist() for step in range(epochs.max_steps)] == expected


def test_a_million_examples_are_shuffled_in_seconds():
    start = time.perf_counter()
    order = permutation(1_000_000, 3)
    assert time.perf_counter() - start < 5
    assert np.bincount(order).max() == 1


def test_43_examples_make_eleven_updates_an_epoch_and_the_last_is_short():
    epochs = plan(43, 2, 2, 3)
    assert (epochs.microbatches, epochs.updates_per_epoch, epochs.max_steps, epochs.num_epochs) == (22, 11, 33, 3)
    assert [len(epochs.rows(s)) for s in range(11)] == [4] * 10 + [3]
    # Recorded from the Trainer, to the last bit.
    assert [epochs.epoch_at(s) for s in (1, 11, 12, 14, 33)] == [
        1 / 11,
        1.0,
        1.0909090909090908,
        1.2727272727272727,
        3.0,
    ]


def test_epoch_when_accumulation_does_not_divide_the_epoch():
    epochs = plan(11, 2, 4, max_steps=5)
    assert [epochs.epoch_at(s) for s in range(1, 6)] == [2 / 3, 1.0, 1.6666666666666665, 2.0, 2.6666666666666665]
    assert [len(epochs.rows(s)) for s in range(5)] == [8, 3, 8, 3, 8]
    assert epochs.num_epochs == 3


def test_drop_last_leaves_out_the_last_partial_microbatch():
    epochs = plan(43, 4, 2, 2, drop_last=True)
    assert (epochs.microbatches, epochs.updates_per_epoch, epochs.max_steps) == (10, 5, 10)
    assert sorted(np.concatenate([epochs.rows(s) for s in range(5)])) == sorted(epoch_order(43, 42, 0, True)[:40])
    with pytest.raises(DataError, match="do not fill one batch of 64"):
        plan(43, 64, 1, drop_last=True)


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(DataError, match="no training examples"):
        plan(0, 1, 1)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("n", "batch", "accumulation"), [(1, 4, 2), (7, 2, 3), (24, 4, 2), (100, 3, 4)])
def test_every_example_comes_exactly_once_an_epoch(n, batch, accumulation, shuffle):
    epochs = plan(n, batch, accumulation, 3, shuffle=shuffle)
    upe = epochs.updates_per_epoch
    assert upe == max(1, math.ceil(math.ceil(n / batch) / accumulation))
    for epoch in range(3):
        seen = np.concatenate([epochs.rows(s) for s in range(epoch * upe, (epoch + 1) * upe)])
        assert sorted(seen) == list(range(n))
        assert shuffle or seen.tolist() == list(range(n))
        table = epochs.table(epoch)
        assert [row[row >= 0].tolist() for row in table] == [
            epochs.rows(s).tolist() for s in range(epoch * upe, (epoch + 1) * upe)
        ]


def test_the_table_of_the_last_epoch_stops_with_the_run():
    epochs = plan(10, 2, 1, max_steps=7)
    assert [len(epochs.table(e)) for e in range(epochs.num_epochs)] == [5, 2]
    with pytest.raises(IndexError, match="update 7 of a run of 7"):
        epochs.rows(7)


@pytest.mark.parametrize(
    ("case", "batch", "accumulation"),
    [("full_sft", 4, 2), ("pt_packed", 4, 1), ("freeze_sft", 4, 1), ("lora_sft", 2, 4), ("toolcall_sft", 2, 2)],
)
def test_logged_epochs_equal_the_recorded_runs(reference, case, batch, accumulation):
    recorded = json.loads((reference / "expected" / f"{case}.json").read_text())
    rows = json.loads((reference / "expected" / f"{case}.tokens.json").read_text())["rows"]
    epochs = plan(rows, batch, accumulation, max_steps=recorded["max_steps"])
    assert epochs.num_epochs == recorded["num_train_epochs"]
    assert [epochs.epoch_at(r["step"]) for r in recorded["log_history"]] == [
        r["epoch"] for r in recorded["log_history"]
    ]
