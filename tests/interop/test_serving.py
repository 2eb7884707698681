"""Serving: what vLLM and SGLang take of an adapter, what to type, and Ollama's Modelfile."""

import json
import re
from pathlib import Path

import pytest

from jtune.data import get_template
from jtune.data.templates.chat_format import Special
from jtune.data.templates.table import TABLE
from jtune.interop import serving
from jtune.quickstart.make_model import make_tokenizer

PLAIN = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "meta/base"}


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save (embed_tokens, lm_head): vLLM refuses"),
        ({"use_dora": True}, "use_dora: vLLM and SGLang refuse it"),
        ({"bias": "all"}, "bias: all: vLLM refuses it"),
        ({"r": 513}, "--max-lora-rank is at most 512"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern: vLLM scales every module by the lora_alpha and r of all"),
        ({"rank_pattern": {"q": 4}, "alpha_pattern": {"q": 4}}, "rank_pattern, alpha_pattern: vLLM"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters (experts.down_proj)"),
    ],
)
def test_what_a_server_does_not_take_is_named_and_merging_is_the_way(options, fault):
    [found] = serving.adapter_faults(PLAIN | options)
    assert fault in found
    [line] = serving.adapter_lines(Path("out/run"), PLAIN | options)
    assert found in line
    assert line.endswith("jtune export out/run export_dir=out/run-merged")


def test_an_adapter_on_other_adapters_must_be_merged():
    [line] = serving.adapter_lines(Path("out/run"), PLAIN, ["first"])
    assert "other adapters merged in (first)" in line


@pytest.mark.parametrize(
    ("rank", "flag"),
    [(1, ""), (16, ""), (17, " --max-lora-rank 32"), (64, " --max-lora-rank 64"), (300, " --max-lora-rank 320"),
     (512, " --max-lora-rank 512")],
)  # fmt: skip
def test_a_rank_above_vllms_default_needs_the_next_that_it_knows(rank, flag):
    options = PLAIN | {"r": rank, "use_rslora": True, "bias": "none", "modules_to_save": None, "rank_pattern": {}}
    assert serving.adapter_lines(Path("out/My run"), options) == [
        f"to serve it with vLLM:   vllm serve meta/base --enable-lora --lora-modules 'my-run=out/My run'{flag}",
        "to serve it with SGLang: python -m sglang.launch_server --model-path meta/base --lora-paths "
        "'my-run=out/My run'",
    ]


def test_sglang_is_left_out_where_it_does_not_know_a_module():
    [line] = serving.adapter_lines(Path("run"), PLAIN | {"target_modules": ["q_proj", "c_attn"]})
    assert "vllm serve" in line


def test_each_server_has_a_line():
    lines = serving.next_commands(Path("out/merged"))
    assert lines == [
        "vLLM:       vllm serve out/merged",
        "SGLang:     python -m sglang.launch_server --model-path out/merged",
        "llama.cpp:  python llama.cpp/convert_hf_to_gguf.py out/merged --outfile out/merged.gguf && llama-server -m "
        "out/merged.gguf",
        "Ollama:     ollama create merged -f out/merged/Modelfile && ollama run merged",
    ]


# ---------------------------------------------------------------------- Ollama's template


def run_go(template: str, system: str, messages: list[tuple[str, str]]) -> str:
    """What Go's text/template makes of the words that `go_template` uses."""
    parts = re.split(r"(\{\{.*?\}\})", template)
    start = parts.index("{{ range .Messages }}")
    state = {"$system": system, ".System": system}

    def emit(parts: list[str], scope: dict[str, str]) -> str:
        out, stack = [], []  # of the blocks that are open: (shown now, shown before)
        for part in parts:
            word = part.strip("{} ") if part.startswith("{{") else None
            shown = all(now for now, _ in stack)
            if word is None:
                out.append(part if shown else "")
            elif word.startswith("if "):
                stack.append((is_true(word[3:], scope), False))
            elif word.startswith("else if "):
                now, before = stack.pop()
                stack.append((not (now or before) and is_true(word[8:], scope), now or before))
            elif word == "end":
                stack.pop()
            elif ":=" in word or " = " in word:
                name, value = re.split(r"\s*:?=\s*", word)
                if shown:
                    state[name] = "" if value == '""' else (state | scope)[value]
            else:
                out.append((state | scope)[word] if shown else "")
        return "".join(out)

    def is_true(word: str, scope: dict[str, str]) -> bool:
        if word.startswith("eq "):
            _, name, value = word.split()
            return scope[name] == json.loads(value)
        return bool((state | scope)[word])

    inside = parts[start + 1 : -2]
    assert parts[-2:] == ["{{ end }}", ""]
    turns = [emit(inside, {".Role": role, ".Content": text}) for role, text in messages]
    return emit(parts[:start], {}) + "".join(turns)


CONVERSATION = [("user", "Hi {there}"), ("assistant", "Hello"), ("user", "And?")]


def test_a_go_template_asks_as_training_does_for_every_format_it_can_express():
    expressed = []
    for name in TABLE:
        tokenizer = make_tokenizer(["Hi there Hello And"])
        template = get_template(name, tokenizer)
        assert template.form is not None
        found = serving.go_template(template.form, tokenizer)
        if found is None:
            continue
        expressed.append(name)
        messages = [{"role": role, "content": text} for role, text in CONVERSATION]
        for system in ("", "Be brief."):
            words = {Special.BOS: tokenizer.bos_token or "", Special.EOS: tokenizer.eos_token or ""}
            pieces = template.ask(messages, system or None, None)
            asked = "".join(words[x] if isinstance(x, Special) else getattr(x, "name", x) for x in pieces)
            # Ollama gives SYSTEM where a conversation brings none.
            assert run_go(found, system or template.form.default_system, CONVERSATION) == asked, name
    assert {"chatml", "llama3", "gemma", "mistral", "qwen", "phi", "vicuna", "deepseek3"} <= set(expressed)
    assert not {"llama2", "qwen3"} & set(expressed)


def test_a_modelfile_says_where_answers_end_and_why_it_has_no_template():
    tokenizer = make_tokenizer(["Hi"])
    text, missing = serving.modelfile(get_template("chatml", tokenizer).form, tokenizer, ["<|im_end|>", "a\nb"])
    assert missing is None
    assert text == (
        'FROM .\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}'
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        "<|im_start|>assistant\n"
        '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}"""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )
    text, missing = serving.modelfile(get_template("qwen3", tokenizer).form, tokenizer, [])
    assert "TEMPLATE " not in text
    assert missing == "Ollama's language cannot express it"
    text, missing = serving.modelfile(None, tokenizer, ["</s>"])
    assert missing == "it is the tokenizer's own"
    assert text.endswith('PARAMETER stop "</s>"\n')
    form = get_template("vicuna", tokenizer).form
    assert f'SYSTEM """{form.default_system}"""' in serving.modelfile(form, tokenizer, [])[0]


def test_a_bos_that_the_tokenizer_does_not_add_is_written():
    tokenizer = make_tokenizer(["Hi"])
    tokenizer.bos_token = "<|im_start|>"
    form = get_template("llama3", tokenizer).form
    assert serving.go_template(form, tokenizer).startswith("<|im_start|>{{ if .System }}")

    def adding(text):
        return type("Ids", (), {"input_ids": [tokenizer.bos_token_id]})

    adding.bos_token_id, adding.bos_token, adding.eos_token = tokenizer.bos_token_id, "<|im_start|>", "</s>"
    assert serving.go_template(form, adding).startswith("{{ if .System }}")
