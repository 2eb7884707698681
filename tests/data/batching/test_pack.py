"""Packing keeps every example once, wastes little, and is the same every time."""

import time

import numpy as np
import pytest

from jtune.data.batching.pack import best_fit_many, pack
from jtune.data.cache.shards import preprocessing_batches
from jtune.errors import DataError


def chat_lengths(n, cap, seed=0):
    """Lengths as of chat data: log-normal, many cut at `cap`."""
    return np.clip(np.random.default_rng(seed).lognormal(5.5, 1.0, n), 8, cap).astype(np.int32)


def oracle_best_fit(lengths, row_length):
    """Rows of a best fit, longest first, by the definition."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, f in enumerate(free) if f >= length]
        if fitting:
            i = min(fitting, key=lambda i: free[i])
        else:
            i = len(free)
            free.append(row_length)
        free[i] -= length
    return free


def oracle_fill(lengths, row_length):
    """LLaMA-Factory's rule by its definition: a row takes the longest example that still fits, until none does."""
    waiting, rows = sorted(range(len(lengths)), key=lambda i: (lengths[i], i)), []
    while waiting:
        row = []
        while fitting := [i for i in waiting if lengths[i] <= row_length - sum(lengths[j] for j in row)]:
            row.append(fitting[-1])
            waiting.remove(fitting[-1])
        rows.append(row)
    return rows


@pytest.mark.parametrize("window", [7, 100, 1000])
def test_every_example_is_in_one_row_and_no_row_is_too_long(window):
    lengths = chat_lengths(1000, 512)
    packs = pack(lengths, 512, np.arange(1000) // window)
    assert sorted(packs.examples) == list(range(1000))
    assert packs.sums(lengths).max() <= 512
    assert packs.sums(lengths).sum() == lengths.sum()
    assert all(len(set(packs[r] // window)) == 1 for r in range(len(packs)))


def test_rows_are_filled_as_llamafactory_fills_them():
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(1, 60, 80)
        packs = pack(lengths, 64)
        assert [packs[r].tolist() for r in range(len(packs))] == oracle_fill(lengths.tolist(), 64)


@pytest.mark.parametrize(
    ("rows", "size", "processes", "expected"),
    [
        (5, 2, None, [0, 0, 1, 1, 2]),
        (7, 2, 2, [0, 0, 1, 1, 2, 2, 3]),
        (3, 1000, 8, [0, 1, 2]),
        (0, 5, 4, []),
    ],
)
def test_batches_of_preprocessing_are_those_of_each_process(rows, size, processes, expected):
    assert preprocessing_batches(rows, size, processes).tolist() == expected


def test_packing_is_deterministic():
    lengths = chat_lengths(3000, 2048)
    one, two = pack(lengths, 2048), pack(lengths.copy(), 2048)
    np.testing.assert_array_equal(one.examples, two.examples)
    np.testing.assert_array_equal(one.starts, two.starts)


@pytest.mark.parametrize(("row_length", "waste"), [(2048, 0.01), (8192, 0.02)])
def test_packed_rows_waste_little(row_length, waste):
    lengths = chat_lengths(60_000, 2048)
    packs = pack(lengths, row_length)
    assert 1 - lengths.sum() / (len(packs) * row_length) < waste


def test_packing_takes_100_000_examples_a_second():
    lengths = chat_lengths(100_000, 2048)
    start = time.perf_counter()
    pack(lengths, 2048)
    assert time.perf_counter() - start < 1


def test_blocks_as_long_as_the_row_stay_as_they_are():
    packs = pack(np.full(9, 128, np.int32), 128)
    assert sorted(packs.examples) == list(range(9))
    assert packs.starts.tolist() == list(range(10))


def test_nothing_and_too_much():
    assert len(pack(np.zeros(0, np.int32), 8)) == 0
    with pytest.raises(DataError, match="example 1 has 9 tokens"):
        pack(np.array([3, 9, 2]), 8)


def test_taking_rows_tells_where_each_example_goes():
    packs = pack(np.array([2, 4, 6, 2, 8]), 14)
    examples, place = packs.take(np.array([1, 0]))
    assert examples.tolist() == [1, 3, 0, 4, 2]
    assert place.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("examples", [1, 5, 40])
def test_many_small_problems_are_each_best_fit(examples):
    rng = np.random.default_rng(examples)
    lengths = rng.integers(0, 100, (50, examples))  # 0 fills up a short update
    lengths = -np.sort(-lengths, axis=1)
    rows = best_fit_many(lengths, 100)
    for line, row in zip(lengths, rows):
        free = 100 - np.bincount(row, line, minlength=1)
        assert set(row) == set(range(row.max() + 1))
        assert sorted(free) == sorted(oracle_best_fit(line[line > 0], 100))
