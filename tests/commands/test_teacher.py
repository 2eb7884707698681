"""Runs with a teacher: what they learn, that they resume, and what is refused before weights are read."""

import shutil

import jax
import numpy as np
import pytest
import small

import jtune
from jtune.cli.main import main
from jtune.config import load_config
from jtune.interop import hf
from jtune.loading.data import load_data
from jtune.loading.second import load_second, with_second
from jtune.loading.source import read_source
from jtune.models import init_params
from jtune.models.families import decoder_config
from jtune.planning import plan
from jtune.planning.shapes import abstract_program
from jtune.sharding import make_mesh
from jtune.tuning import is_node

RUN = {
    "mesh_fsdp": -1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 6,
    "save_steps": 2, "eval_strategy": "no", "val_size": 12, "learning_rate": 1e-2,
}  # fmt: skip


def run(path, *overrides):
    return main(["train", str(path), *overrides])


def write_teacher(folder, **changes):
    """Another family, width, depth and number of heads, and a head of its own with rows to spare."""
    changes |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    other = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "tie_word_embeddings": False}
    small.write_model(folder, **other, **changes)
    config = hf.read_config(folder)
    config["vocab_size"] += 5
    decoder = decoder_config(config)
    params = jax.jit(lambda: init_params(decoder, jax.random.key(7)))()
    hf.save_model(params, decoder, config, folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a student and of its data."""
    folder = tmp_path_factory.mktemp("parts")
    return small.write_model(folder / "model"), small.write_data(folder / "data")


@pytest.fixture(scope="module")
def teacher(parts, tmp_path_factory):
    """It has seen the rows."""
    folder = tmp_path_factory.mktemp("teacher")
    begun = write_teacher(folder / "begun")
    assert run(small.case(folder, begun, parts[1], **RUN | {"save_strategy": "no", "max_steps": 10})) == 0
    return folder / "out"


def divergence(path, student, teacher):
    """Mean KL(teacher || student) over the answers of rows that no run has seen, over the ids that both have."""
    config = load_config([str(path), "val_size=12", "do_eval=true"], command="train")
    tokenizer = jtune.load_tokenizer(str(teacher))
    rows = list(load_data(config, tokenizer, 10**6).eval[""])
    padded = lambda name, fill: np.stack([np.pad(x[name], (0, 64 - len(x[name])), constant_values=fill) for x in rows])
    logits = []
    for model, params in (jtune.load_model(str(folder)) for folder in (teacher, student)):
        logits.append(jax.jit(model.apply)({"params": params}, padded("input_ids", 0))[:, :-1])
    common = min(x.shape[-1] for x in logits)
    log_t, log_s = (jax.nn.log_softmax(x[..., :common]) for x in logits)
    counts = padded("labels", -100)[:, 1:] != -100
    return float(np.sum(np.exp(log_t) * (log_t - log_s), -1)[counts].mean())


def test_a_student_comes_nearer_to_its_teacher(parts, teacher, tmp_path, capsys):
    asked = {"teacher_model": str(teacher), "distill_temperature": 1.5, **RUN, "save_strategy": "no"}
    path = small.case(tmp_path, *parts, **asked)
    assert run(path) == 0
    said = "".join(capsys.readouterr())
    assert "KL(teacher, model) at temperature 1.5" in said
    assert "tokens more" not in said  # rows that pad the head are no tokens
    assert divergence(path, tmp_path / "out", teacher) < 0.5 * divergence(path, parts[0], teacher)


@pytest.mark.slow
def test_a_run_with_a_teacher_resumes_to_the_bit_and_another_teacher_is_another_run(parts, teacher, tmp_path, capsys):
    asked = {"teacher_model": str(teacher), **RUN}
    whole, cut = (small.case(tmp_path / name, *parts, **asked) for name in ("whole", "cut"))
    out, again = whole.parent / "out", cut.parent / "out"
    assert run(whole) == 0
    shutil.copytree(out / "checkpoint-4", again / "checkpoint-4")
    assert run(cut) == 0
    kept = lambda folder: [r for r in small.curve(folder, "step", "loss", "grad_norm") if r[1] is not None]
    assert kept(out) == kept(again)
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    for name, code in (("moved", 0), ("other", 5)):  # what counts is what it says, not where it lies
        folder = tmp_path / name
        shutil.copytree(teacher, folder) if name == "moved" else write_teacher(folder, intermediate_size=40)
        shutil.rmtree(again)
        shutil.copytree(out / "checkpoint-4", again / "checkpoint-4")
        capsys.readouterr()
        assert run(cut, f"teacher_model={folder}") == code
    assert "teacher or reference: " in "".join(capsys.readouterr())


@pytest.mark.slow
def test_the_base_with_an_adapter_in_four_bits_teaches_a_new_adapter(parts, tmp_path):
    given = {"finetuning_type": "lora", "lora_target": "q_proj,v_proj", **RUN, "save_strategy": "no"}
    assert run(small.case(tmp_path / "first", *parts, **given | {"max_steps": 3, "learning_rate": 0.05})) == 0
    teacher = {"teacher_model": str(parts[0]), "teacher_model_quantization_bit": 4}
    teacher |= {"teacher_model_adapters": str(tmp_path / "first" / "out")}
    assert run(small.case(tmp_path / "student", *parts, **given | teacher)) == 0
    losses = [r[0] for r in small.curve(tmp_path / "student" / "out", "loss") if r[0] is not None]
    assert 0 < losses[-1] < losses[0]


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.slow
def test_what_is_planned_of_the_teacher_is_what_is_loaded(parts, teacher, tmp_path, bits, monkeypatch):
    asked = {"teacher_model": str(teacher), "teacher_model_quantization_bit": bits, **RUN, "bf16": True}
    config = load_config([str(small.case(tmp_path, *parts, **asked))], command="plan")
    mesh = make_mesh()
    source = with_second(read_source(config))
    assert source.vocab_size == source.decoder.vocab_size < source.second.decoder.vocab_size
    real = load_second(source.second, mesh)
    monkeypatch.setattr(hf, "load_params", lambda *_, **__: pytest.fail("weights are read"))
    program = abstract_program(config, source, mesh, platform="cpu")
    shapes = program.constants.second
    same = lambda x, y: (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
    assert all(jax.tree.leaves(jax.tree.map(same, shapes, real.params)))
    assert program.second == real.module
    assert not any(jax.tree.leaves(real.mask))
    assert {x.dtype.name for x in jax.tree.leaves(real.params)} >= {"bfloat16"}
    result = plan.plan(config)
    sizes = result["per_device_bytes"]
    assert sizes["by_kind"]["second_model"] == sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(real.params)
    )
    assert sum(sizes["by_kind"].values()) == pytest.approx(sizes["arguments"], abs=64)
    alone = plan.plan(load_config([str(tmp_path / "case.yaml"), "teacher_model=null"], command="plan"))
    assert alone["per_device_bytes"]["by_kind"]["second_model"] == 0
    forward = 2 * sum(x.size for x in jax.tree.leaves(real.params, is_leaf=is_node) if len(x.shape) > 2)
    assert result["flops_per_token"] > alone["flops_per_token"] + forward


# ---------------------------------------------------------------------- refused before weights are read


def with_tokens(folder, *tokens, source):
    """The model in `source` with a tokenizer that has other tokens at the end; its table has rows for all."""
    shutil.copytree(source, folder)
    tokenizer = jtune.load_tokenizer(str(source))
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("another tokenizer", ["has another vocabulary", "1 of ", "'<blue>' is id", "not there", "same family"]),
        ("fewer rows", ["rows in its vocabulary", "have ids beyond them", "same family"]),
        ("no folder", ["there is no such folder"]),
        ("no adapter", ["there is no such folder"]),
        ("adapter of another base", ["is it for another model?"]),
        ("no weights", ["safetensors"]),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(case, words, parts, teacher, tmp_path, capsys):
    model, asked = parts[0], {"teacher_model": str(teacher)}
    if case == "another tokenizer":
        model = with_tokens(tmp_path / "blue", "<blue>", source=teacher)
        asked["teacher_model"] = str(with_tokens(tmp_path / "red", "<red>", source=teacher))
    elif case == "fewer rows":
        config = hf.read_config(teacher)
        config["vocab_size"] -= 6
        decoder = decoder_config(config)
        shutil.copytree(teacher, tmp_path / "small")
        hf.save_model(jax.jit(lambda: init_params(decoder, jax.random.key(0)))(), decoder, config, tmp_path / "small")
        asked["teacher_model"] = str(tmp_path / "small")
    elif case == "no folder":
        asked["teacher_model"] = str(tmp_path / "none")
    elif case == "no adapter":
        asked["teacher_model_adapters"] = str(tmp_path / "none")
    elif case == "adapter of another base":
        first = {"finetuning_type": "lora", **RUN, "save_strategy": "no", "max_steps": 1}
        assert run(small.case(tmp_path / "first", *parts, **first)) == 0
        asked["teacher_model_adapters"] = str(tmp_path / "first" / "out")
    else:
        shutil.copytree(teacher, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
        asked["teacher_model"] = str(tmp_path / "bare")
    capsys.readouterr()
    assert run(small.case(tmp_path / "run", model, parts[1], **RUN, **asked)) == 3
    said = "".join(capsys.readouterr())
    assert all(word in said for word in words), said
    early = case in ("another tokenizer", "fewer rows", "no folder", "no adapter")
    assert ("reading weights" in said) != early


@pytest.mark.slow
def test_a_teacher_may_know_more_tokens(parts, teacher, tmp_path, capsys):
    wide = with_tokens(tmp_path / "wide", "<blue>", "<red>", source=teacher)
    assert run(small.case(tmp_path, *parts, **RUN, teacher_model=str(wide)), "max_steps=1") == 0
    assert "knows 2 tokens more" in "".join(capsys.readouterr())
