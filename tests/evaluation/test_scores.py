"""A reward model scores pairs: what a run predicts, from every folder that holds the model, and after a resume."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from safetensors.numpy import load_file, save_file

from jtune.cli.main import main
from jtune.commands.train import train
from jtune.config import load_config
from jtune.errors import JtuneError
from jtune.interop.value_head import FILE, read_value_head
from jtune.loading.inference import load_model
from jtune.models.decoder import hidden_states
from jtune.models.value_head import score

COUNT = 10  # pairs that are scored


def pairs():
    """The right date is the chosen answer, that of another row the rejected one."""
    rows = small.rows(60)
    others = [*rows[1:], rows[0]]
    ask = lambda row: {"instruction": row["instruction"], "input": row.get("input", "")}
    return [ask(row) | {"chosen": row["output"], "rejected": x["output"]} for row, x in zip(rows, others, strict=True)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model and a dataset_dir with pairs to train on and pairs to score."""
    folder = tmp_path_factory.mktemp("parts")
    data = small.write_data(folder / "data", pairs=pairs(), held=pairs()[-COUNT:])
    info = json.loads((data / "dataset_info.json").read_text())
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    for name in ("pairs", "held"):
        info[name] |= {"ranking": True, "columns": columns}
    (data / "dataset_info.json").write_text(json.dumps(info))
    return small.write_model(folder / "model"), data


def run(folder, model, data, **changes):
    """Train and predict; the folder that was written."""
    options = {"stage": "rm", "dataset": "pairs", "eval_dataset": "held", "val_size": None, "template": "chatml"}
    options |= {"max_steps": 4, "save_steps": 2, "eval_steps": 4, "do_eval": True, "do_predict": True}
    options |= {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "mesh_fsdp": -1}
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    path = small.case(folder, model, data, **options | changes)
    train(load_config([str(path)], command="train"))
    return folder / "out"


def only_scores(folder, model, data, **changes):
    left = {"do_train": False, "dataset": None, "eval_strategy": "no"}
    return run(folder, model, data, **left | changes)


@pytest.fixture(scope="module")
def full(parts, tmp_path_factory):
    return run(tmp_path_factory.mktemp("full"), *parts)


@pytest.fixture(scope="module")
def adapter(full, parts, tmp_path_factory):
    """LoRA on the reward model that full tuning has made."""
    return run(tmp_path_factory.mktemp("lora"), full, parts[1], finetuning_type="lora", lora_rank=2)


def lines(folder):
    return [json.loads(line) for line in (folder / "generated_predictions.jsonl").read_text().splitlines()]


def metrics(folder):
    found = json.loads((folder / "predict_results.json").read_text())
    return {key: value for key, value in found.items() if not key.endswith(("runtime", "per_second"))}


def scores_of(folder, tokenizer_folder):
    """Of each held pair two scores, one text at a time."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model, params = load_model(str(folder))
    params["v_head"] = read_value_head(folder, 32)
    last = jax.jit(lambda ids, length: score(model, params, hidden_states(model, params, ids).x)[0, length - 1])
    found = []
    for row in pairs()[-COUNT:]:
        asked = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        for side in ("chosen", "rejected"):
            text = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{row[side]}<|im_end|>\n"
            ids = tokenizer(text)["input_ids"]
            found.append(last(jnp.asarray([ids + [0] * (64 - len(ids))]), len(ids)))  # no token sees a later one
    return np.array(found).reshape(-1, 2)


def test_predictions_are_the_scores_of_the_pairs_in_their_order(full):
    expected = scores_of(full, full)
    assert [list(line) for line in lines(full)] == [["chosen", "rejected"]] * COUNT
    found = np.array([[line["chosen"], line["rejected"]] for line in lines(full)])
    np.testing.assert_allclose(found, expected, atol=0.005001)
    np.testing.assert_array_equal(found, found.round(2))
    margin = expected[:, 0] - expected[:, 1]
    assert metrics(full)["predict_accuracy"] == pytest.approx(np.mean(margin > 0))
    assert metrics(full)["predict_loss"] == pytest.approx(np.mean(np.logaddexp(0, -margin)), rel=1e-5)
    evaluated = json.loads((full / "eval_results.json").read_text())
    assert evaluated["eval_loss"] == metrics(full)["predict_loss"]
    assert evaluated["eval_accuracy"] == metrics(full)["predict_accuracy"]


@pytest.mark.slow
def test_every_folder_of_a_reward_model_gives_its_scores(full, adapter, parts, tmp_path):
    data = parts[1]
    assert main(["export", str(adapter), f"export_dir={tmp_path / 'exported'}"]) == 0
    shutil.copytree(full / "checkpoint-4", tmp_path / "checkpoint")
    for name, of, model, changes in [
        ("whole", full, full, {}),
        ("last", full, tmp_path / "checkpoint", {}),
        ("adapter", adapter, full, {"finetuning_type": "lora", "adapter_name_or_path": str(adapter)}),
        ("classifier", adapter, tmp_path / "exported", {}),
    ]:
        out = only_scores(tmp_path / name, model, data, **changes)
        assert lines(out) == lines(of), name
        assert metrics(out)["predict_loss"] == pytest.approx(metrics(of)["predict_loss"], rel=1e-5), name
    assert lines(adapter) != lines(full)


@pytest.mark.slow
def test_a_reward_model_resumes_to_the_bit_and_its_head_is_in_every_checkpoint(full, parts, tmp_path):
    run(tmp_path, *parts, max_steps=2)
    out = run(tmp_path, *parts)
    assert {record["step"] for record in small.state(out)["log_history"]} == {1, 2, 3, 4}
    for name in (FILE, "model.safetensors"):
        ours, theirs = load_file(out / name), load_file(full / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
    heads = [load_file(full / f"checkpoint-{step}" / FILE)["v_head.summary.weight"] for step in (2, 4)]
    assert abs(heads[0] - heads[1]).max() > 1e-4
    np.testing.assert_array_equal(heads[1], load_file(full / FILE)["v_head.summary.weight"])


@pytest.mark.slow
def test_a_run_does_not_go_on_from_another_value_head(adapter, full, parts, tmp_path):
    base = shutil.copytree(full, tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "out")
    tensors = load_file(base / FILE)
    save_file({name: x + np.float32(1e-3) for name, x in tensors.items()}, base / FILE)
    with pytest.raises(JtuneError, match="value head"):
        run(tmp_path, base, parts[1], finetuning_type="lora", lora_rank=2, max_steps=6)
