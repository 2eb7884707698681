"""Whole runs of stages dpo, kto and rm: what they log and write, whatever trains and however rows come."""

import json
import math
import subprocess

import pytest
from small import case, environment, rows, state, train, write_data, write_model
from small import command as command_of

from jtune.cli.main import main

SETS = {"dpo": "pairs", "kto": "marked", "rm": "pairs"}
SHORT = {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "max_samples": 40, "lora_rank": 4}
SHORT |= {"learning_rate": 1e-2, "warmup_ratio": 0.0}
EIGHT = {"mesh_fsdp": -1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    answers = rows()
    of_others = [row["output"] for row in answers[1:] + answers[:1]]
    pairs = [
        {"instruction": row["instruction"], "chosen": row["output"], "rejected": other, "better": 0.5}
        for row, other in zip(answers, of_others, strict=True)
    ]
    marked = [row | {"kto_tag": i % 3 != 0} for i, row in enumerate(answers)]
    data = write_data(folder / "data", pairs=pairs, margins=pairs, marked=marked)
    info = json.loads((data / "dataset_info.json").read_text())
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info["pairs"] |= {"ranking": True, "columns": columns}
    info["margins"] |= {"ranking": True, "columns": columns | {"margin": "better"}}
    info["marked"] |= {"columns": {"kto_tag": "kto_tag"}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    return write_model(folder / "model"), data


def settings(stage, **changes):
    return SHORT | {"stage": stage, "dataset": SETS[stage], "finetuning_type": "lora"} | changes


def run(folder, parts, stage, **changes):
    """The records of training and of evaluations of a run."""
    path = case(folder, *parts, **settings(stage, **EIGHT, **changes))
    assert main(["train", str(path)]) == 0
    history = state(folder / "out")["log_history"]
    return [r for r in history if "loss" in r], [r for r in history if "eval_loss" in r]


def assert_starts_at_its_reference(stage, first):
    """Nothing is learned yet: the first loss is that of a model which is its own reference."""
    if stage == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    if stage == "kto":
        assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    rewards = {name: x for name, x in first.items() if name.startswith("rewards/")}
    assert set(rewards) >= {"rewards/chosen", "rewards/rejected", "rewards/margins"}
    assert max(map(abs, rewards.values())) < 1e-5


@pytest.mark.parametrize("stage", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_a_run_starts_at_its_reference_and_leaves_it(stage, parts, tmp_path):
    trained, (evaluated,) = run(tmp_path, parts, stage)
    assert_starts_at_its_reference(stage, trained[0])
    assert trained[1]["loss"] != pytest.approx(trained[0]["loss"], rel=1e-4)
    assert abs(trained[1]["rewards/margins"]) > 1e-4
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}
    assert {f"eval_{name}" for name in names} <= evaluated.keys()
    assert abs(evaluated["eval_rewards/margins"]) > 1e-4
    lines = [json.loads(line) for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()]
    assert "loss" in lines[0]
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size > 0


METHODS = {
    "full": {"finetuning_type": "full"},
    "full, in the step": {"finetuning_type": "full", "precompute_ref_log_probs": False},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "dora": {"use_dora": True},
    "pissa": {"pissa_init": True},
    "qlora": {"quantization_bit": 4},
    "dropout": {"lora_dropout": 0.1, "precompute_ref_log_probs": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_whatever_trains_starts_at_its_reference(method, parts, tmp_path):
    trained, (evaluated,) = run(tmp_path, parts, "dpo", **METHODS[method])
    if method == "dropout":
        assert trained[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)
    else:
        assert_starts_at_its_reference("dpo", trained[0])
    assert abs(evaluated["eval_rewards/margins"]) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_a_stream_logs_what_a_set_does(stage, parts, tmp_path):
    shared = {"val_size": 8, "max_samples": None, "disable_shuffling": True}
    stream, of_stream = run(tmp_path / "stream", parts, stage, streaming=True, buffer_size=200, **shared)
    assert_starts_at_its_reference(stage, stream[0])
    assert len(of_stream) == 1
    # The first rows are held out of a stream, any of a set: only the form of what is logged is the same.
    on_disk, of_set = run(tmp_path / "set", parts, stage, **shared)
    assert [r.keys() for r in stream] == [r.keys() for r in on_disk]
    assert of_stream[0].keys() == of_set[0].keys()


@pytest.mark.parametrize("command", ["train", "data"])
def test_margins_that_no_loss_reads_are_refused_before_rows_are_read(command, parts, tmp_path, capsys):
    changes = settings("dpo", dataset="margins", pref_loss="hinge, ipo", **EIGHT)
    assert main([command, str(case(tmp_path, *parts, **changes))]) == 3
    said = "".join(capsys.readouterr())
    assert "dataset 'margins': column 'better' is the margin of its pairs, which pref_loss: hinge, ipo does not" in said
    assert "reading dataset" not in said
    assert main(["data", str(case(tmp_path, *parts, **changes | {"pref_loss": "hinge, sigmoid"}))]) == 0
    assert main(["data", str(case(tmp_path, *parts, **changes | {"stage": "rm", "pref_loss": None}))]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "changes", "said", "reference"),
    [
        ("dpo", {}, "8 pairs", 72),
        ("kto", {}, "8 marked answers", 72),  # 36 answers, and as many to other prompts
        ("rm", {}, "8 pairs", 0),
        ("dpo", {"precompute_ref_log_probs": False}, "8 pairs", 0),
        ("dpo", {"dataset": None, "val_size": None, "eval_strategy": None, "max_samples": None}, "8 pairs", 0),
    ],
)
def test_a_plan_counts_pairs_and_references(stage, changes, said, reference, parts, tmp_path, capsys):
    assert main(["plan", str(case(tmp_path, *parts, **settings(stage, **EIGHT) | changes))]) == 0
    out = capsys.readouterr().out
    assert f"update       {said}, " in out
    assert ("reference    " in out) == bool(reference)
    assert f"reference    of {reference} answers, once before the first update" in out or not reference


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "freeze"])
def test_scores_are_learned(method, parts, tmp_path):
    """Eight pairs, by heart."""
    changes = {"finetuning_type": method, "max_samples": 12, "val_size": 4, "learning_rate": 5e-3}
    changes |= {"max_steps": 60, "eval_steps": 60, "save_steps": 60}
    trained, (evaluated,) = run(tmp_path, parts, "rm", **changes)
    assert trained[-1]["loss"] < 0.5
    assert trained[-1]["accuracy"] > 0.7
    assert 0 <= evaluated["eval_accuracy"] <= 1
    assert list((tmp_path / "out").glob("value_head*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_two_processes_log_what_one_does(stage, parts, tmp_path):
    changes = settings(stage, mesh_fsdp=-1)
    one = case(tmp_path / "one", *parts, **changes)
    done = train(one, devices=1)
    assert done.returncode == 0, done.stdout + done.stderr
    two = case(
        tmp_path / "two",
        *parts,
        **changes,
    )
    words = [*command_of(two, "per_device_train_batch_size=2", "per_device_eval_batch_size=4"), "--simulate", "2x1"]
    done = subprocess.run(words, env=environment(1), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (
        [r for r in state(tmp_path / name / "out")["log_history"] if "loss" in r or "eval_loss" in r]
        for name in ("one", "two")
    )
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        of_clock = ("runtime", "per_second")
        for name in a:
            if not name.endswith(of_clock):
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=5e-5), name
