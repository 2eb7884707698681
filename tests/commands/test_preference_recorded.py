"""The recorded runs of LLaMA-Factory 0.9.5 in the stages of preferences, on its own YAML, unchanged but for folders."""

import json
import subprocess
import sys

import pytest
import yaml
from small import state, train

CASES = {"dpo_lora": 200, "dpo_full_ftx": 21, "orpo_full": 90, "kto_lora": 180, "rm_lora": 90}  # rows of training
TOLERANCES = {"learning_rate": 1e-9, "grad_norm": 1e-3}  # relative; of other figures 1e-4
# Differences of sums of log-probabilities in the thousands, which float32 knows to 0.0002; rewards are a tenth of them.
ROUNDED = {"kl": 5e-4, "rewards": 5e-5}
# Means over all logits, padding included; and what the clock says.
LEFT_OUT = ("logits/", "runtime", "per_second", "step")


@pytest.fixture(scope="module")
def checkpoints(reference, tmp_path_factory):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("checkpoints")
    for script, names in (("make_checkpoints.py", ["llama", "qwen2"]), ("make_more_checkpoints.py", [])):
        subprocess.run([sys.executable, str(reference / script), str(folder), *names], check=True, capture_output=True)
    return folder


def figures(history):
    """(step, whether of an evaluation) -> what was logged of losses, rates and rewards."""
    found = {}
    for record in history:
        if "train_runtime" not in record and "train_loss" not in record:
            of = found.setdefault((record["step"], "eval_loss" in record), {})
            of.update({k: v for k, v in record.items() if not any(word in k for word in LEFT_OUT)})
    return found


def expected_figures(history, content, rows):
    """LLaMA-Factory's figures by jtune's names. Its `kl` is a sum over microbatches, and has no `eval_`."""
    found = figures(history)
    evaluated = -(-(content.get("max_samples") - rows) // content.get("per_device_eval_batch_size", 1))
    for (_, of_evaluation), record in found.items():
        if "kl" in record:
            kl = record.pop("kl")
            name, count = ("eval_kl", evaluated) if of_evaluation else ("kl", content["gradient_accumulation_steps"])
            record[name] = kl / count
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_losses_and_rewards_are_llamafactorys(name, reference, checkpoints, tmp_path):
    content = yaml.safe_load((reference / "cases" / f"{name}.yaml").read_text())
    here = {"dataset_dir": str(reference / "data"), "output_dir": str(tmp_path / "out")}
    for key in ("model_name_or_path", "adapter_name_or_path"):
        if key in content:
            here[key] = str(checkpoints / content[key].split("/")[-1])
    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump(content | here))
    done = train(path)
    assert done.returncode == 0, done.stdout + done.stderr
    ours = figures(state(tmp_path / "out")["log_history"])
    recorded = json.loads((reference / "expected" / f"{name}.json").read_text())["log_history"]
    expected = expected_figures(recorded, content, CASES[name])
    assert ours.keys() == expected.keys()
    for when, record in expected.items():
        for key, value in record.items():
            rounded = ROUNDED.get(key.removeprefix("eval_").split("/")[0], 0.0)
            tolerance = TOLERANCES.get(key, 1e-4)
            assert ours[when][key] == pytest.approx(value, rel=tolerance, abs=rounded), (when, key)
