"""`jtune plan`: what it says is what `jtune train` would do, and it reads and makes nothing to say it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small
import yaml

from jtune.cli.main import main
from jtune.commands.train import train
from jtune.config import load_config
from jtune.data import Sizes
from jtune.interop import hf, weights
from jtune.loading.model import load_model
from jtune.loading.source import read_bare_source, read_source
from jtune.models import DecoderConfig
from jtune.models.config import Delta, Layer
from jtune.planning import plan
from jtune.planning.advise import changed
from jtune.planning.estimate import Rows, estimate, saved_activations
from jtune.planning.remat import sound_remat
from jtune.planning.shapes import abstract_program, batch_shapes, bytes_by_kind
from jtune.planning.show import overrides, show
from jtune.planning.topology import _jax_plugins
from jtune.sharding import make_mesh
from jtune.train import program
from jtune.train.program import lower_step


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, data): a tiny model with weights, and rows."""
    folder = tmp_path_factory.mktemp("made")
    return small.write_model(folder / "model"), small.write_data(folder / "data")


@pytest.fixture(scope="module")
def only_config(tmp_path_factory):
    """A folder with config.json and nothing else."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "config.json").write_text(json.dumps({**small.CONFIG, "vocab_size": 512}))
    return folder


def configured(only_config: Path, tmp_path: Path, **changes):
    values = {
        "model_name_or_path": str(only_config),
        "finetuning_type": "lora",
        "cutoff_len": 64,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 10,
        "compile_cache_dir": str(tmp_path / "cache"),
        **changes,
    }
    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config([str(path)], command="plan")


def planned(only_config: Path, tmp_path: Path, memory: int | None = None, **changes):
    return plan.plan(configured(only_config, tmp_path, **changes), memory=memory)


def test_a_config_json_is_enough(only_config, tmp_path):
    result = planned(only_config, tmp_path)
    assert result["mesh"] == {**result["mesh"], "data": 1, "fsdp": 8, "tensor": 1}
    assert result["batch"]["shape"] == [2, 16, 64]
    assert "there is no dataset" in result["batch"]["assumed"]
    assert result["steps"] == 10
    assert result["tokens_per_step"] == 2 * 16 * 64
    assert result["flops_per_step"] == pytest.approx(result["flops_per_token"] * 2048)
    sizes = result["per_device_bytes"]
    # Nothing is padded on a CPU: what the compiler counts is what the shapes say.
    assert sum(sizes["by_kind"].values()) == pytest.approx(sizes["arguments"], abs=64)
    assert sizes["by_kind"]["optimizer_state"] > sizes["by_kind"]["adapters"] > 0
    assert sizes["peak"] == sizes["arguments"] + sizes["temporaries"] + sizes["output"] + sizes["code"] - sizes["alias"]
    assert sizes["arguments"] < result["floor_bytes"] <= sizes["peak"]
    assert result["fits"]
    assert result["advice"] == []


def test_planning_neither_reads_weights_nor_makes_arrays(made, tmp_path, monkeypatch):
    model, data = made
    monkeypatch.setattr(hf, "load_params", lambda *_, **__: pytest.fail("weights are read"))
    monkeypatch.setattr(weights, "map_files", lambda *_, **__: pytest.fail("weights are read"))
    monkeypatch.setattr(hf, "map_files", lambda *_, **__: pytest.fail("weights are read"))
    before = sum(x.nbytes for x in jax.live_arrays())
    plan.plan(load_config([str(small.case(tmp_path, model, data, mesh_fsdp=-1))], command="plan"))
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 1024


@pytest.mark.parametrize(
    "method",
    [
        {"finetuning_type": "full"},
        {"finetuning_type": "lora", "lora_dropout": 0.1, "packing": True},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "freeze_extra_modules": "norm"},
        pytest.param({"finetuning_type": "lora", "quantization_bit": 4}, marks=pytest.mark.slow),
    ],
    ids=["full", "lora", "freeze", "quantised"],
)
def test_what_is_planned_is_what_is_trained(made, tmp_path, monkeypatch, method):
    seen = []
    lower = lower_step

    def record(program, batch, label_capacity):
        leaves = jax.tree_util.tree_leaves_with_path((program.state, program.constants, dict(batch)))
        what = [(jax.tree_util.keystr(path), x.shape, x.dtype, x.sharding) for path, x in leaves]
        keys = [key is not None for key in (program.dropout_key, program.rounding_key)]
        seen.append(
            (program.module, what, program.mesh, program.objective, program.max_grad_norm, keys, label_capacity)
        )
        return lower(program._replace(dropout_key=None), batch, label_capacity)

    monkeypatch.setattr(program, "lower_step", record)
    case = str(small.case(tmp_path, *made, max_steps=1, eval_strategy="no", save_strategy="no", mesh_fsdp=-1, **method))
    result = plan.plan(load_config([case], command="plan"))
    train(load_config([case], command="train"))
    assert seen[0] == seen[1]
    assert len(seen) == 2
    assert result["batch"]["assumed"] is None
    assert result["steps"] == 1


def test_tokens_and_steps_are_those_of_the_data(made, tmp_path):
    model, data = made
    case = small.case(tmp_path, model, data, max_steps=-1, num_train_epochs=2, val_size=0.0, mesh_fsdp=-1)
    result = plan.plan(load_config([str(case)], command="plan"))
    assert result["steps"] == 2 * math.ceil(120 / (4 * 8 * 2))
    train(load_config([str(case), "do_eval=false", "eval_strategy=no"], command="train"))
    assert result["steps"] == small.state(tmp_path / "out")["global_step"]
    assert 60 * 10 < result["tokens_per_step"] < 64 * 64


def test_an_adapter_is_planned_from_its_config_alone(made, tmp_path):
    model, data = made
    trained = small.case(
        tmp_path, model, data, finetuning_type="lora", lora_rank=3, lora_target="q_proj,up_proj", max_steps=1,
        eval_strategy="no", save_strategy="no", additional_target="norm", mesh_fsdp=-1,
    )  # fmt: skip
    train(load_config([str(trained)], command="train"))
    config_only = tmp_path / "adapter"
    config_only.mkdir()
    (config_only / "adapter_config.json").write_text((tmp_path / "out" / "adapter_config.json").read_text())
    config = load_config(
        [f"model_name_or_path={model}", "finetuning_type=lora", f"adapter_name_or_path={config_only}"], command="plan"
    )
    mesh, source = make_mesh(), read_source(config)
    shapes = abstract_program(config, source, mesh, platform="cpu")
    real = load_model(changed(config, adapter_name_or_path=(str(tmp_path / "out"),)), source, mesh)
    assert jax.tree.structure(shapes.params) == jax.tree.structure(real.params)
    same = lambda x, y: (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
    assert all(jax.tree.leaves(jax.tree.map(same, shapes.params, real.params)))
    assert shapes.mask == real.mask


def test_remat_auto_computes_again_what_memory_makes_necessary(only_config, tmp_path):
    ample = planned(only_config, tmp_path, finetuning_type="full", per_device_train_batch_size=8, cutoff_len=512)
    assert (ample["remat"], ample["fits"]) == ("none", True)
    tight = planned(
        only_config, tmp_path, memory=ample["per_device_bytes"]["peak"] // 4,
        finetuning_type="full", per_device_train_batch_size=8, cutoff_len=512,
    )  # fmt: skip
    assert tight["remat"] in ("dots", "attention", "full")
    assert tight["per_device_bytes"]["peak"] < ample["per_device_bytes"]["peak"]
    asked = planned(only_config, tmp_path, disable_gradient_checkpointing=True, memory=2**20)
    assert asked["remat"] == "none"


def test_a_reward_model_is_planned_without_logits(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**small.CONFIG, "vocab_size": 2**17}))
    needed = {}
    for stage in ("rm", "sft"):
        config = configured(tmp_path, tmp_path, stage=stage)
        shapes = abstract_program(config, read_bare_source(config, tmp_path), make_mesh(), platform="cpu")
        needed[stage] = estimate(shapes, Rows(accum=1, per_shard=1, seq=512, label_share=1.0))["temporaries"]
    assert needed["sft"] - needed["rm"] > 100e6


def test_remat_auto_asks_the_compiler_where_the_estimate_could_be_wrong(only_config, tmp_path):
    config = configured(only_config, tmp_path, finetuning_type="full")
    source = read_bare_source(config, only_config)
    shapes = abstract_program(config, source, make_mesh(), platform="cpu")
    rows = Rows(accum=2, per_shard=8, seq=512, label_share=1.0)
    peak = {
        policy: estimate(shapes._replace(module=shapes.module.clone(remat=policy)), rows)["peak"]
        for policy in ("none", "dots", "attention")
    }
    assert peak["none"] > peak["dots"] > peak["attention"]

    def chosen(usable: int, **compiled: float) -> tuple[str, list[str]]:
        asked = []

        def compiler(policy: str) -> float:
            asked.append(policy)
            return compiled[policy] * usable

        return sound_remat(shapes, rows, usable, compiler), asked

    assert chosen(2 * peak["none"]) == ("none", [])  # clear
    close = int(1.02 * peak["none"])
    assert chosen(close, none=0.94) == ("none", ["none"])
    policy, asked = chosen(close, none=0.96, dots=0.94)
    assert policy == "dots"
    assert asked[0] == "none"
    policy, asked = chosen(close, none=math.inf, dots=math.inf, attention=math.inf)  # refused
    assert policy != "none"
    assert asked[0] == "none"
    policy, asked = chosen(int(0.98 * peak["none"]), dots=0.9)  # too large by arithmetic alone
    assert policy == "dots"
    assert "none" not in asked
    assert chosen(peak["attention"] // 2) == ("full", [])


def test_training_asks_the_compiler_like_the_plan_and_compiles_no_more_for_it(made, tmp_path, monkeypatch, caplog):
    model, data = made
    case = small.case(tmp_path, model, data, max_steps=1, eval_strategy="no", save_strategy="no", mesh_fsdp=-1)
    planned = plan.plan(load_config([str(case)], command="plan"))
    assert planned["remat"] == "none"
    usable = int(planned["per_device_bytes"]["peak"] / 0.94)
    monkeypatch.setattr("jtune.commands.train.usable_memory", lambda device: usable)
    monkeypatch.setattr("jtune.planning.remat.MOST_OFF", 100.0)  # arithmetic is sure of nothing
    lowered = []
    lower = lower_step
    monkeypatch.setattr(program, "lower_step", lambda *args, **options: lowered.append(1) or lower(*args, **options))
    with caplog.at_level("INFO", "jtune"):
        train(load_config([str(case)], command="train"))
    assert f"remat: does none fit in {usable / 2**30:.1f} GiB? Asking the compiler" in caplog.text
    assert "remat: none" in caplog.text
    assert len(lowered) == 1  # what the plan found out is kept


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_what_would_help(only_config, tmp_path, capsys):
    changes = {"finetuning_type": "full", "remat": "none", "per_device_train_batch_size": 8, "cutoff_len": 512}
    result = planned(only_config, tmp_path, memory=2**22, **changes)
    assert not result["fits"]
    assert len(result["advice"]) == 3
    saved = [advice["saves_bytes"] for advice in result["advice"]]
    assert saved == sorted(saved, reverse=True)
    assert min(saved) > 0
    # The advice can be typed, and does what it says.
    best = result["advice"][0]
    again = planned(only_config, tmp_path, **changes | best["overrides"])
    peak, predicted = result["per_device_bytes"]["peak"], best["saves_bytes"]
    assert peak - again["per_device_bytes"]["peak"] > predicted / 2
    show(result)
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said
    assert overrides(best["overrides"]) in said


@pytest.mark.slow
def test_the_search_gives_settings_that_fit_and_keep_the_rows_of_an_update(only_config, tmp_path):
    config = configured(only_config, tmp_path, per_device_train_batch_size=16, cutoff_len=256, finetuning_type="full")
    whole = plan.plan(config)
    memory = whole["per_device_bytes"]["peak"] // 2
    result = plan.plan(config, fit=True, memory=memory)
    assert result["fits"]
    assert result["per_device_bytes"]["peak"] <= memory
    found = result["fit"]["overrides"]
    rows = found["per_device_train_batch_size"] * found["gradient_accumulation_steps"]
    assert rows * found["mesh_data"] * found["mesh_fsdp"] == 16 * 2 * 8
    assert len(result["fit"]["tried"]) <= plan.MOST_COMPILES
    by_hand = plan.plan(changed(config, **found), memory=memory)
    assert by_hand["per_device_bytes"] == result["per_device_bytes"]


def test_the_second_plan_of_a_step_compiles_nothing(only_config, tmp_path, monkeypatch):
    first = planned(only_config, tmp_path)
    monkeypatch.setattr(program, "lower_step", lambda *_, **__: pytest.fail("compiled again"))
    second = planned(only_config, tmp_path, learning_rate=1.0, output_dir="elsewhere")
    assert (first.pop("cached"), second.pop("cached")) == (False, True)
    assert first == second
    with pytest.raises(pytest.fail.Exception):
        planned(only_config, tmp_path, lora_rank=4)


@pytest.mark.slow
def test_json_is_all_there_is_on_stdout(only_config, tmp_path):
    case = [f"model_name_or_path={only_config}", f"compile_cache_dir={tmp_path}", "cutoff_len=32"]
    done = command("plan", *case, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"mesh", "per_device_bytes", "device_memory_bytes", "fits", "flops_per_step", "tokens_per_step"} <= {*result}
    assert {"seconds_per_step", "utilisation", "steps", "checkpoint_bytes", "advice", "compile_seconds"} <= {*result}
    assert {"arguments", "temporaries", "output", "alias", "peak", "by_kind"} <= {*result["per_device_bytes"]}


def command(*words: str) -> subprocess.CompletedProcess:
    # The TPU compiler ends a process that names flags it does not know.
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    return subprocess.run([sys.executable, "-m", "jtune.cli.main", *words], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["v5z:4x4", "v5e", "v5e:4", "v5e:ax4", "v5e:4x4x4x4", "rtx:1"])
def test_topologies_that_are_not_are_refused(name, only_config, capsys, monkeypatch):
    monkeypatch.setattr("jtune.planning.topology.compile_here_for", lambda topology: None)
    assert main(["plan", f"model_name_or_path={only_config}", "--topology", name]) == 2
    assert "v5e:4x4" in capsys.readouterr().err


def test_without_the_tpu_compiler_it_says_what_to_install(only_config, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", f"model_name_or_path={only_config}", "--topology", "v5e:4x4"]) == 2
    assert "pip install 'jtune-llm[tpu]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["h100", "h100:0", "h100:x", "a100:12"])
def test_numbers_of_gpus_that_are_none_are_refused(name, only_config, capsys, monkeypatch):
    monkeypatch.setattr("jtune.planning.topology.compile_here_for", lambda topology: None)
    assert main(["plan", f"model_name_or_path={only_config}", "--topology", name]) == 2
    assert "a number of GPUs, whole hosts of eight above eight" in capsys.readouterr().err


def test_without_the_gpu_compiler_it_says_what_to_install(only_config, capsys, monkeypatch):
    monkeypatch.setattr("jtune.planning.topology._jax_plugins", list)
    assert main(["plan", f"model_name_or_path={only_config}", "--topology", "h200:1"]) == 2
    assert "pip install 'jtune-llm[plan-gpu]'" in capsys.readouterr().err


def test_a_mesh_that_does_not_match_is_refused_before_anything_is_read(only_config, capsys):
    assert main(["plan", f"model_name_or_path={only_config}", "mesh_tensor=3"]) == 2
    assert "mesh_tensor=3" in capsys.readouterr().err


def test_bytes_are_those_of_the_shards(only_config, tmp_path):
    config = configured(only_config, tmp_path, finetuning_type="full")
    source = read_bare_source(config, only_config)
    mesh = make_mesh(fsdp=4, tensor=2)
    shapes = abstract_program(config, source, mesh, platform="cpu")
    real = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes.state.trainable)
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(real))
    found = bytes_by_kind(shapes, batch_shapes((1, 8, 64), Sizes(8 * 64), mesh))
    assert found["trained_parameters"] == here
    assert found["optimizer_state"] == 2 * here + 4  # two moments and a count


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_is_compiled_for_tpus_that_are_not_here(only_config, tmp_path, method):
    pytest.importorskip("libtpu")
    case = [f"model_name_or_path={only_config}", f"compile_cache_dir={tmp_path}", f"finetuning_type={method}"]
    case += ["cutoff_len=256", "bf16=true", "per_device_train_batch_size=2", "max_steps=5"]
    done = command("plan", *case, "--json", "--topology", "v5e:2x2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["device_kind"] == "TPU v5 lite"
    assert result["devices"] == 4
    assert result["device_memory_bytes"] == 16 * 2**30
    assert result["fits"]
    assert result["per_device_bytes"]["temporaries"] > 0
    assert result["seconds_per_step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "kind", "method"), [("h200:1", "H200", "lora"), ("a100:8", "A100", "full")])
def test_a_step_is_compiled_for_gpus_that_are_not_here(only_config, tmp_path, topology, kind, method):
    if not _jax_plugins():
        pytest.skip("no compiler for GPUs here (jax[cuda12-local])")
    case = [f"model_name_or_path={only_config}", f"compile_cache_dir={tmp_path}", f"finetuning_type={method}"]
    case += ["cutoff_len=256", "bf16=true", "per_device_train_batch_size=2", "max_steps=5"]
    done = command("plan", *case, "--json", "--topology", topology)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert kind in result["device_kind"]
    assert result["devices"] == int(topology[-1])
    assert result["usable_memory_bytes"] == int(0.9 * result["device_memory_bytes"]) > 60 * 2**30
    assert result["fits"]
    assert result["per_device_bytes"]["temporaries"] > 0
    assert result["seconds_per_step"] > 0


@pytest.mark.slow
def test_what_the_tpu_compiler_refuses_does_not_fit(only_config, tmp_path):
    pytest.importorskip("libtpu")
    case = [f"model_name_or_path={only_config}", f"compile_cache_dir={tmp_path}", "remat=none", "bf16=true"]
    case += ["cutoff_len=8192", "per_device_train_batch_size=128"]
    done = command("plan", *case, "--json", "--topology", "v5e:2x2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert not result["fits"]
    assert "memory" in result["refused"]
    assert result["per_device_bytes"]["peak"] > result["device_memory_bytes"]
    assert "per_device_train_batch_size" in str(result["advice"])


def test_what_delta_layers_keep_is_estimated_layer_by_layer():
    def kept(remat, *linear, split=1):
        decoder = DecoderConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, layers=tuple(Layer(linear=x) for x in linear),
            delta=Delta(key_heads=2, value_heads=4, key_dim=8, value_dim=16, taps=4, joined=True),
        )  # fmt: skip
        return saved_activations(decoder, remat, tokens=100, seq=100, itemsize=2, split=split)

    for remat in ("none", "dots", "attention", "full"):
        assert kept(remat, True, False) == (kept(remat, True, True) + kept(remat, False, False)) / 2
    assert kept("full", True, True) == kept("attention", True, True) == 2 * 100 * 32 * 2
    # Of the products: queries and keys of 2 heads, values and gates of 4, gate and up of the MLP.
    assert kept("dots", True, True) == 2 * 100 * 2 * (3 * 32 + 2 * 16 + 2 * 64 + 2 * 64)
    # The rule in float32: of 4 heads 8 times a key, 6 times a value, 6 rows of a chunk, a share of the state.
    rule = 4 * (8 * 8 + 6 * 16 + 6 * 64 + 8 * 16 // 64)
    assert kept("none", True, True, split=2) == 2 * 100 * (2 * 4 * 32 + (2 * (2 * 160 + 3 * 64) + 4 * rule) // 2)


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/a/b", {"a/b/memory.max": "1610612736"}, 1610612736),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "2147483648", "memory.max": "max"}, 2**31),
        ("0::/a/b", {"a/b/memory.max": "3221225472", "a/memory.max": "1073741824"}, 2**30),
        ("0::/", {"memory.max": "1073741824"}, 2**30),  # in a container with its own view of groups
        ("0::/not/here", {"memory.max": "1073741824"}, 2**30),
        ("1:cpu:/a\n2:hugetlb,memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": "1073741824"}, 2**30),
        ("2:memory:/not/here", {"memory/memory.limit_in_bytes": "1073741824"}, 2**30),
        ("2:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),  # version 1's "none"
        ("0::/a", {"a/memory.max": "max"}, None),
        ("0::/a", {}, None),
        (None, {}, None),
    ],
)
def test_the_limit_of_a_container_is_the_memory_there_is(tmp_path, groups, files, limit):
    from jtune.planning.chips import host_memory

    if groups is not None:
        (tmp_path / "cgroup").write_text(groups + "\n")
    for name, content in files.items():
        path = tmp_path / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host_memory(tmp_path, tmp_path / "mounted") == (whole if limit is None else min(limit, whole))


def test_the_devices_of_a_cpu_share_what_the_container_may_have(monkeypatch):
    import jax

    from jtune.planning import chips

    monkeypatch.setattr(chips, "host_memory", lambda: 1536 * 2**20)
    assert chips.usable_memory(jax.devices("cpu")[0]) == 1536 * 2**20 // jax.local_device_count()
