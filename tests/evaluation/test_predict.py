"""Answers to evaluation sets: what is asked, what is written, and how near they are to what was expected."""

import json

import pytest
from small import case, rows, state, write_data, write_model

from jtune.cli.main import main
from jtune.config import load_config
from jtune.data import get_template, load_tokenizer
from jtune.errors import ConfigError, DataError
from jtune.evaluation import text_metrics
from jtune.generation import Sampling, generate
from jtune.loading.data import load_data
from jtune.loading.inference import load_model

TURNS = {
    "instruction": "3",
    "output": "three",
    "system": "Count.",
    "history": [["1", "one"], ["2", "two"]],
}
EIGHT = {"mesh_fsdp": -1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
GREEDY = {"predict_with_generate": True, "do_sample": False, "max_new_tokens": 6, "per_device_eval_batch_size": 1}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    asked = {"instruction": "Which month is it?", "input": "2034-01-28"}
    half = [asked | {"output": "It is January."}, asked | {"output": ""}, asked | {"output": None}]
    data = write_data(folder / "data", few=rows(10), turns=[TURNS], asked=[asked], half=half)
    info = json.loads((data / "dataset_info.json").read_text())
    info["turns"]["columns"] = {"history": "history", "system": "system"}
    (data / "dataset_info.json").write_text(json.dumps(info))
    return write_model(folder / "model"), data


@pytest.fixture
def _metrics():
    for name in text_metrics.LIBRARIES:
        pytest.importorskip(name)


def run(path, *overrides):
    return main(["train", str(path), *overrides])


def predictions(folder):
    return [json.loads(line) for line in (folder / "generated_predictions.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- figures


@pytest.mark.usefixtures("_metrics")
@pytest.mark.parametrize(
    ("answer", "label", "bleu", "rouge_1", "rouge_2", "rouge_l"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 100.0, 100.0, 100.0, 100.0),
        ("the cat sat on a mat.", "A cat is sitting on the mat.", 42.0887, 66.6667, 15.3846, 53.3333),
        ("今天天气很好，我们去公园吧。", "今天天气不错，我们一起去公园散步吧。", 26.7201, 73.6842, 35.2941, 73.6842),  # noqa: RUF001
        ("", "something", 0.0, 0.0, 0.0, 0.0),
        ("something", "", 0.0, 0.0, 0.0, 0.0),
        ("42", "forty-two", 0.0, 0.0, 0.0, 0.0),
        ("a", "a", 35.3553, 100.0, 0.0, 100.0),
        ("Yes.\nIt is 2001-02-03 🙂", "It is  3 February 2001 🙂", 38.2089, 53.3333, 14.2857, 50.0),
    ],
)
def test_figures_are_llamafactorys(answer, label, bleu, rouge_1, rouge_2, rouge_l):
    """The numbers are what the metric of LLaMA-Factory 0.9.5 gives for these texts."""
    found = text_metrics.scores(answer, label)
    assert found == {"bleu-4": bleu, "rouge-1": rouge_1, "rouge-2": rouge_2, "rouge-l": rouge_l}


@pytest.mark.usefixtures("_metrics")
def test_figures_are_means_over_answers():
    found = text_metrics.similarity(["the cat sat on the mat", "42"], ["the cat sat on the mat", "forty-two"])
    assert found == dict.fromkeys(text_metrics.NAMES, 50.0)


def test_a_missing_library_is_named_before_anything_is_read(parts, tmp_path, monkeypatch, capsys):
    find_spec = text_metrics.importlib.util.find_spec
    without = lambda name: None if name == "jieba" else find_spec(name)
    monkeypatch.setattr(text_metrics.importlib.util, "find_spec", without)
    path = case(tmp_path, *parts, **GREEDY, model_name_or_path="/nowhere/at/all")
    assert run(path) == ConfigError.exit_code
    assert "pip install 'jtune-llm[metrics]'" in capsys.readouterr().err


# ---------------------------------------------------------------------- what is asked


def test_the_last_answer_is_asked_for_with_all_before_it_as_its_prompt(parts, tmp_path):
    path = case(tmp_path, *parts, val_size=0, eval_dataset="turns", do_train=False, cutoff_len=256, **GREEDY)
    tokenizer = load_tokenizer(str(parts[0]))
    splits = load_data(load_config([str(path)]), tokenizer, len(tokenizer))
    row = splits.eval[""][0]
    said = ["1", "one", "2", "two", "3"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    prompt = get_template("chatml", tokenizer).prompt(messages, "Count.")
    assert row["input_ids"].tolist()[: len(prompt)] == prompt
    assert row["labels"].tolist()[: len(prompt)] == [-100] * len(prompt)
    assert tokenizer.decode(row["labels"][len(prompt) :]) == "three<|im_end|>\n"


# ---------------------------------------------------------------------- what a run writes


@pytest.mark.usefixtures("_metrics")
def test_predictions_are_written_in_the_order_of_the_rows(parts, tmp_path):
    """Eight devices answer ten rows as one device answers each by itself."""
    path = case(tmp_path, *parts, do_train=False, do_predict=True, dataset=None, val_size=0, eval_strategy="no",
                eval_dataset="few", **EIGHT, **GREEDY)  # fmt: skip
    assert run(path) == 0
    found = predictions(tmp_path / "out")
    tokenizer = load_tokenizer(str(parts[0]))
    template = get_template("chatml", tokenizer)
    model, params = load_model(str(parts[0]))
    greedy = Sampling(max_new_tokens=6, eos_ids=template.stop_ids)
    for line, row in zip(found, rows(10), strict=True):
        prompt = template.prompt([{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}])
        [answer] = generate(model, params, [prompt], greedy)
        assert line["prompt"] == tokenizer.decode(prompt)
        assert line["predict"] == tokenizer.decode(answer, skip_special_tokens=True)
        assert line["label"] == row["output"] + "\n"
    results = json.loads((tmp_path / "out" / "predict_results.json").read_text())
    assert {f"predict_{name}" for name in text_metrics.NAMES} <= results.keys()
    assert {"predict_runtime", "predict_samples_per_second", "predict_steps_per_second"} <= results.keys()
    assert results.items() <= json.loads((tmp_path / "out" / "all_results.json").read_text()).items()
    similar = text_metrics.similarity([line["predict"] for line in found], [line["label"] for line in found])
    assert {name: results[f"predict_{name}"] for name in text_metrics.NAMES} == similar


@pytest.mark.usefixtures("_metrics")
@pytest.mark.parametrize(
    ("name", "labels", "said"),
    [
        ("asked", [""], "eval: no row has an answer: they are answered, and there is no loss, BLEU or ROUGE"),
        (
            "half",
            ["It is January.\n", "", ""],
            "eval: 2 of 3 rows have no answer: they are answered, and loss, BLEU and ROUGE are of the others",
        ),
    ],
)
def test_rows_without_an_answer_are_answered_and_in_no_figure(name, labels, said, parts, tmp_path, capsys):
    path = case(tmp_path, *parts, do_train=False, do_predict=True, do_eval=True, dataset=None, val_size=0,
                eval_strategy="no", eval_dataset=name, **EIGHT, **GREEDY)  # fmt: skip
    assert run(path) == 0
    found = predictions(tmp_path / "out")
    assert [line["label"] for line in found] == labels
    assert {line["prompt"] for line in found} == {found[0]["prompt"]}
    assert found[0]["prompt"].endswith("<|im_start|>assistant\n")
    assert f"warning: {said}" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    measured = {"eval_loss", "eval_perplexity", "eval_bleu-4", "predict_rouge-l"}
    assert measured & results.keys() == (measured if any(labels) else set())
    if any(labels):  # as if the other rows were not there
        assert results["predict_rouge-1"] == text_metrics.scores(found[0]["predict"], labels[0])["rouge-1"]


def test_models_are_not_compared_by_answers_that_no_row_has(parts, tmp_path, capsys):
    path = case(tmp_path, *parts, val_size=0, eval_dataset="asked", max_steps=2, eval_steps=1, save_steps=1,
                load_best_model_at_end=True, **EIGHT, **GREEDY)  # fmt: skip
    assert run(path) == DataError.exit_code
    assert "no row of the evaluation sets has an answer, by which models could be compared" in capsys.readouterr().err


@pytest.mark.usefixtures("_metrics")
def test_answers_are_measured_at_each_evaluation_and_the_best_model_may_be_that_of_the_best_answers(parts, tmp_path):
    how = {"finetuning_type": "lora", "max_steps": 4, "eval_steps": 2, "save_steps": 2, "max_samples": 40}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rouge-l", "do_predict": True}
    path = case(tmp_path, *parts, **how, **best, **EIGHT, **GREEDY)
    assert run(path) == 0
    evaluated = [record for record in state(tmp_path / "out")["log_history"] if "eval_loss" in record]
    assert [record["step"] for record in evaluated] == [2, 4]
    assert all({f"eval_{name}" for name in text_metrics.NAMES} <= record.keys() for record in evaluated)
    best = max(record["eval_rouge-l"] for record in evaluated)
    assert state(tmp_path / "out" / "checkpoint-4")["best_metric"] == best
    assert len(predictions(tmp_path / "out")) == 4
    assert "eval_bleu-4" in json.loads((tmp_path / "out" / "eval_results.json").read_text())


def test_sampled_answers_are_shown_and_written_at_each_evaluation(parts, tmp_path, capsys):
    path = case(tmp_path, *parts, max_steps=4, eval_steps=2, eval_samples=2, overwrite_output_dir=True, **EIGHT)
    for _ in range(2):  # the second time, the first run's are gone
        assert run(path) == 0
        lines = [json.loads(line) for line in (tmp_path / "out" / "eval_samples.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 2, 4, 4]
    assert lines[0]["prompt"] == lines[2]["prompt"] != lines[1]["prompt"]
    assert lines[0]["prompt"].startswith("<|im_start|>user\n")
    shown = capsys.readouterr().out
    assert shown.count(f"expected: {lines[0]['label'].strip()}") >= 4


def test_without_evaluation_sets_training_rows_are_answered(parts, tmp_path):
    path = case(tmp_path, *parts, max_steps=2, eval_steps=2, val_size=0, eval_samples=1, **EIGHT)
    assert run(path) == 0
    assert len((tmp_path / "out" / "eval_samples.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "out" / "eval_results.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_predict": True}, "set predict_with_generate: true"),
        ({"do_predict": True, "predict_with_generate": True, "val_size": 0, "eval_strategy": "no"}, "do_predict needs"),
        ({"predict_with_generate": True, "stage": "pt", "dataset": "texts"}, "only for stage sft"),
        ({"predict_with_generate": True, "num_beams": 2}, "set do_sample: false"),
        ({"eval_samples": 2, "eval_strategy": "no"}, "set eval_strategy: steps"),
        ({"eval_samples": -1}, "at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message, parts, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_config([str(case(tmp_path, *parts, **changes))])


@pytest.mark.slow
@pytest.mark.usefixtures("_metrics")
def test_several_processes_give_the_answers_of_one(parts, tmp_path):
    how = {"do_train": False, "do_predict": True, "dataset": None, "val_size": 0, "eval_strategy": "no"}
    for name, words in (("one", []), ("two", ["--simulate", "2x2"])):
        path = case(tmp_path / name, *parts, eval_dataset="few", **how, **EIGHT, **GREEDY)
        assert run(path, *words) == 0
    assert predictions(tmp_path / "one" / "out") == predictions(tmp_path / "two" / "out")
