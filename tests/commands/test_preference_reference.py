"""References of preference runs: in every update or computed before the first, kept on disk, and noticed if moved."""

import json
import shutil

import jax
import numpy as np
import pytest
import small

import jtune
from jtune.cli.main import main
from jtune.config import load_config
from jtune.data import plan_updates
from jtune.evaluation import reference_cache, references
from jtune.evaluation.units import Reference
from jtune.interop import hf
from jtune.loading.data import load_data
from jtune.loading.second import with_second
from jtune.loading.source import read_source
from jtune.models import init_params
from jtune.models.families import decoder_config
from jtune.planning import plan
from jtune.sharding import make_mesh
from jtune.stages import stage_of

RUN = {
    "stage": "dpo", "dataset": "pairs", "finetuning_type": "lora", "lora_target": "q_proj,v_proj,down_proj",
    "mesh_fsdp": -1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3,
    "save_steps": 2, "val_size": 12, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 3e-2,
    "lr_scheduler_type": "constant", "warmup_ratio": None, "save_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a model and of its data."""
    folder = tmp_path_factory.mktemp("parts")
    answers = small.rows()
    others = [row["output"] for row in answers[1:] + answers[:1]]
    pairs = [
        {"instruction": row["instruction"], "chosen": row["output"], "rejected": other}
        for row, other in zip(answers, others, strict=True)
    ]
    marked = [row | {"kto_tag": i % 3 != 0} for i, row in enumerate(answers)]
    data = small.write_data(folder / "data", pairs=pairs, marked=marked)
    info = json.loads((data / "dataset_info.json").read_text())
    info["pairs"] |= {"ranking": True, "columns": {"chosen": "chosen", "rejected": "rejected"}}
    info["marked"] |= {"columns": {"kto_tag": "kto_tag"}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    return small.write_model(folder / "model"), data


def write_other(folder, seed=7):
    """Another width and depth, a head with rows to spare, and opinions."""
    small.write_model(folder, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, tie_word_embeddings=False)
    config = hf.read_config(folder)
    config["vocab_size"] += 5
    decoder = decoder_config(config)
    params = jax.jit(lambda: init_params(decoder, jax.random.key(seed)))()
    params["lm_head"]["kernel"] *= 20
    hf.save_model(params, decoder, config, folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_other(tmp_path_factory.mktemp("other") / "model")


@pytest.fixture(scope="module")
def adapter(parts, tmp_path_factory):
    """The folder of an adapter that changes what the model says."""
    folder = tmp_path_factory.mktemp("adapter")
    asked = {**RUN, "stage": "sft", "dataset": "dates", "max_steps": 4, "eval_strategy": "no", "val_size": 0}
    assert run(small.case(folder, *parts, **asked | {"learning_rate": 0.1})) == 0
    return folder / "out"


def run(path, *overrides):
    return main(["train", str(path), *overrides])


def figures(folder):
    """What was logged of every update and evaluation but the clock's, without what says nothing."""
    clock = ("runtime", "per_second", "epoch", "logits/")
    history = small.state(folder)["log_history"][:-1]
    return [{k: v for k, v in record.items() if not any(word in k for word in clock)} for record in history]


def assert_near(ours, theirs, tolerance=1e-5):
    assert [record.keys() for record in ours] == [record.keys() for record in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), key


METHODS = {
    "adapter off": {},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "learning_rate": 1e-3},
    "given adapter": {"adapter_name_or_path": "ADAPTER"},
    "start": {"adapter_name_or_path": "ADAPTER", "ref_adapter": "start"},
    "other model": {"ref_model": "OTHER"},
    "base and adapter": {"ref_model_adapters": "ADAPTER"},
    "kto": {"stage": "kto", "dataset": "marked", "ref_model": "OTHER", "ref_model_quantization_bit": 8},
    "streaming": {"ref_model": "OTHER", "streaming": True, "buffer_size": 64},
}
AT_START = ("adapter off", "full", "freeze", "start")  # the reference is the model as it is


@pytest.mark.parametrize("name", [n if n == "start" else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_a_reference_that_is_computed_before_is_the_one_in_the_step(name, parts, adapter, other, tmp_path):
    named = {"ADAPTER": str(adapter), "OTHER": str(other)}
    asked = {key: named.get(value, value) for key, value in METHODS[name].items()}
    before, within = (small.case(tmp_path / folder, *parts, **RUN | asked) for folder in ("before", "within"))
    assert run(before) == 0
    assert run(within, "precompute_ref_log_probs=false") == 0
    found, expected = (figures(tmp_path / folder / "out") for folder in ("before", "within"))
    assert_near(found, expected)
    first = found[0]
    margins = "rewards/margins" if "rewards/margins" in first else "kl"
    if name in AT_START:
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert abs(first[margins]) < 1e-6
    else:
        assert abs(first["loss"] - np.log(2)) > 1e-4 or abs(first[margins]) > 1e-3
    assert found[1]["loss"] != first["loss"]


@pytest.mark.slow
def test_the_reference_is_another_model_by_the_formula(parts, other, tmp_path):
    """The first margin, of logits of both models."""
    path = small.case(tmp_path, *parts, **RUN | {"ref_model": str(other), "max_steps": 1, "eval_strategy": "no"})
    assert run(path) == 0
    first = figures(tmp_path / "out")[0]
    config = load_config([str(path)], command="train")
    tokenizer = jtune.load_tokenizer(str(parts[0]))
    encoded = load_data(config, tokenizer, 10**6).train
    sums = {}
    for folder in (parts[0], other):
        model, params = jtune.load_model(str(folder))
        logits = jax.jit(model.apply)
        for side, rows in (("chosen", encoded), ("rejected", encoded.rejected)):
            pad = lambda x, fill: np.pad(x, (0, 64 - len(x)), constant_values=fill)
            chosen = plan_updates(config, encoded, 8, None).examples(0)
            ids = np.stack([pad(rows[int(i)]["input_ids"], 0) for i in chosen])
            labels = np.stack([pad(rows[int(i)]["labels"], -100) for i in chosen])[:, 1:]
            logs = np.asarray(jax.nn.log_softmax(logits({"params": params}, ids)[:, :-1]), np.float64)
            picked = np.take_along_axis(logs, np.maximum(labels, 0)[..., None], -1)[..., 0]
            sums[folder, side] = np.sum(np.where(labels != -100, picked, 0), -1)
    ratio = {side: sums[parts[0], side] - sums[other, side] for side in ("chosen", "rejected")}
    assert first["rewards/margins"] == pytest.approx(0.1 * np.mean(ratio["chosen"] - ratio["rejected"]), rel=1e-4)
    assert first["rewards/chosen"] == pytest.approx(0.1 * np.mean(ratio["chosen"]), rel=1e-4)


@pytest.mark.slow
def test_sums_are_kept_and_a_moved_reference_is_noticed(parts, other, tmp_path, capsys, monkeypatch):
    asked = RUN | {"ref_model": str(other), "save_strategy": "steps"}
    whole, cut = (small.case(tmp_path / name, *parts, **asked) for name in ("whole", "cut"))
    made = []
    real = references.make_reference
    monkeypatch.setattr(references, "make_reference", lambda *a: made.append(a) or real(*a))
    assert run(whole, "overwrite_cache=true") == 0
    assert len(made) == 2  # of the training rows, and of those held out
    out, again = tmp_path / "whole" / "out", tmp_path / "cut" / "out"
    # Neither a run that goes on, nor another one with other arguments, runs the reference again.
    shutil.copytree(out / "checkpoint-2", again / "checkpoint-2")
    capsys.readouterr()
    assert run(cut) == 0
    assert "rows (train), from " in "".join(capsys.readouterr())
    assert figures(out) == figures(again)
    assert (out / "adapter_model.safetensors").read_bytes() == (again / "adapter_model.safetensors").read_bytes()
    assert run(small.case(tmp_path / "third", *parts, **asked), "pref_beta=0.3") == 0
    assert len(made) == 2
    # The same weights elsewhere are the same reference; other weights are another run.
    for name, code, computed in (("moved", 0, 2), ("changed", 5, 4)):
        folder = tmp_path / name
        shutil.copytree(other, folder) if name == "moved" else write_other(folder, seed=8)
        shutil.rmtree(again)
        shutil.copytree(out / "checkpoint-2", again / "checkpoint-2")
        capsys.readouterr()
        assert run(cut, f"ref_model={folder}") == code
        assert len(made) == computed
    assert "teacher or reference: " in "".join(capsys.readouterr())


@pytest.mark.slow
def test_a_second_model_is_given_up_when_its_sums_are_known(parts, other, tmp_path):
    path = small.case(tmp_path, *parts, **RUN | {"ref_model": str(other)})
    config, mesh = load_config([str(path), "overwrite_cache=true"], command="train"), make_mesh()
    source = with_second(read_source(config))
    splits = load_data(config, source.tokenizer, source.vocab_size)
    objective = stage_of("dpo").objective(config.finetuning, config.training)
    before = sum(x.nbytes for x in jax.live_arrays())
    found = references.of_second(config, source, splits, mesh, objective)
    assert {name: x.first.shape for name, x in found.sums.items()} == {"train": (108, 2, 2), "eval": (12, 2, 2)}
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 1024
    within = load_config([str(path), "precompute_ref_log_probs=false"], command="train")
    assert references.of_second(within, source, splits, mesh, objective) is None  # the step needs it


def test_processes_read_sums_only_if_all_have_the_same(tmp_path, monkeypatch):
    config = load_config([f"compile_cache_dir={tmp_path}", "model_name_or_path=m"], command="plan")
    units = type("Units", (), {"counts": np.zeros((3, 2)), "mismatched": None, "__len__": lambda _: 3})()
    made = []

    def compute():
        made.append(Reference(np.full((3, 2, 2), len(made), np.float32)))
        return made[-1]

    keep = lambda: reference_cache.kept(config, "train", "key", units, compute).first[0, 0, 0]
    assert (keep(), keep(), len(made)) == (0, 0, 1)
    monkeypatch.setattr(reference_cache.exchange, "all_gather", lambda _, mine: [mine, "none"])  # another has no file
    assert (keep(), len(made)) == (1, 2)
    monkeypatch.setattr(reference_cache.processes, "is_first", lambda: False)
    assert keep() == 2
    monkeypatch.setattr(reference_cache.exchange, "all_gather", lambda _, mine: [mine, mine])
    assert (keep(), len(made)) == (1, 3)  # the first has written


@pytest.mark.slow
def test_a_damaged_file_of_sums_is_made_again(parts, tmp_path, monkeypatch):
    path = small.case(tmp_path, *parts, **RUN | {"compile_cache_dir": str(tmp_path / "cache"), "max_steps": 1})
    assert run(path, "eval_strategy=no", "val_size=0", "do_eval=false") == 0
    (file,) = (tmp_path / "cache" / "references").iterdir()
    before = file.read_bytes()
    units = type("Units", (), {"counts": np.zeros((120, 2)), "mismatched": None})
    assert reference_cache.read(file, units).first.shape == (120, 2, 2)
    for damage in (before[:-50], b"", before.replace(before[300:304], b"\xff\xff\xff\xff")):
        file.write_bytes(damage)
        assert reference_cache.read(file, units) is None
    assert run(path, "overwrite_output_dir=true", "eval_strategy=no", "val_size=0", "do_eval=false") == 0
    assert file.read_bytes() == before
    units.counts = np.zeros((119, 2))
    assert reference_cache.read(file, units) is None


@pytest.mark.slow
def test_the_plan_holds_a_reference_only_where_the_step_does(parts, other, tmp_path):
    path = small.case(tmp_path, *parts, **RUN | {"ref_model": str(other), "max_steps": 1})
    of = lambda *asked: plan.plan(load_config([str(path), *asked], command="plan"))["per_device_bytes"]["by_kind"]
    assert of()["second_model"] == 0
    assert of("precompute_ref_log_probs=false")["second_model"] > 0
    assert of("pref_loss=simpo", "ref_model=nowhere")["second_model"] == 0  # it has no reference, and none is read


def test_a_run_that_only_evaluates_has_its_reference(parts, adapter, other, tmp_path):
    asked = {**RUN, "do_train": False, "do_eval": True, "eval_strategy": "no"}
    assert run(small.case(tmp_path / "own", *parts, **asked)) == 0
    assert run(small.case(tmp_path / "other", *parts, **asked, ref_model=str(other))) == 0
    assert run(small.case(tmp_path / "tuned", *parts, **asked, ref_model_adapters=str(adapter))) == 0
    names = "own", "other", "tuned"
    own, *others = (json.loads((tmp_path / name / "out" / "eval_results.json").read_text()) for name in names)
    assert own["eval_loss"] == pytest.approx(np.log(2))
    assert "eval_rewards/margins" not in own  # it is its own reference
    assert all(abs(found["eval_rewards/margins"]) > 1e-3 for found in others)
