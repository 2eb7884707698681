"""What is written stops where its answers end, and asks as it was trained: the tokenizer's files, config.json and
generation_config.json, in every folder.
"""

import json
import shutil

import pytest
import small
import yaml

from jtune.cli.main import main
from jtune.commands import chat
from jtune.config import load_config
from jtune.data import get_template, load_tokenizer, template_of
from jtune.data.templates import chat_template, jinja_tools
from jtune.data.templates.jinja import to_jinja
from jtune.errors import DataError
from jtune.interop import endings, hf
from jtune.interop.probes import TOOLS
from jtune.loading import vocabulary
from jtune.models.families import decoder_config

OWN = (  # as a base's that ends answers with another token than its eos
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501
MADE = []  # the folder of a model, which is copied
PHI = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
CHAT = chat_template.PROBE[:3]
FUNCTIONS = [{"name": tool["function"]["name"], "arguments": {"city": "Rome"}} for tool in TOOLS]
CALLED = [  # parallel calls
    CHAT[0],
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": x} for x in FUNCTIONS]},
    *({"role": "tool", "content": text} for text in ("dry", "wet")),
]


def make_base(folder, *, eos="<|endoftext|>", template=None, generation=None, special=(), **config):
    """A tiny llama whose eos is not what chatml ends answers with."""
    if not MADE:
        MADE.append(small.write_model(folder.parent / "made"))
    shutil.copytree(MADE[0], folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": tokenizer.eos_token_id} | config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base", generation={"eos_token_id": 0, "top_k": 7})


def export(base, tmp_path, **options):
    asked = {"model_name_or_path": str(base), "export_dir": str(tmp_path / "merged"), **options}
    (tmp_path / "export.yaml").write_text(yaml.safe_dump(asked))
    assert main(["export", str(tmp_path / "export.yaml")]) == 0
    return tmp_path / "merged"


def ends(folder):
    """eos by the tokenizer, config.json, generation_config.json."""
    of = lambda name: json.loads((folder / name).read_text())["eos_token_id"]
    return load_tokenizer(str(folder)).eos_token_id, of("config.json"), of("generation_config.json")


def rendered(folder, messages=CHAT, tools=None):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"]


def settled(base, tmp_path, **options):
    """`endings.settle` of a base, and the tokenizer."""
    asked = {"model_name_or_path": str(base), "export_dir": str(tmp_path / "x")}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(asked | options))
    config = load_config([str(tmp_path / "e.yaml")], command="export")
    source = hf.read_config(base)
    found = vocabulary.resolve_vocabulary(config, base, decoder_config(source))
    template = template_of(config.data, found.tokenizer, for_training=False) if config.data.template else None
    return endings.resolve_endings(config, template, found.tokenizer, found.config_json(source), base), found.tokenizer


# ---------------------------------------------------------------------- folders


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_folder_of_a_run_says_where_answers_end_and_how_to_ask(kind, base, tmp_path):
    data = small.write_data(tmp_path / "data")
    options = {"max_steps": 2, "save_steps": 1, "finetuning_type": kind, "val_size": 0, "eval_strategy": "no"}
    options |= {"mesh_fsdp": -1, "per_device_train_batch_size": 1, "overwrite_output_dir": True}
    out = tmp_path / "out"
    (out / "additional_chat_templates").mkdir(parents=True)  # of another program, that would be read beside ours
    (out / "additional_chat_templates" / "tool_use.jinja").write_text("stale")
    assert main(["train", str(small.case(tmp_path, base, data, **options))]) == 0
    folders = [out / "checkpoint-1", out / "checkpoint-2", out]
    if kind == "lora":
        folders.append(export(base, tmp_path, adapter_name_or_path=str(out), template="chatml"))
    trained = get_template("chatml", load_tokenizer(str(base)))
    for folder in folders:
        assert rendered(folder) == trained.prompt(CHAT)
        assert rendered(folder, CALLED, TOOLS) == trained.prompt(CALLED, None, json.dumps(TOOLS))
        assert isinstance(load_tokenizer(str(folder)).chat_template, str)
        assert load_tokenizer(str(folder)).eos_token == "<|im_end|>"
        if (folder / "config.json").exists():
            assert ends(folder) == (2, 2, [2, 1, 0])
    asked = {"adapter_name_or_path": str(out)} if kind == "lora" else {"model_name_or_path": str(out)}
    if kind == "lora":  # without a template, the adapter's chat template and eos
        shutil.rmtree(folders.pop())
        folder = export(base, tmp_path, adapter_name_or_path=str(out))
        assert rendered(folder) == trained.prompt(CHAT)
        assert ends(folder) == (2, 2, [2, 0])
    path = tmp_path / "chat.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": str(base), **asked}))
    assert asked_by_chat(path, []) == asked_by_chat(path, ["template=chatml"]) == trained.prompt(CHAT)


def asked_by_chat(path, overrides):
    """The prompt that `jtune chat` gives the model."""
    given = []

    def stream(model, params, prompt, sampling, seed):
        assert {2} <= set(sampling.eos_ids)
        given.append(prompt)
        return iter(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "stream", stream)
        list(chat.make_ask(load_config([str(path), *overrides], command="chat"))(CHAT, None, 0).text)
    return given[0]


@pytest.mark.parametrize(
    ("name", "special", "eos"),
    [
        ("llama3", ["<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>"], "<|eot_id|>"),
        ("qwen", [], "<|im_end|>"),
        ("mistral", ["[INST]", "[/INST]"], "<|endoftext|>"),
        ("gemma", ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
        ("phi", PHI, "<|end|>"),
        ("yi", [], "<|im_end|>"),
        ("deepseekcoder", ["<|EOT|>"], "<|EOT|>"),
    ],
)  # fmt: skip
def test_transformers_stops_where_an_answer_of_the_template_ends(name, special, eos, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base", special=special)
    folder = export(base, tmp_path, template=name, resize_vocab=True)
    tokenizer = load_tokenizer(str(folder))
    end, prompt = tokenizer.convert_tokens_to_ids(eos), rendered(folder)
    assert prompt == get_template(name, load_tokenizer(str(base))).prompt(CHAT)
    assert prompt == template_prompt(folder)  # jtune's, of what the folder says

    def say(batch, logits):  # three tokens, then what ends an answer, then others
        length = batch.shape[1] - len(prompt)
        return torch.zeros_like(logits).index_fill_(1, torch.tensor([end if length == 3 else 40]), 100.0)

    model = AutoModelForCausalLM.from_pretrained(folder)
    found = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, logits_processor=[say])
    assert found[0, len(prompt) :].tolist() == [40, 40, 40, end]
    eos, config, generation = ends(folder)
    assert eos == config
    assert {eos, end, 0} <= set(generation if isinstance(generation, list) else [generation])


def template_prompt(folder):
    return get_template(None, load_tokenizer(str(folder)), for_training=False).prompt(CHAT)


# ---------------------------------------------------------------------- ends of answers


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, 0, (2, [2, 1, 0])),
        (None, [0, 7], (2, [2, 1, 0, 7])),
        ({"eos_token_id": None}, 0, (2, [2, 1, 0])),
        ({"eos_token_id": [5, 2, 9], "_from_model_config": True}, 0, (2, [2, 1, 5, 9])),
        ({"eos_token_id": 5}, None, (2, [2, 1, 5])),
    ],
)
def test_the_templates_end_comes_first_and_the_bases_others_stay(generation, config, expected, tmp_path):
    base = make_base(tmp_path / "base", generation=generation, eos_token_id=config)
    found, _ = settled(base, tmp_path, template="chatml")
    own = [2, *config] if isinstance(config, list) else expected[0]
    assert (found.source["eos_token_id"], found.generation["eos_token_id"]) == (own, expected[1])
    assert found.source["pad_token_id"] == found.generation["pad_token_id"] == 0
    assert "_from_model_config" not in found.generation


def test_a_pad_token_that_was_missing_is_the_same_in_all_files(tmp_path):
    base = make_base(tmp_path / "base", generation={"top_k": 7})
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    found, tokenizer = settled(base, tmp_path, template="chatml")
    assert tokenizer.pad_token_id == found.source["pad_token_id"] == found.generation["pad_token_id"] == 2
    assert found.generation["top_k"] == 7


def test_without_a_template_the_bases_own_counts_with_the_token_that_ends_its_answers(tmp_path):
    base = make_base(tmp_path / "base", template=OWN, generation={"eos_token_id": [0, 9]})
    found, tokenizer = settled(base, tmp_path)
    assert (found.source["eos_token_id"], found.generation["eos_token_id"]) == (0, [2, 0, 9])
    assert tokenizer.chat_template == OWN
    plain = make_base(tmp_path / "plain")
    found, tokenizer = settled(plain, tmp_path)
    assert (found.source["eos_token_id"], found.generation["eos_token_id"]) == (0, 0)
    assert tokenizer.chat_template is None


def test_an_end_that_the_model_has_no_row_for_is_refused_and_other_stop_words_are_left_out(tmp_path):
    base = make_base(tmp_path / "base")
    rows = hf.read_config(base)["vocab_size"]
    with pytest.raises(
        DataError, match=rf"template gemma ends answers with <end_of_turn>, .* no row \(it has {rows}\)"
    ):
        settled(base, tmp_path, template="gemma")
    found, _ = settled(base, tmp_path, template="gemma", resize_vocab=True)
    assert found.source["eos_token_id"] >= rows
    grown = make_base(tmp_path / "grown", special=["<|eot_id|>"], vocab_size=rows + 1)
    path = grown / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": rows + 1}))
    found, tokenizer = settled(grown, tmp_path, template="llama3")  # <|eom_id|> has none
    assert tokenizer.convert_tokens_to_ids("<|eom_id|>") == rows + 1
    assert found.generation["eos_token_id"] == [rows, 0]


@pytest.mark.parametrize("content", ["[]", "{", "3"])
def test_a_generation_config_that_is_no_object_is_named(content, tmp_path):
    base = make_base(tmp_path / "base")
    (base / "generation_config.json").write_text(content)
    with pytest.raises(DataError, match=r"generation_config\.json:"):
        settled(base, tmp_path, template="chatml")


# ---------------------------------------------------------------------- chat templates


def test_a_chat_template_of_the_model_that_asks_in_the_same_way_stays(tmp_path, caplog):
    base = make_base(tmp_path / "base")
    tokenizer = load_tokenizer(str(base))
    own = {"default": OWN, "tool_use": to_jinja(get_template("chatml", tokenizer).form, tokenizer)}
    tokenizer.chat_template = own
    tokenizer.save_pretrained(base)
    folder = export(base, tmp_path, template="chatml")
    assert (folder / "additional_chat_templates" / "tool_use.jinja").read_text() == own["tool_use"]
    assert load_tokenizer(str(folder)).chat_template == own
    assert "is written for template" not in caplog.text


def test_a_chat_template_of_the_model_that_writes_tools_in_another_way_is_replaced(tmp_path, caplog):
    base = make_base(tmp_path / "base", template={"default": OWN, "tool_use": "{{ tools }}"})
    with caplog.at_level("INFO", logger="jtune"):
        _, tokenizer = settled(base, tmp_path, template="chatml")
    assert "the model's own chat template writes tools in another way; its others are left out" in caplog.text
    assert "> Tool Name: weather" in tokenizer.apply_chat_template(CHAT, tools=TOOLS[:1], tokenize=False)


def test_tools_that_cannot_be_written_as_they_are_learned_are_refused(tmp_path, caplog, monkeypatch):
    base = make_base(tmp_path / "base")
    monkeypatch.setitem(jinja_tools.CALLS, "default", ("{{- name -}}", "", "", ""))
    _, tokenizer = settled(base, tmp_path, template="chatml")
    assert "template chatml: chat_template.jinja refuses tools" in caplog.text
    assert "tokenise" not in caplog.text
    prompt = tokenizer.apply_chat_template(CHAT, return_dict=False, add_generation_prompt=True)
    assert prompt == get_template("chatml", tokenizer).prompt(CHAT)
    with pytest.raises(Exception, match="renders no tools: they were learned in another way"):
        tokenizer.apply_chat_template(CHAT, tools=TOOLS, tokenize=False)


def test_another_chat_template_is_replaced_with_all_its_variants_and_that_is_said(tmp_path, capsys):
    """Also one that is the same but for the system message, or for its place in tokenizer_config.json."""
    base = make_base(tmp_path / "base")
    path = base / "tokenizer_config.json"
    named = [{"name": "default", "template": OTHER}, {"name": "tool_use", "template": OWN}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    folder = export(base, tmp_path, template="chatml")
    assert (
        "chat_template.jinja is written for template chatml: the model's own chat template asks in another way; its "
        "others are left out (tool_use)"
    ) in capsys.readouterr().out
    assert rendered(folder) == get_template("chatml", load_tokenizer(str(base))).prompt(CHAT)
    assert not (folder / "additional_chat_templates").exists()
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    silent = OWN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    (tmp_path / "again").mkdir()
    again = make_base(tmp_path / "again" / "base", template=silent)
    assert settled(again, tmp_path, template="chatml")[1].chat_template != silent


def test_a_folder_that_is_written_again_keeps_no_chat_template_of_before(tmp_path):
    base = make_base(tmp_path / "base")
    folder = export(base, tmp_path, template="chatml")
    assert (folder / "chat_template.jinja").exists()
    shutil.copytree(folder, tmp_path / "other")
    folder = export(base, tmp_path)
    assert not (folder / "chat_template.jinja").exists()
    assert ends(folder) == (0, 0, 0)


def test_stage_pt_leaves_the_chat_template_and_ends_documents_with_eos(tmp_path):
    base = make_base(tmp_path / "base", template=OTHER)
    found, tokenizer = settled(base, tmp_path, template="chatml", stage="pt")
    assert tokenizer.chat_template == OTHER
    assert (tokenizer.eos_token_id, found.source["eos_token_id"], found.generation["eos_token_id"]) == (2, 2, [2, 0])


def test_other_ids_of_the_rendered_text_are_told(tmp_path, caplog):
    words = ["<|begin_of_sentence|>", "<|end_of_sentence|>"]
    base = make_base(tmp_path / "base", special=words)
    settled(base, tmp_path, template="ernie_nothink", resize_vocab=True)
    assert "template ernie_nothink: programs that render chat_template.jinja tokenise the whole text" in caplog.text
    assert "In a conversation of 1 turn they get the tokens ['ĠIt', 'Ġis'," in caplog.text


def test_a_chat_template_whose_name_is_a_path_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    path = base / "tokenizer_config.json"
    named = [{"name": "default", "template": OWN}, {"name": "../../x", "template": OWN}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    with pytest.raises(DataError, match=r"named '\.\./\.\./x', which is no name of a file"):
        settled(base, tmp_path)
