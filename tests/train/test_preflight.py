"""What processes compare before they train, with threads in the place of processes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jtune.errors import DataError
from jtune.train import preflight


@pytest.fixture
def together(monkeypatch):
    """`together(work, a, b, ...)`: `work(a)`, `work(b)`, ... of processes 0, 1, ...; what each raised, or None."""
    here = threading.local()

    def run(work, *each):
        meeting, values = threading.Barrier(len(each)), [""] * len(each)

        def exchange(_, value):
            values[here.index] = value
            meeting.wait(20)
            found = list(values)
            meeting.wait(20)
            return found

        def process(index):
            here.index = index
            try:
                work(each[index])
            except DataError as error:
                return str(error)

        monkeypatch.setattr(preflight.processes, "count", lambda: len(each))
        monkeypatch.setattr(preflight.processes, "index", lambda: here.index)
        monkeypatch.setattr(preflight.exchange, "all_gather", exchange)
        monkeypatch.setattr(preflight.exchange, "working", nullcontext)
        with ThreadPoolExecutor(len(each)) as pool:
            return list(pool.map(process, range(len(each))))

    return run


@pytest.fixture
def copies(tmp_path):
    """The same model on three hosts."""
    folders = [tmp_path / f"host{i}" for i in range(3)]
    for folder in folders:
        folder.mkdir()
        save_file({"w": np.arange(1000, dtype=np.float32)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    return folders


def compare_files(folder: Path) -> None:
    preflight.check_model_files({"model": folder})


def test_equal_copies_pass_and_one_folder_for_all_is_not_read(together, copies, monkeypatch):
    assert together(compare_files, *copies) == [None, None, None]
    monkeypatch.setattr(preflight, "file_digest", lambda path: pytest.fail("read"))
    assert together(compare_files, copies[0], copies[0]) == [None, None]


def test_each_copy_is_read_once_however_many_processes_have_it(together, copies, monkeypatch):
    read, digest = [], preflight.file_digest
    monkeypatch.setattr(preflight, "file_digest", lambda path: read.append(path.parent.name) or digest(path))
    assert together(compare_files, copies[0], copies[1], copies[0], copies[1]) == [None] * 4
    assert sorted(read) == ["host0", "host0", "host1", "host1"]  # two files each


def test_one_bit_of_one_hosts_weights_ends_all_and_names_the_process(together, copies):
    path = copies[1] / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-2000] ^= 1
    path.write_bytes(raw)
    said = together(compare_files, *copies)
    assert said[0] == said[1] == said[2]
    assert "model: model.safetensors: process 1 has " in said[0]
    assert "config.json" not in said[0]


@pytest.mark.parametrize("change", ["cut", "missing"])
def test_a_file_that_is_cut_or_missing_on_one_host_is_named_without_reading(together, copies, monkeypatch, change):
    monkeypatch.setattr(preflight, "file_digest", lambda path: pytest.fail("read"))
    path = copies[2] / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:100]) if change == "cut" else path.unlink()
    has = "100 bytes" if change == "cut" else "None"
    for said in together(compare_files, *copies):
        assert f"model: model.safetensors: process 2 has {has}, the others have {size} bytes" in said


def test_a_bit_that_differs_in_one_processs_memory_is_named(together):
    whole = {"layer": {"kernel": jnp.arange(64, dtype=jnp.float32), "scale": jnp.ones(3, jnp.bfloat16)}}
    flipped = jnp.arange(64, dtype=jnp.float32).at[5].set(np.nextafter(np.float32(5), np.float32(6)))
    other = {"layer": {"kernel": flipped, "scale": whole["layer"]["scale"]}}
    assert together(preflight.check_weights, whole, whole) == [None, None]
    for said in together(preflight.check_weights, whole, other, whole):
        assert "layer.kernel: process 1 has " in said
        assert "scale" not in said
