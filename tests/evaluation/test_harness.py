"""The lm-evaluation-harness on a model: its figures are those that transformers' model would get."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from small import case, rows, write_data, write_model

from jtune.cli.main import main
from jtune.config import load_config
from jtune.errors import ConfigError

pytest.importorskip("lm_eval")

CODE = "from pathlib import Path\nPath({ran!r}).touch()\nfrom transformers import PreTrainedTokenizerFast as Own\n"

TASK = """
task: dates
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return write_model(folder / "model", max_position_embeddings=24), write_data(folder / "data")


@pytest.fixture(scope="module")
def lm(parts, tmp_path_factory):
    from jtune.evaluation.harness import HarnessLM
    from jtune.loading.inference import load

    path = case(tmp_path_factory.mktemp("case"), *parts, mesh_fsdp=-1)
    return HarnessLM(load(load_config([str(path)], command="eval")), 1)


def asked(*args):
    return [SimpleNamespace(args=arg) for arg in args]


def likelihood(torch, model, given, scored):
    """Of the last tokens, by transformers' model, which sees no more than the harness allows."""
    ids = (given + scored)[-25:]
    logits = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)[-len(scored) :]
    target = torch.tensor(scored)[:, None]
    return logits.gather(1, target).sum().item(), bool((logits.argmax(-1) == target[:, 0]).all())


def test_likelihoods_are_those_of_transformers(parts, lm):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(parts[0])
    pairs = [(row["instruction"], " " + row["output"]) for row in rows(12)] + [("", "May"), (" 2001-02-03" * 5, " 03")]
    greedy = lm.generate_until(asked((pairs[0][0], {"until": [], "max_gen_toks": 1})))[0]
    encode = lambda text: lm.tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        for (given, scored), (found, is_greedy) in zip(pairs, lm.loglikelihood(asked(*pairs))):
            ids = encode(given) if given else [lm.prefix_token_id]
            expected = likelihood(torch, model, ids, encode(given + scored)[len(encode(given)) :])
            assert abs(found - expected[0]) < 1e-4
            assert is_greedy == expected[1]
        [(_, is_greedy)] = lm.loglikelihood(asked((pairs[0][0], greedy)))
        assert is_greedy or encode(pairs[0][0] + greedy)[:-1] != encode(pairs[0][0])  # unless it merges with the prompt
        long = " ".join(row["output"] for row in rows(12))
        windows, ids = 0.0, [lm.prefix_token_id, *encode(long)]
        for start in range(0, len(ids) - 1, 24):
            part = ids[start : start + 25]
            windows += likelihood(torch, model, part[:1], part[1:])[0] if len(part) == 25 else 0.0
        rest = (len(ids) - 1) % 24  # the last window has a whole context
        windows += likelihood(torch, model, ids[-25:-rest], ids[-rest:])[0] if rest else 0.0
        [found] = lm.loglikelihood_rolling(asked((long,)))
        assert abs(found - windows) < 1e-4 * abs(windows)


def test_answers_end_where_the_task_says(lm):
    [whole] = lm.generate_until(asked(("2001-02-03", {"until": [], "max_gen_toks": 6, "do_sample": False})))
    stop = whole[2]
    [cut, again] = lm.generate_until(
        asked(*[("2001-02-03", {"until": words, "max_gen_toks": 6}) for words in ([stop], [])])
    )
    assert (cut, again) == (whole.split(stop)[0], whole)
    with pytest.raises(ConfigError, match="no_repeat_ngram_size"):
        lm.generate_until(asked(("a", {"no_repeat_ngram_size": 2})))


@pytest.fixture
def code(parts, tmp_path, monkeypatch):
    """A model and a metric that are code, in the working directory; and the file that the code would make."""
    monkeypatch.chdir(tmp_path)
    ran = tmp_path / "ran"
    model = shutil.copytree(parts[0], tmp_path / "model")
    (model / "own.py").write_text(CODE.format(ran=str(ran)))
    settings = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "code_eval").mkdir()
    (tmp_path / "code_eval" / "code_eval.py").write_text(CODE.format(ran=str(ran)))
    return model, ran


@pytest.mark.parametrize("way", ["tokenizer", "metric", "hub", "name"])
def test_code_of_models_and_metrics_does_not_run_in_a_task(way, code):
    """The harness's own tasks trust the folder of the model that they are asked about, and what the hub has."""
    import evaluate
    from lm_eval.api.registry import get_metric
    from lm_eval.tasks.ruler.common_utils import get_tokenizer

    from jtune.evaluation.harness import Refused, refuse_code

    model, ran = code
    calls = {
        "tokenizer": lambda: get_tokenizer(pretrained=str(model)),
        "metric": lambda: get_metric(str(ran.parent / "code_eval")),
        "hub": lambda: get_metric("someone/metric"),
        "name": lambda: evaluate.load("code_eval"),
    }
    with refuse_code(), pytest.raises(Refused):
        calls[way]()
    assert not ran.exists()


@pytest.mark.parametrize(
    ("metric", "more", "expected"),
    [
        (
            "code_eval",
            "",
            "the harness would run code from elsewhere (code_eval): jtune runs none. Export the model, and",
        ),
        ("acc", "unsafe_code: true", "what the model writes would run as code: jtune runs none. Export"),
        ("acc", "dataset_path: code_eval", "Dataset scripts are no longer supported, but found code_eval.py"),
    ],
)
def test_a_task_that_needs_code_is_refused_by_name(metric, more, expected, parts, lm, code, monkeypatch, caplog):
    from jtune.evaluation import harness

    folder = code[1].parent
    (folder / "dates.jsonl").write_text(json.dumps({"question": "a", "choices": ["b", "c"], "label": 0}) + "\n")
    text = TASK.format(file=folder / "dates.jsonl").replace("metric: acc", f"metric: {metric}")
    (folder / "dates.yaml").write_text(f"{text}{more}\n")
    monkeypatch.setattr(harness, "load", lambda config: None)
    monkeypatch.setattr(harness, "HarnessLM", lambda *args: lm)
    monkeypatch.setattr(harness.log, "propagate", True)
    caplog.set_level("INFO", "jtune")
    config = load_config([str(case(folder, *parts, mesh_fsdp=-1))], command="eval")
    with pytest.raises(ConfigError) as found:
        harness.run_tasks(config, ["dates"], include_path=str(folder))
    assert str(found.value).startswith(f"--tasks dates: {expected}")
    assert not code[1].exists()
    assert f"--include_path {folder}: its tasks may run code" in caplog.text


@pytest.mark.slow
def test_a_task_file_of_ones_own_runs(parts, tmp_path, capsys):
    choice = {"choices": [" May", " 3", " It"], "label": 2}
    documents = [{"question": f"{row['instruction']} {row['input']}", **choice} for row in rows(6)]
    (tmp_path / "dates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "dates.yaml").write_text(TASK.format(file=tmp_path / "dates.jsonl"))
    path = case(tmp_path, *parts, mesh_fsdp=-1)
    words = ["--tasks", "dates", "--include_path", str(tmp_path / "tasks"), "--limit", "4"]
    assert main(["eval", str(path), *words]) == 0
    assert "acc" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "eval_tasks.json").read_text())["dates"]
    assert np.isclose(found["acc,none"] * 4, round(found["acc,none"] * 4))
    assert main(["eval", str(path), "--tasks", "datos", *words[2:]]) == ConfigError.exit_code
    assert "no datos" in capsys.readouterr().err
    assert main(["eval", str(path)]) == ConfigError.exit_code
