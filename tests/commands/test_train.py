"""Whole runs: what they write, and how they stop when the input is bad."""

import gzip
import json
import re

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from small import case, curve, rows, state, train, write_data, write_model

from jtune.cli.main import main
from jtune.train.timing import KINDS

EIGHT = {"mesh_fsdp": -1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return write_model(folder / "model"), write_data(folder / "data")


def run(path, *overrides):
    return main(["train", str(path), *overrides])


# ---------------------------------------------------------------------- what a run writes


def test_a_full_run_writes_llamafactorys_files(parts, tmp_path):
    path = case(tmp_path, *parts, compute_accuracy=True, report_to="tensorboard", profile_steps="3-4", **EIGHT)
    assert run(path) == 0
    out = tmp_path / "out"
    for name in (
        *("trainer_state.json", "trainer_log.jsonl", "all_results.json", "train_results.json", "eval_results.json"),
        *("training_loss.png", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ):
        assert (out / name).stat().st_size > 0, name
    assert list((out / "runs").iterdir())
    history = state(out)["log_history"]
    logged = [record for record in history if "loss" in record]
    assert [record["step"] for record in logged] == list(range(1, 13))
    assert {"loss", "grad_norm", "learning_rate", "epoch", "step"} == logged[0].keys()
    evaluated = [record for record in history if "eval_loss" in record]
    assert [record["step"] for record in evaluated] == [6, 12]
    assert {"eval_accuracy", "eval_perplexity", "eval_runtime"} <= evaluated[0].keys()
    assert {"train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"} <= history[-1].keys()
    lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    first = {"current_steps", "total_steps", "loss", "lr", "epoch", "percentage", "elapsed_time", "remaining_time"}
    assert first <= lines[0].keys()
    assert lines[0]["tflops_per_device"] > 0
    seconds = [line for line in lines if "loss" in line][-1]["seconds"]
    assert seconds.keys() == set(KINDS)
    assert min(seconds[kind] for kind in ("startup", "compile", "step", "checkpoint", "evaluation")) > 0
    (trace,) = (out / "profile").rglob("*.trace.json.gz")
    steps = set(re.findall(r'"step_num":\s*"?(\d+)', gzip.decompress(trace.read_bytes()).decode()))
    assert {"3", "4"} <= steps <= {"3", "4", "5", "6"}  # the host is ahead of the devices
    results = json.loads((out / "all_results.json").read_text())
    assert {"train_loss", "eval_loss", "epoch"} <= results.keys()
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert sorted(p.name for p in out.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (12, 3, 6, 9)]
    made = json.loads((out / "jtune.json").read_text())
    assert made["fingerprints"]["data"] == json.loads((out / "run.json").read_text())["identity"]["data"]
    assert made["template"] == "chatml"
    assert json.loads((out / "checkpoint-6" / "jtune.json").read_text()) == made
    # The model that was written is the one that was trained, and it has moved.
    before, after = load_file(parts[0] / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before if "norm" not in name)
    assert load_file(out / "checkpoint-12" / "model.safetensors").keys() == after.keys()


def test_updates_to_trace_that_the_run_does_not_have_are_said(parts, tmp_path, capsys):
    path = case(tmp_path, *parts, **EIGHT)
    refused(capsys, 2, path, "profile_steps=4-3")
    assert run(path, "max_steps=2", "eval_strategy=no", "val_size=0", "do_eval=false", "profile_steps=5-6") == 0
    assert "no update from 5 to 6 was done" in "".join(capsys.readouterr())
    assert not (tmp_path / "out" / "profile").exists()


def test_a_lora_run_writes_a_peft_adapter_and_export_merges_it(parts, tmp_path):
    import jtune

    path = case(tmp_path, *parts, finetuning_type="lora", lora_target="q_proj,v_proj", learning_rate=0.05, **EIGHT)
    assert run(path, "eval_strategy=no", "val_size=0", "do_eval=false") == 0
    out = tmp_path / "out"
    options = json.loads((out / "adapter_config.json").read_text())
    assert (options["r"], options["lora_alpha"], options["target_modules"]) == (8, 16, ["q_proj", "v_proj"])
    assert not (out / "model.safetensors").exists()
    export = tmp_path / "export.yaml"
    asked = {"model_name_or_path": str(parts[0]), "adapter_name_or_path": str(out), "template": "chatml"}
    export.write_text(yaml.safe_dump(asked | {"finetuning_type": "lora", "export_dir": str(tmp_path / "merged")}))
    assert main(["export", str(export)]) == 0
    ids = np.arange(20, dtype=np.int32).reshape(1, 20) % 60
    with_adapter = jtune.load_model(str(parts[0]), adapter=str(out))
    merged = jtune.load_model(str(tmp_path / "merged"))
    base = jtune.load_model(str(parts[0]))
    logits = [model.apply({"params": params}, ids) for model, params in (with_adapter, merged, base)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    assert float(abs(logits[0] - logits[2]).max()) > 1e-2


def test_a_freeze_run_changes_its_layers_only(parts, tmp_path):
    path = case(tmp_path, *parts, finetuning_type="freeze", freeze_trainable_layers=1, **EIGHT)
    assert run(path, "max_steps=2", "eval_strategy=no", "val_size=0", "do_eval=false") == 0
    before, after = load_file(parts[0] / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name.split(".")[2] for name in before if (before[name] != after[name]).any()}
    assert changed == {"2"}
    assert before.keys() == after.keys()


@pytest.mark.parametrize("changes", [{"stage": "pt", "dataset": "texts"}, {"packing": True}, {"neat_packing": True}])
def test_packed_runs_have_one_shape(changes, parts, tmp_path, capsys):
    assert run(case(tmp_path, *parts, **EIGHT, **changes), "max_steps=3", "save_steps=3", "eval_steps=3") == 0
    assert capsys.readouterr().out.count("compiling the step") == 1


def test_the_best_model_is_what_is_written_and_early_stopping_stops(parts, tmp_path):
    # Answers that training never sees: once it has learned which letters dates have, every update makes them worse.
    others = [row | {"output": "???????"} for row in rows(12)]
    path = case(
        tmp_path, parts[0], write_data(tmp_path / "data", others=others), eval_dataset="others", val_size=None,
        eval_steps=2, save_steps=2, learning_rate=0.02, lr_scheduler_type="constant", warmup_ratio=0, max_steps=24,
        load_best_model_at_end=True, early_stopping_steps=2, save_total_limit=1, **EIGHT,
    )  # fmt: skip
    assert run(path) == 0
    found = state(tmp_path / "out")
    assert found["global_step"] < 24
    losses = {r["step"]: r["eval_loss"] for r in found["log_history"] if "eval_loss" in r}
    assert found["best_global_step"] == min(losses, key=losses.get)
    assert found["best_metric"] == min(losses.values())
    best = tmp_path / "out" / f"checkpoint-{found['best_global_step']}" / "model.safetensors"
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(best)
    assert all((ours[name] == theirs[name]).all() for name in ours)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(found["best_metric"], rel=1e-6)


def test_evaluation_alone(parts, tmp_path):
    path = case(tmp_path, *parts, do_train=False, eval_strategy="no", val_size=None, eval_dataset="dates", **EIGHT)
    assert run(path, "do_eval=true", "dataset=null") == 0
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] > 0
    assert not (tmp_path / "out" / "trainer_state.json").exists()


@pytest.mark.slow
def test_eight_devices_log_what_one_does(parts, tmp_path):
    one = case(tmp_path / "one", *parts, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    eight = case(tmp_path / "eight", *parts, **EIGHT)
    for name in ("full", "lora"):
        for path, devices in ((one, 1), (eight, 8)):
            logged(path, f"output_dir={path.parent / name}", f"finetuning_type={name}", devices=devices)
        same_figures(one.parent / name, eight.parent / name)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"packing": True}], ids=str)
def test_devices_that_share_rows_log_what_one_does(changes, parts, tmp_path):
    batch = {"gradient_accumulation_steps": 2, **changes}
    one = case(tmp_path / "one", *parts, per_device_train_batch_size=8, **batch)
    asked = {"per_device_train_batch_size": 2, "mesh_fsdp": 4, "mesh_context": 2, **batch}
    eight = case(tmp_path / "eight", *parts, **asked)
    logged(one, devices=1)
    assert "fsdp 4, context 2" in logged(eight, devices=8)
    same_figures(one.parent / "out", eight.parent / "out")


def logged(path, *words, devices):
    done = train(path, *words, devices=devices)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def same_figures(one, other):
    for key in ("loss", "grad_norm", "eval_loss"):
        ours, theirs = ([r[0] for r in curve(folder, key) if r[0] is not None] for folder in (one, other))
        assert ours
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full_sft", "lora_sft", "freeze_sft", "pt_packed", "toolcall_sft"])
def test_losses_are_llamafactorys(name, reference, tmp_path):
    """The recorded runs of LLaMA-Factory 0.9.5 on its own YAML: five files, unchanged but for their folders."""
    pytest.importorskip("torch")
    import subprocess
    import sys

    content = yaml.safe_load((reference / "cases" / f"{name}.yaml").read_text())
    arch = content["model_name_or_path"].split("/")[-1]
    checkpoints = tmp_path / "checkpoints"
    script = [sys.executable, str(reference / "make_checkpoints.py"), str(checkpoints), arch]
    subprocess.run(script, check=True, capture_output=True)
    folders = {"model_name_or_path": f"{checkpoints}/{arch}", "dataset_dir": str(reference / "data")}
    if "adapter_name_or_path" in content:
        folders["adapter_name_or_path"] = f"{checkpoints}/{arch}-lora"
    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump(content | folders | {"output_dir": str(tmp_path / "out")}))
    done = train(path)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = json.loads((reference / "expected" / f"{name}.json").read_text())["log_history"]
    for key, tolerance in {"loss": 1e-4, "grad_norm": 1e-3, "learning_rate": 1e-9, "eval_loss": 1e-4}.items():
        ours = {r["step"]: r[key] for r in state(tmp_path / "out")["log_history"] if key in r}
        theirs = {r["step"]: r[key] for r in expected if key in r}
        assert ours == pytest.approx(theirs, rel=tolerance), key


# ---------------------------------------------------------------------- bad input


@pytest.fixture
def damaged(parts, tmp_path):
    """A copy of the model, to be changed."""
    import shutil

    return shutil.copytree(parts[0], tmp_path / "damaged")


def refused(capsys, code, path, *overrides):
    assert run(path, *overrides) == code
    said = capsys.readouterr()
    assert "compiling" not in said.out
    return said.err


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("lerning_rate=1", 2, ["lerning_rate", "learning_rate"]),
        ("learning_rate=fast", 2, ["learning_rate", "fast", "number"]),
        ("template=chatmll", 2, ["chatmll", "chatml"]),
        ("lr_scheduler_kwargs={'cycles': 2}", 2, ["lr_scheduler_kwargs", "cycles"]),
        ("finetuning_type=lora lora_target=q_prj", 2, ["q_prj", "q_proj", "down_proj"]),
        ("finetuning_type=lora additional_target=embed", 2, ["additional_target", "embed", "embed_tokens"]),
        ("finetuning_type=freeze freeze_trainable_modules=mpl", 2, ["mpl", "mlp"]),
        ("finetuning_type=freeze freeze_extra_modules=lm_head", 2, ["lm_head", "embed_tokens"]),
        ("mesh_data=3", 2, ["mesh_data=3", "8"]),
        ("dataset=datess", 3, ["datess", "dates"]),
        ("dataset_dir=nowhere", 3, ["nowhere"]),
        ("model_name_or_path=/nowhere/model", 3, ["/nowhere/model"]),
        ("dataset=empty", 3, ["empty"]),
        ("dataset=broken", 3, ["broken.json", "1"]),
        ("dataset=columnless", 3, ["columnless.json", "output", "2"]),
        ("cutoff_len=2", 3, ["cutoff_len"]),
        ("stage=pt dataset=texts cutoff_len=100000", 3, ["cutoff_len"]),
        ("finetuning_type=lora adapter_name_or_path=/nowhere", 3, ["/nowhere"]),
        ("resume_from_checkpoint=/nowhere", 5, ["/nowhere"]),
    ],
)
def test_bad_input_is_refused_before_any_step(override, code, words, parts, tmp_path, capsys):
    model, _ = parts
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c"}]
    data = write_data(tmp_path / "data", empty=[], broken='[{"instruction": "a",]', columnless=rows)
    said = refused(
        capsys, code, case(tmp_path, model, data, **EIGHT), *([override] if "{" in override else override.split())
    )
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), ["layers.1.mlp.up_proj.weight is missing"]),
        (
            lambda t: t.update({"model.norm.weight": np.ones(7, np.float32)}),
            ["model.norm.weight has shape [7]", "[32]"],
        ),
        (lambda t: t.update({"model.extra": np.ones(7, np.float32)}), ["model.extra has no place"]),
    ],
)
def test_weights_that_do_not_fit_are_named(change, words, damaged, parts, tmp_path, capsys):
    tensors = load_file(damaged / "model.safetensors")
    change(tensors)
    save_file(tensors, damaged / "model.safetensors")
    said = refused(capsys, 3, case(tmp_path, damaged, parts[1], **EIGHT))
    for word in words:
        assert word in said


def test_a_vocabulary_smaller_than_the_tokenizers_ids(damaged, parts, tmp_path, capsys):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    assert "vocabulary of 100" in refused(capsys, 3, case(tmp_path, damaged, parts[1], **EIGHT))


def test_an_output_folder_with_another_run_in_it(parts, tmp_path, capsys):
    path = case(tmp_path, *parts, **EIGHT)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer_state.json").write_text("{}")
    said = refused(capsys, 2, path)
    assert "overwrite_output_dir=true" in said
    assert "trainer_state.json" in said


def test_an_earlier_run_is_kept_until_nothing_is_left_that_may_refuse(parts, tmp_path, capsys):
    path = case(tmp_path, *parts, **EIGHT)
    once = ("max_steps=3", "eval_strategy=no", "do_eval=false", "val_size=0")
    assert run(path, *once) == 0
    capsys.readouterr()
    refused(capsys, 3, path, "overwrite_output_dir=true", "dataset=datess")
    refused(capsys, 2, path, "overwrite_output_dir=true", "finetuning_type=lora", "lora_target=q_prj")
    assert (tmp_path / "out" / "checkpoint-3" / "state").is_dir()
    assert run(path, *once, "overwrite_output_dir=true", "save_strategy=no") == 0
    assert "removing 1 checkpoints" in capsys.readouterr().out
    assert not (tmp_path / "out" / "checkpoint-3").exists()


def test_a_launcher_that_starts_again_keeps_this_runs_checkpoints(parts, tmp_path, capsys, monkeypatch):
    once = ("max_steps=3", "eval_strategy=no", "do_eval=false", "val_size=0", "overwrite_output_dir=true")
    path = case(tmp_path, *parts, **EIGHT)
    assert run(path, *once) == 0
    monkeypatch.setenv("JTUNE_RESTARTED", "1")
    assert run(path, *once) == 0
    assert "resumed from" in capsys.readouterr().out


def test_one_of_several_processes_does_not_train_alone(parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JTUNE_NUM_PROCESSES", "2")
    assert "JTUNE_NUM_PROCESSES is set, but not JTUNE_COORDINATOR" in refused(
        capsys, 2, case(tmp_path, *parts, **EIGHT)
    )


def test_a_command_that_is_none(capsys):
    assert main(["trian"]) == 2
    assert "train" in capsys.readouterr().err
    assert main(["train", "nowhere.yaml"]) == 2
    assert main(["train", "--help"]) == 0


def test_losses_that_are_not_finite_stop_the_run_with_the_rows(parts, tmp_path, capsys):
    path = case(
        tmp_path, *parts, learning_rate=1e30, warmup_ratio=0, max_grad_norm=0, lr_scheduler_type="constant", **EIGHT
    )
    assert run(path, "eval_strategy=no", "val_size=0", "do_eval=false") == 4
    said = capsys.readouterr()
    assert "rows" in said.err
    assert "skipped" in said.out


def test_jax_sees_eight_devices():
    assert len(jax.devices()) == 8
