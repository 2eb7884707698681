"""A run that is killed and started again is the run that was never killed, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from safetensors.numpy import load_file
from small import case, command, curve, environment, state, train, write_model, write_preferences

METHODS = {
    "full": {"finetuning_type": "full"},
    "lora": {"finetuning_type": "lora", "lora_dropout": 0.1, "packing": True},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
}
# Of preferences: a reference that is computed before the first update, one in every update, and scores with their head.
PREFERENCES = {
    "dpo": {"stage": "dpo", "dataset": "pairs", "finetuning_type": "lora", "pref_loss": "sigmoid"},
    "dpo-moments": {"stage": "dpo", "dataset": "pairs", "finetuning_type": "lora", "pref_bco_weight": 0.5},
    "kto": {"stage": "kto", "dataset": "marked", "finetuning_type": "lora", "precompute_ref_log_probs": False},
    "rm": {"stage": "rm", "dataset": "pairs", "finetuning_type": "full"},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return write_model(folder / "model"), write_preferences(folder / "data")


def weights(folder):
    files = list(folder.glob("*.safetensors"))
    assert files
    return {f"{file.name} {name}": x for file in files for name, x in load_file(file).items()}


def logged(folder):
    """All that was logged but what the clock says."""
    of_clock = ("runtime", "per_second")
    history = state(folder)["log_history"][:-1]
    return [{k: v for k, v in record.items() if not k.endswith(of_clock)} for record in history]


def assert_same_run(a, b):
    # The last record holds times.
    assert [r for r in curve(a) if r[1] is not None or r[5] is not None] == [
        r for r in curve(b) if r[1] is not None or r[5] is not None
    ]
    assert json.loads((a / "all_results.json").read_text())["train_loss"] == pytest.approx(
        json.loads((b / "all_results.json").read_text())["train_loss"], abs=0
    )
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def kill_when(path, folder, lines=0, delay=0.0, after=None):
    """Start a run; SIGKILL it once it has logged so many lines (and a little later), or written checkpoint `after`."""
    with open(path.parent / "killed.log", "a") as log:
        process = subprocess.Popen(command(path), env=environment(), stdout=log, stderr=log)
    file = folder / "trainer_log.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (folder / after).is_dir() if after else file.exists() and len(file.read_text().splitlines()) >= lines:
            time.sleep(delay)
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (path.parent / "killed.log").read_text()


def killed_and_whole(tmp_path, parts, changes, kills):
    """The output folders of two runs of a case: one whole, one killed after so many lines, a little later, each time.

    They are the same to the bit.
    """
    whole, broken = (case(tmp_path / name, *parts, **changes) for name in ("whole", "broken"))
    done = train(whole)
    assert done.returncode == 0, done.stdout + done.stderr
    out = broken.parent / "out"
    for lines, delay in kills:
        kill_when(broken, out, lines, delay)
    done = train(broken)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in done.stdout
    assert_same_run(whole.parent / "out", out)
    return whole.parent / "out", out


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_again_and_again_the_run_is_the_same_to_the_bit(method, parts, tmp_path):
    # Before the first checkpoint, while one is being written, and between two.
    killed_and_whole(tmp_path, parts, METHODS[method], ((2, 0.0), (4, 0.02), (9, 0.1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", PREFERENCES)
def test_a_run_of_preferences_that_is_killed_is_the_same_to_the_bit(name, parts, tmp_path):
    # The first while it starts.
    whole, out = killed_and_whole(tmp_path, parts, PREFERENCES[name], ((0, 0.5), (4, 0.02), (9, 0.1)))
    assert logged(whole) == logged(out)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_that_is_cut_goes_on_with_the_same_rows_to_the_bit(packing, parts, tmp_path):
    # 110 rows a pass, windows of 32, 24 examples (or rows) an update: cuts in windows, over them, in a second pass.
    changes = {"streaming": True, "buffer_size": 32, "val_size": 10, "packing": packing, "save_steps": 4}
    changes |= {"gradient_accumulation_steps": 6, "eval_strategy": "no", "do_eval": True}
    whole, broken = (case(tmp_path / name, *parts, **changes) for name in ("whole", "broken"))
    done = train(whole)
    assert done.returncode == 0, done.stdout + done.stderr
    out, again = whole.parent / "out", broken.parent / "out"
    for cut in (4, 8):
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(out / f"checkpoint-{cut}", again / f"checkpoint-{cut}")
        assert train(broken).returncode == 0
        assert_same_run(out, again)
        assert json.loads((out / "eval_results.json").read_text())["eval_loss"] == pytest.approx(
            json.loads((again / "eval_results.json").read_text())["eval_loss"], abs=0
        )
    assert [record[4] for record in curve(out)][:3] == pytest.approx([1 / 12, 2 / 12, 3 / 12])
    # Another stream has other rows, although its first window may be the same.
    done = train(broken, "mix_strategy=interleave_under", "resume_from_checkpoint=true")
    assert done.returncode == 5
    assert "order: " in done.stderr


@pytest.mark.slow
def test_a_signal_saves_and_exits_with_75_and_the_same_command_goes_on(parts, tmp_path):
    whole, broken = (case(tmp_path / name, *parts, save_steps=100) for name in ("whole", "broken"))
    assert train(whole).returncode == 0
    out = broken.parent / "out"
    process = subprocess.Popen(command(broken), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (out / "trainer_log.jsonl").exists() or len((out / "trainer_log.jsonl").read_text().splitlines()) < 4:
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0].decode()
    assert process.returncode == 75, said
    assert "the same command goes on" in said
    done = train(broken)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(whole.parent / "out", out)


@pytest.mark.slow
def test_a_run_on_other_inputs_is_not_resumed(parts, tmp_path):
    path = case(tmp_path, *parts)
    kill_when(path, tmp_path / "out", after="checkpoint-3")
    done = train(path, "per_device_train_batch_size=2")
    assert done.returncode == 5
    assert "examples per update" in done.stderr
    assert "overwrite_output_dir=true" in done.stderr


@pytest.mark.slow
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_is_used(parts, tmp_path):
    path = case(tmp_path, *parts)
    kill_when(path, tmp_path / "out", after="checkpoint-6")
    newest = max((tmp_path / "out").glob("checkpoint-*/state"), key=lambda p: int(p.parent.name.split("-")[1]))
    # The largest file holds the arrays.
    file = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    os.chmod(file, 0o644)
    file.write_bytes(content)
    done = train(path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert newest.parent.name in done.stdout
    assert "damaged" in done.stdout
