"""A save that fails is dropped, and any damage to a checkpoint means the one before it."""

import errno
import io
import json
import os
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jtune.errors import CheckpointError
from jtune.train import events, files, results, resume_json
from jtune.train.callbacks import logs, terminal
from jtune.train.callbacks.logs import log_file
from jtune.train.checkpoint import Checkpointer
from jtune.train.checkpoint_folder import Damaged, find_checkpoints, read_meta
from jtune.train.loop import Progress
from jtune.train.restore import restore, restore_newest
from jtune.train.results import read_results
from jtune.train.timing import lost

STATE = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.int32(3)}
LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)
FULL = OSError(errno.ENOSPC, "No space left on device")


def meta(step):
    return {"identity": {"rows": 1}, "progress": Progress(step=step).to_dict(), "seconds": {"step": 1.5}}


def write(saver, step):
    saver.save(step, STATE, meta(step), lambda path: (path / "model.bin").write_bytes(b"weights"))


def write_to_the_end(saver, step):
    write(saver, step)
    saver.wait()


def save(folder, *steps, keep=None):
    saver = Checkpointer(folder, keep=keep)
    for step in steps:
        write(saver, step)
    saver.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def newest(folder, check=lambda path, meta: None):
    restored = restore_newest(folder, LIKE, check)
    assert restored is not None
    np.testing.assert_array_equal(restored.state["a"], STATE["a"])
    assert restored.meta["progress"]["step"] == int(restored.path.name.split("-")[1])
    return restored.path.name


def full(*args, **kwargs):
    raise FULL


def fail_orbax(patch, saver):
    patch.setattr(ocp.StandardCheckpointHandler, "finalize", full)


def fail_rename(patch, saver):
    rename = Path.rename
    patch.setattr(Path, "rename", lambda path, to: full() if path.suffix == ".tmp" else rename(path, to))


def fail_resume_json(patch, saver):
    patch.setattr(Path, "write_bytes", full)


def fail_the_model(patch, saver):
    patch.setattr(saver, "save", lambda step, state, meta, _: Checkpointer.save(saver, step, state, meta, full))


def fail_a_library_in_rust(patch, saver):
    def files(path):
        raise Exception("I/O error: No space left on device (os error 28)")

    patch.setattr(saver, "save", lambda step, state, meta, _: Checkpointer.save(saver, step, state, meta, files))


def fail_sync(patch, saver):
    patch.setattr(os, "fsync", full)


def cut_the_model(patch, saver):
    sync = files.sync
    patch.setattr(files, "sync", lambda path: (sync(path), (path / "model.bin").write_bytes(b"wei"))[0])


def lose_metadata(patch, saver):
    sync = files.sync
    patch.setattr(files, "sync", lambda path: (sync(path), (path / "state" / "_METADATA").unlink(missing_ok=True))[0])


FAILURES = [
    fail_orbax,
    fail_rename,
    fail_resume_json,
    fail_the_model,
    fail_a_library_in_rust,
    fail_sync,
    cut_the_model,
    lose_metadata,
]


@pytest.mark.parametrize("fail", FAILURES, ids=lambda f: f.__name__)
def test_a_save_that_fails_is_never_published_and_deletes_nothing(fail, tmp_path, monkeypatch):
    save(tmp_path, 4)
    saver = Checkpointer(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        fail(patch, saver)
        with pytest.raises(CheckpointError) as error:
            write_to_the_end(saver, 8)
        saver.close()  # as a run does on its way out
    assert str(error.value).startswith(f"writing {tmp_path}/checkpoint-8 failed: ")
    assert "MiB are free there)\nIt is not kept. Earlier checkpoints are untouched (checkpoint-4)" in str(error.value)
    assert names(tmp_path) == ["checkpoint-4"]
    assert newest(tmp_path) == "checkpoint-4"


def test_polling_drops_a_save_that_failed_in_the_background(tmp_path, monkeypatch):
    saver = Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        fail_orbax(patch, saver)
        write(saver, 8)
        for thread in threading.enumerate():
            if thread.name == "async_save":
                thread.join()
        with pytest.raises(CheckpointError, match=r"No space left on device .*\nIt is not kept\. There is no earlier"):
            saver.poll()
    saver.poll()
    saver.close()
    assert names(tmp_path) == []


def test_an_error_that_is_not_of_writing_is_raised_as_it_is_and_nothing_is_published(tmp_path):
    saver = Checkpointer(tmp_path)

    def files(path):
        raise KeyError("lm_head")

    with pytest.raises(KeyError):
        saver.save(8, STATE, meta(8), files)
    saver.close()
    assert names(tmp_path) == []


def test_a_checkpoint_of_the_same_name_stays_until_the_new_one_has_it(tmp_path, monkeypatch):
    save(tmp_path, 4)
    (tmp_path / "checkpoint-4" / "mark").touch()
    saver = Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        fail_rename(patch, saver)
        with pytest.raises(CheckpointError):
            write_to_the_end(saver, 4)
    assert (tmp_path / "checkpoint-4" / "mark").exists()
    write(saver, 4)
    saver.close()
    assert names(tmp_path) == ["checkpoint-4"]
    assert not (tmp_path / "checkpoint-4" / "mark").exists()


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    save(tmp_path, 4)
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-4.replaced")
    (tmp_path / "checkpoint-2.removed").mkdir()
    (tmp_path / "checkpoint-8.tmp").write_text("not even a folder")
    Checkpointer(tmp_path).close()
    assert names(tmp_path) == ["checkpoint-4"]


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync, rename = set(), os.fsync, Path.rename

    def record(handle):
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def check(path, to):
        if path.suffix == ".tmp":
            assert {str(path), *(str(p) for p in path.rglob("*"))} <= synced
            synced.clear()
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", check)
    save(tmp_path, 1)
    assert synced == {str(tmp_path)}


# ---------------------------------------------------------------------- resume.json


def old_form(path):
    """As older code wrote it: without a digest of its own."""
    content = resume_json.decode((path / "resume.json").read_bytes())
    del content["arrays"]
    (path / "resume.json").write_text(json.dumps(content, indent=1) + "\n")
    return content


def test_every_flipped_bit_of_resume_json_is_noticed():
    raw = resume_json.encode(meta(3) | {"step": 3, "digests": {"a": "0123abcd"}, "arrays": {"a": "int32[3]"}})
    assert resume_json.decode(raw)["step"] == 3
    for place in range(len(raw) * 8):
        flipped = bytearray(raw)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"."):
            resume_json.decode(bytes(flipped))
    for length in range(len(raw)):
        with pytest.raises(ValueError, match=r"."):
            resume_json.decode(raw[:length])


def test_a_checkpoint_of_older_code_is_still_resumed(tmp_path):
    save(tmp_path, 1, 2)
    for path in find_checkpoints(tmp_path):
        old_form(path)
    assert newest(tmp_path) == "checkpoint-2"
    assert read_meta(tmp_path / "checkpoint-2")["progress"] == Progress(step=2).to_dict()


NESTED = b"[" * 100_000
CONTENTS = [b"", b"[]", b"{}", b"null", b"\xff\xfe\x00{", b"\0" * 64, NESTED, b'{"step": ' + b"9" * 5000 + b"}"]
CHANGES = {
    "no identity": lambda m: m.pop("identity"),
    "no progress": lambda m: m.pop("progress"),
    "no digests": lambda m: m.pop("digests"),
    "no step": lambda m: m.pop("step"),
    "another entry": lambda m: m.update(setp=2),
    "another step": lambda m: m.update(step=3),
    "another step throughout": lambda m: (m.update(step=3), m["progress"].update(step=3)),
    "step of progress": lambda m: m["progress"].update(step=1),
    "identity a list": lambda m: m.update(identity=[]),
    "progress null": lambda m: m.update(progress=None),
    "no field of progress": lambda m: m["progress"].pop("tokens"),
    "NaN": lambda m: m["progress"].update(total_loss=float("nan")),
    "infinity": lambda m: m["progress"].update(best_metric=float("inf")),
    "a huge number": lambda m: m["progress"].update(tokens=10**400),
    "text for a number": lambda m: m["progress"].update(tokens="9"),
    "log of numbers": lambda m: m["progress"].update(log_history=[1]),
    "seconds of another kind": lambda m: m["seconds"].update(spet=1),
    "seconds below zero": lambda m: m["seconds"].update(step=-1),
    "digest of an array": lambda m: m["digests"].update(a="00000000"),
    "digest missing": lambda m: m["digests"].pop("a"),
}


def falls_back(folder, harm):
    save(folder, 1, 2)
    harm(folder / "checkpoint-2")
    assert newest(folder) == "checkpoint-1"
    assert (folder / "checkpoint-2.damaged").exists()


@pytest.mark.parametrize("content", CONTENTS, ids=lambda c: repr(c[:8]))
def test_whatever_resume_json_holds_the_checkpoint_before_is_used(content, tmp_path):
    falls_back(tmp_path, lambda path: (path / "resume.json").write_bytes(content))


def test_whatever_is_wrong_in_a_resume_json_without_a_digest_the_checkpoint_before_is_used(tmp_path):
    save(tmp_path, 1, 2)
    path = tmp_path / "checkpoint-2"
    content = old_form(path)
    for change in CHANGES.values():
        changed = json.loads(json.dumps(content))
        change(changed)
        (path / "resume.json").write_text(json.dumps(changed))
        with pytest.raises(Damaged, match="is damaged"):
            restore(path, LIKE)
    assert newest(tmp_path) == "checkpoint-1"


def lose_state(path):
    (path / "state").rename(path.parent / "elsewhere")


def empty_state(path):
    lose_state(path)
    (path / "state").mkdir()


def other_state(path):
    lose_state(path)
    (path.parent / "checkpoint-1" / "state" / "_METADATA").read_bytes()
    saver = Checkpointer(path.parent / "more")
    saver.save(2, {"a": STATE["a"] + 1, "b": STATE["b"]}, meta(2), lambda _: None)
    saver.close()
    (path.parent / "more" / "checkpoint-2" / "state").rename(path / "state")


HARM = {
    "resume.json missing": lambda path: (path / "resume.json").unlink(),
    "resume.json a folder": lambda path: ((path / "resume.json").unlink(), (path / "resume.json").mkdir()),
    "state missing": lose_state,
    "state empty": empty_state,
    "state of another": other_state,
    "metadata garbled": lambda path: (path / "state" / "_METADATA").write_bytes(b"\xff{"),
    "manifest empty": lambda path: (path / "state" / "manifest.ocdbt").write_bytes(b""),
}


@pytest.mark.parametrize("harm", HARM)
def test_whatever_is_lost_of_a_checkpoint_the_one_before_is_used(harm, tmp_path):
    falls_back(tmp_path, HARM[harm])


def test_a_damaged_checkpoint_gets_a_name_that_is_free(tmp_path):
    (tmp_path / "checkpoint-2.damaged").mkdir()
    falls_back(tmp_path, lambda path: (path / "resume.json").write_bytes(b""))
    assert (tmp_path / "checkpoint-2.damaged1" / "state").is_dir()


def test_when_all_are_damaged_they_stay_and_the_next_start_says_so_too(tmp_path):
    save(tmp_path, 1, 2)
    for path in find_checkpoints(tmp_path):
        (path / "resume.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="overwrite_output_dir=true"):
            restore_newest(tmp_path, LIKE)
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_checkpoint_of_another_run_is_refused_and_no_older_one_is_tried(tmp_path):
    save(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoint-3" / "resume.json").write_bytes(b"[]")

    def check(path, meta):
        raise CheckpointError(f"{path.name} belongs to another run")

    with pytest.raises(CheckpointError, match=r"^checkpoint-2 belongs to another run"):
        restore_newest(tmp_path, LIKE, check)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("name", ["a[1]", "[[", "a*", "a b%20", "ü", "-x", "q" * 250])
def test_a_folder_may_have_any_name(name, tmp_path):
    folder = tmp_path / name
    save(folder, 1, 2, keep=1)
    assert newest(folder) == "checkpoint-2"


# ---------------------------------------------------------------------- logs


@pytest.mark.parametrize(
    "garbage", [b"\xff\x00\n", b"[]\n", NESTED + b"\n", b'{"current_steps": "x"}\n', b"\0\n", b'{"']
)
def test_a_garbled_log_is_no_reason_to_stop(garbage, tmp_path):
    path = tmp_path / "trainer_log.jsonl"
    lines = [json.dumps({"current_steps": n, "seconds": {"step": 2.0 * n}}) for n in (1, 2, 3)]
    path.write_bytes("\n".join(lines[:2]).encode() + b"\n" + garbage + lines[2].encode())
    assert lost(path, {"step": 1.0}) in (3.0, 5.0)  # the last line may be part of the garbage
    log_file(path, 2)
    assert path.read_text() == "".join(line + "\n" for line in lines[:2])


def test_garbled_results_are_set_aside(tmp_path):
    for content in (b"[]", b'{"a": 1', b"\xff"):
        (tmp_path / "all_results.json").write_bytes(content)
        assert read_results(tmp_path) == {}
        assert (tmp_path / "all_results.json.damaged").read_bytes() == content


def test_a_full_disk_is_explained_wherever_it_is_met_and_its_file_is_named(tmp_path, monkeypatch):
    def fail(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(CheckpointError) as found, files.full_disk_explained():
        results.write_json(tmp_path / "run.json", {})
    assert str(found.value).startswith(f"No space left on device: {tmp_path / 'run.json'} (")
    assert str(found.value).endswith("\nThe checkpoints are complete: make room, and start the same command again.")
    with pytest.raises(FileNotFoundError), files.full_disk_explained():
        (tmp_path / "none").read_bytes()


def test_lines_that_a_full_disk_does_not_take_are_lost_and_the_run_goes_on(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    said = []
    monkeypatch.setattr(results.log, "warning", lambda text, *values: said.append(text % values))
    subscribers = [logs.samples_file(tmp_path / "samples.jsonl", 0), terminal.progress_lines(0, out=Full())]
    monkeypatch.setattr(Path, "open", lambda *args, **more: Full())
    sample = {"prompt": "a", "predict": "b", "label": "c"}
    for kind in ("samples", "log", "samples"):
        events.tell(subscribers, events.Event(kind, 1, 2, 0.5, {"samples": [sample], "loss": 1.0}))
    assert said == [f"{tmp_path / 'samples.jsonl'} cannot be written: No space left on device"]
