"""`jtune export` of a reward model: transformers classifies with it, and gives our scores less the bias."""

import json

import jax
import numpy as np
import pytest
import small
import yaml

from jtune.cli.main import main
from jtune.interop import hf, peft
from jtune.interop.classifier import CLASSIFIERS, padding_token
from jtune.interop.value_head import FILE, read_value_head, save_value_head
from jtune.loading.inference import load_model
from jtune.models.decoder import hidden_states
from jtune.models.families import FAMILIES, SAME_AS, decoder_config
from jtune.models.value_head import draw_value_head, score
from jtune.tuning import adapter_mask, lora

TEXTS = ["12 May 2001", "the third of June", "1 2 3"]
FAMILY = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "granite": {"model_type": "granite", "architectures": ["GraniteForCausalLM"]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of each family the folders of a base, and of an adapter with a value head."""
    made = {}
    for name, changes in FAMILY.items():
        folder = tmp_path_factory.mktemp(name)
        base = small.write_model(folder / "base", **changes)
        decoder = decoder_config(hf.read_config(base))
        params, rng = lora.add(hf.load_params(base, decoder), "q_proj,up_proj", rank=2), np.random.default_rng(1)
        draw = lambda x, trains, rng=rng: rng.standard_normal(x.shape, np.float32) if trains else x
        params = jax.tree.map(draw, params, adapter_mask(params))
        peft.save_adapter(params, adapter_mask(params), decoder, folder / "adapter", base=str(base))
        save_value_head(draw_value_head(32, jax.random.key(0)), folder / "adapter")
        made[name] = base, folder / "adapter"
    return made


def export(tmp_path, base, adapter, **options):
    asked = {"model_name_or_path": str(base), "export_dir": str(tmp_path / "out"), "stage": "rm"}
    asked |= {} if adapter is None else {"adapter_name_or_path": str(adapter)}
    (tmp_path / "case.yaml").write_text(yaml.safe_dump(asked | options))
    return main(["export", str(tmp_path / "case.yaml")])


def scores(base, adapter, ids):
    """Our score of the last token of each text."""
    model, params = load_model(str(base), None if adapter is None else str(adapter))
    params["v_head"] = read_value_head(adapter or base, 32)
    last = [score(model, params, hidden_states(model, params, np.array([row])).x)[0, -1] for row in ids]
    return np.array(last)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_classifies_with_our_scores_less_the_bias(family, models, tmp_path, capsys):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    base, adapter = models[family]
    assert export(tmp_path, base, adapter) == 0
    told = capsys.readouterr().out
    out = tmp_path / "out"
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [{"llama": "Llama", "qwen2": "Qwen2"}[family] + "ForSequenceClassification"]
    assert theirs.config.num_labels == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert batch["attention_mask"].min() == 0  # else padding would be no part of this
    with torch.no_grad():
        found = theirs(**batch).logits[:, 0].numpy()
    ids = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    ours = scores(base, adapter, ids)
    bias = float(read_value_head(adapter, 32)["bias"][0])
    assert abs(bias) > 0.01
    np.testing.assert_allclose(found, ours - bias, atol=1e-5)
    assert f"lack the bias, {bias:+.4g}, which changes no comparison" in told
    assert float(told.split("scores of the written model differ by at most ")[1].split()[0]) < 1e-5
    # LLaMA-Factory reads the same folder: a causal model whose head it does not use, and the value head beside it.
    whole = transformers.AutoModelForCausalLM.from_pretrained(out)
    head = read_value_head(out, 32)
    assert head["bias"] == np.float32(bias)
    with torch.no_grad():
        hidden = whole(torch.tensor([ids[0]]), output_hidden_states=True).hidden_states[-1][0, -1].numpy()
    np.testing.assert_allclose(hidden @ head["kernel"][:, 0] + bias, ours[0], atol=1e-5)
    # And so do we: what is exported can be exported again.
    second = tmp_path / "again"
    second.mkdir()
    assert export(second, out, None) == 0
    again = transformers.AutoModelForSequenceClassification.from_pretrained(second / "out")
    with torch.no_grad():
        np.testing.assert_allclose(again(**batch).logits[:, 0].numpy(), found, atol=1e-6)


def test_a_family_without_a_classifier_is_written_as_it_is_with_its_value_head(models, tmp_path, capsys):
    base, adapter = models["granite"]
    assert export(tmp_path, base, adapter) == 0
    told = capsys.readouterr().out
    assert "transformers has no class that gives one score for model_type granite" in told
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["GraniteForCausalLM"]
    ids = [[5, 9, 12, 7]]
    np.testing.assert_allclose(scores(tmp_path / "out", None, ids), scores(base, adapter, ids), atol=1e-5)


def test_without_a_value_head_there_is_no_reward_model_and_one_that_is_left_out_is_named(models, tmp_path, capsys):
    base, adapter = models["llama"]
    assert export(tmp_path, base, None) == 3
    assert "there is no value_head.safetensors in" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()
    assert export(tmp_path, base, adapter, stage="sft") == 0
    assert "is left out: `stage: rm` exports the reward model" in capsys.readouterr().out
    assert export(tmp_path, base, adapter) == 0
    assert (tmp_path / "out" / FILE).exists()
    assert export(tmp_path, base, adapter, stage="sft") == 0
    assert not (tmp_path / "out" / FILE).exists()  # it would be read as that of this model


def test_the_table_of_classifiers_is_that_of_transformers():
    pytest.importorskip("torch")
    from transformers.models.auto import modeling_auto

    theirs = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    ours = {name: f"{stem}ForSequenceClassification" for name, stem in CLASSIFIERS.items()}
    assert ours == {name: theirs[name] for name in (*FAMILIES, *SAME_AS) if name in theirs}


def test_padding_is_no_token_that_ends_a_text():
    class Tokenizer:
        pad_token, unk_token, bos_token = "</s>", None, "<s>"

        def __init__(self, *more):
            self.vocabulary = {token: i for i, token in enumerate(("<s>", "</s>", *more))}

        def get_vocab(self):
            return self.vocabulary

    assert padding_token(Tokenizer(), ends=()) == "</s>"
    assert padding_token(Tokenizer("<pad>"), ends=(1,)) == "<pad>"
    assert padding_token(Tokenizer("<pad>"), ends=(1, 2)) == "<s>"
    assert padding_token(Tokenizer(), ends=(0, 1)) is None
