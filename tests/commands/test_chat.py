"""Talking with a model: text as it comes, thoughts apart, commands, and the whole of it as a process."""

import io
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from small import case, environment, rows, write_data, write_model

from jtune.cli.main import main
from jtune.commands import chat
from jtune.commands.dialogue import Answer, show, talk
from jtune.config import GeneratingArguments, load_config
from jtune.data import get_template, load_tokenizer
from jtune.errors import ConfigError, DataError
from jtune.generation import Sampling
from jtune.generation.settings import most_tokens, read_generation_config, sampling_of
from jtune.generation.text import Piece, split_thoughts, stream_text
from jtune.loading.inference import load, trained
from jtune.quickstart.make_model import FOLDER, make_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return write_model(folder / "model"), write_data(folder / "data")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(FOLDER))


# ---------------------------------------------------------------------- text as it comes


def test_pieces_joined_are_the_whole_text_whatever_the_tokens(tokenizer):
    random = np.random.default_rng(0)
    for _ in range(50):
        ids = random.integers(0, len(tokenizer), 30).tolist()
        for skip in (True, False):
            pieces = list(stream_text(tokenizer, ids, skip_special_tokens=skip))
            assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_character_is_shown_when_it_is_whole(tokenizer):
    ids = tokenizer.encode("a👩é", add_special_tokens=False)
    assert len(ids) == 7  # bytes
    assert list(stream_text(tokenizer, ids)) == ["a", "👩", "é"]
    assert list(stream_text(tokenizer, ids[:3])) == ["a", "\ufffd"]  # what never becomes whole is shown at the end


def test_blanks_that_a_tokenizer_puts_before_words_are_kept():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"▁a": 0, "▁b": 1, "<unk>": 2}
    whole = Tokenizer(models.WordLevel(words, "<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    whole.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=whole)
    assert list(stream_text(fast, [0, 1, 0])) == ["a", " b", " a"]


THOUGHT = ("<think>\n", "\n</think>\n\n")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "thinking", "thought", "answer"),
    [
        ("<think>\n1 + 1\nis </ 2\n</think>\n\nIt is\n 2.", False, "1 + 1\nis </ 2", "It is\n 2."),
        ("1 + 1</think>2", True, "1 + 1", "2"),
        ("<think>\n\n</think>\n\n2", False, "", "2"),
        ("It is <think> 2 </think>", False, "", "It is <think> 2 </think>"),
        ("<think>never done </th", False, "never done </th", ""),
        ("<thin", False, "", "<thin"),
        (" 2\n", False, "", " 2\n"),
    ],
)
def test_thoughts_are_set_apart_however_the_text_comes(text, thinking, thought, answer, size):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    found = list(split_thoughts(pieces, THOUGHT, thinking=thinking))
    assert "".join(p.text for p in found if p.thought) == thought
    assert "".join(p.text for p in found if not p.thought) == answer
    assert found == sorted(found, key=lambda p: not p.thought)


# ---------------------------------------------------------------------- prompts


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "gemma", "llama2", "default"])
def test_a_prompt_is_what_the_model_has_learned_to_answer(name):
    template = get_template(name, make_tokenizer(["hello"]))
    chat = [("user", "Hi"), ("assistant", "<think>\nso\n</think>\n\nHello"), ("user", "And?"), ("assistant", "So")]
    messages = [{"role": role, "content": content} for role, content in chat]
    plain = [m | {"content": m["content"].replace("<think>\nso\n</think>\n\n", "")} for m in messages]
    expected = template.encode(plain if name == "qwen3" else messages, system="Be kind.")
    prompt = template.prompt(messages[:3], system="Be kind.")
    if name == "qwen3":  # a thinking model: earlier thoughts are gone, and where there were none none is made up
        expected[0] = expected[0][0], expected[0][1][len(template.token_ids(["".join(THOUGHT)])[0]) :]
    assert prompt == [*expected[0][0], *expected[0][1], *expected[1][0]]
    with pytest.raises(DataError, match="the last is a question"):
        template.prompt(messages)


def test_a_chat_template_that_rewrites_earlier_turns_will_do_for_prompts():
    own = make_tokenizer(["hello"])
    own.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else '...' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(DataError, match="rewrites earlier turns"):
        get_template(None, own)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    prompt = get_template(None, own, for_training=False).prompt([*messages, *messages[:1]])
    assert own.decode(prompt) == "[user]a[assistant]...[user]a[assistant]"


# ---------------------------------------------------------------------- how answers are chosen


def test_the_arguments_count_and_of_the_models_file_what_they_do_not_have():
    args = GeneratingArguments(top_p=0.5)
    own = {"top_p": 0.8, "temperature": 0.6, "top_k": 20, "min_p": 0.1, "eos_token_id": [7, 2]}
    found = sampling_of(args, own, [2, 3])
    assert found == Sampling(1024, True, 0.95, 50, 0.5, 0.1, eos_ids=(2, 3, 7))
    assert sampling_of(GeneratingArguments(), {}, [2]) == Sampling(1024, True, 0.95, 50, 0.7, eos_ids=(2,))


def test_a_temperature_of_0_is_the_likeliest_token():
    assert sampling_of(GeneratingArguments(temperature=0), {}, []).do_sample is False
    assert sampling_of(GeneratingArguments(top_k=-1), {}, []).top_k == 0


def test_max_length_counts_the_prompt_and_max_new_tokens_does_not():
    def most(prompt, positions=0, **given):
        args = GeneratingArguments(**given)
        return most_tokens(args, sampling_of(args, {}, []), prompt, positions)

    assert most(100) == 1024
    assert most(100, max_new_tokens=10, max_length=50) == 10
    assert most(100, max_new_tokens=-1, max_length=120) == 20
    assert most(100, max_new_tokens=10, positions=105) == 5


def test_what_a_generation_config_asks_for_and_is_not_done_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 3, "temperature": 0.5}))
    with pytest.raises(DataError, match="no_repeat_ngram_size: 3 is not supported"):
        read_generation_config(tmp_path)
    assert read_generation_config(tmp_path / "none") == {}


def test_beams_that_draw_are_refused(parts, tmp_path):
    with pytest.raises(ConfigError, match="set do_sample: false"):
        load_config([str(case(tmp_path, *parts)), "num_beams=2"], command="chat")


# ---------------------------------------------------------------------- which model


def test_what_the_same_yaml_has_trained_is_taken(parts, tmp_path):
    path = str(case(tmp_path, *parts))
    assert trained(load_config([path], command="chat")).model_name_or_path == str(parts[0])
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "adapter_config.json").write_text("{}")
    assert trained(load_config([path], command="chat")).model_name_or_path == str(out)
    lora = trained(load_config([path, "finetuning_type=lora"], command="chat"))
    assert (lora.model_name_or_path, lora.adapter_name_or_path) == (str(parts[0]), (str(out),))
    given = trained(load_config([path, "finetuning_type=lora", "adapter_name_or_path=a"], command="chat"))
    assert given.adapter_name_or_path == ("a",)


def test_of_a_run_that_was_cut_short_it_is_the_newest_checkpoint_and_that_is_said(parts, tmp_path, caplog):
    path = str(case(tmp_path, *parts, finetuning_type="lora"))
    for step in (3, 12):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
    with caplog.at_level(logging.INFO, "jtune"):
        assert trained(load_config([path], command="chat")).adapter_name_or_path == ()
        (tmp_path / "out" / "checkpoint-3" / "adapter_config.json").write_text("{}")
        found = trained(load_config([path], command="chat"))
    newest = tmp_path / "out" / "checkpoint-3"
    assert (found.model_name_or_path, found.adapter_name_or_path) == (str(parts[0]), (str(newest),))
    assert caplog.messages == [
        f"there is no adapter in output_dir, {tmp_path / 'out'}, yet: this is the model before training",
        f"the run in output_dir has not finished: the adapter is that of {newest}",
    ]


@pytest.mark.slow
def test_the_folder_of_a_run_is_enough(parts, tmp_path, capsys):
    """`jtune chat FOLDER` and `jtune export FOLDER` after a run with an adapter, and `jtune chat` of that export."""
    changes = {"mesh_fsdp": -1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 2}
    path = case(tmp_path, *parts, finetuning_type="lora", eval_strategy="no", val_size=0, learning_rate=0.1, **changes)
    assert main(["train", str(path)]) == 0
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert f"vllm serve {parts[0]} --enable-lora --lora-modules out={out}\n" in capsys.readouterr().out
    assert main(["export", str(out), f"export_dir={merged}"]) == 0
    said, message = [], [{"role": "user", "content": rows()[0]["instruction"]}]
    for folder in (out, merged):
        config = load_config([str(folder), "do_sample=false", "max_new_tokens=8"], command="chat")
        assert config.data.template == "chatml"
        said.append("".join(chat.make_ask(config)(message, None, 0).text))
    assert said[0] == said[1]
    assert json.loads((merged / "jtune.json").read_text())["adapters"] == [str(out)]


def test_a_model_from_random_weights_must_be_trained_first(parts, tmp_path):
    config = load_config([str(case(tmp_path, *parts, train_from_scratch=True))], command="chat")
    with pytest.raises(ConfigError, match="`jtune train` writes one there"):
        load(config)


# ---------------------------------------------------------------------- the dialogue


def dialogue(lines, answers, **how):
    """What is said to the model in each turn, and what is shown."""
    asked, answers = [], iter(answers)

    def ask(messages, system, turn):
        asked.append((system, [m["content"] for m in messages]))
        return Answer(iter(next(answers)), False, THOUGHT)

    out, aside = io.StringIO(), io.StringIO()
    talk(ask, lines, out, aside, **{"keep_going": False, **how})
    return asked, out.getvalue(), aside.getvalue()


def test_history_is_kept_cleared_and_ended():
    lines = ["a", "b", " clear ", "", "c", "/system Be kind.", "d", "exit", "e"]
    asked, shown, _ = dialogue(lines, ["1", "2", "3", "4"])
    assert asked == [(None, ["a"]), (None, ["a", "1", "b"]), (None, ["c"]), ("Be kind.", ["d"])]
    assert shown == "1\n2\n3\n4\n"


def test_thoughts_go_aside_and_stay_in_the_history_for_the_template_to_take_out():
    asked, shown, aside = dialogue(["a", "b"], [["<think>\nhm", "\n</think>\n\nyes"], ["no"]])
    assert (shown, aside) == ("yes\nno\n", "hm\n\n")
    assert asked[1][1] == ["a", "<think>\nhm\n</think>\n\nyes", "b"]


def test_thoughts_are_dim_at_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    show([Piece("hm", True), Piece("yes", False)], out, out)
    assert out.getvalue() == "\033[2mhm\033[0m\n\nyes\n"


def test_a_conversation_that_is_too_long_ends_a_pipe_but_not_a_dialogue():
    def ask(messages, system, turn):
        raise DataError("too long")

    with pytest.raises(DataError):
        talk(ask, ["a"], io.StringIO(), io.StringIO(), keep_going=False)
    talk(ask, ["a", "b"], io.StringIO(), io.StringIO(), keep_going=True)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_chat_answers_what_comes_through_a_pipe(parts, tmp_path, devices):
    """As the same model answers when it is asked directly, on one device or split over eight."""
    from jtune.generation import generate
    from jtune.loading.inference import load_model

    path = case(tmp_path, *parts, max_new_tokens=8, do_sample=False, mesh_fsdp=-1)
    question = f"{rows()[0]['instruction']} {rows()[0]['input']}"
    found = subprocess.run(
        [sys.executable, "-m", "jtune.cli.main", "chat", str(path)],
        input=f"{question}\nclear\n{question}\nexit\nnever\n", env=environment(devices), capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    model, params = load_model(str(parts[0]))
    template = get_template("chatml", load_tokenizer(str(parts[0])))
    prompt = template.prompt([{"role": "user", "content": question}])
    [ids] = generate(model, params, [prompt], Sampling(max_new_tokens=8, eos_ids=template.stop_ids))
    answer = template.tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert found.stdout == answer + answer
    assert "the likeliest token each time, at most 8 tokens" in found.stderr


def test_stop_words_of_the_template_end_an_answer(parts, tmp_path, monkeypatch):
    config = load_config([str(case(tmp_path, *parts)), "do_sample=false", "mesh_fsdp=-1"], command="chat")
    said = []
    monkeypatch.setattr(chat, "stream", lambda *args, **how: said.append(args[3]) or iter([]))
    chat.make_ask(config)([{"role": "user", "content": "Hi"}], None, 0)
    tokenizer = load_tokenizer(str(parts[0]))
    assert set(said[0].eos_ids) == set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]))
