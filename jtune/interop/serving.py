"""What to type to serve a model that jtune has written, and which adapters servers take as they are.

The rules are those of vLLM (vllm/lora/peft_helper.py, vllm/lora/lora_model.py, vllm/config/lora.py) and of SGLang
(srt/lora/lora_manager.py, its --lora-target-modules). A Modelfile is Ollama's, with a template in Go's language.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jtune.data.templates.chat_format import CONTENT, ChatFormat, Slots, Special, Token

MODELFILE = "Modelfile"
MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
DEFAULT_RANK = 16
# What SGLang can adapt. vLLM takes every linear module.
SGLANG_TARGETS = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
)


# ---------------------------------------------------------------------- adapters


def adapter_faults(options: Mapping[str, Any]) -> list[str]:
    """Why a server does not take an adapter as it is; empty if it does.

    Args:
      options: the content of adapter_config.json.

    >>> adapter_faults({"r": 8, "lora_alpha": 16, "use_dora": True})
    ['use_dora: vLLM and SGLang refuse it']
    """
    faults = []
    if whole := options.get("modules_to_save"):
        faults.append(f"modules_to_save ({', '.join(whole)}): vLLM refuses modules that were trained whole")
    if options.get("use_dora"):
        faults.append("use_dora: vLLM and SGLang refuse it")
    if options.get("bias", "none") != "none":
        faults.append(f"bias: {options['bias']}: vLLM refuses it")
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if options.get(name)]
    if patterns:
        faults.append(f"{', '.join(patterns)}: vLLM scales every module by the lora_alpha and r of all")
    if parameters := options.get("target_parameters"):
        faults.append(f"target_parameters ({', '.join(parameters)}): vLLM and SGLang adapt modules only")
    if options["r"] > MAX_LORA_RANKS[-1]:
        faults.append(f"r: {options['r']}: vLLM's --max-lora-rank is at most {MAX_LORA_RANKS[-1]}")
    return faults


def adapter_lines(folder: Path, options: Mapping[str, Any], merged_before: Sequence[str] = ()) -> list[str]:
    """How to serve an adapter, in one or two lines.

    Args:
      options: the content of its adapter_config.json.
      merged_before: adapters that the base had when this one was trained.
    """
    faults = adapter_faults(options)
    if merged_before:
        faults.append(f"its base is a model with other adapters merged in ({', '.join(merged_before)})")
    if faults:
        merged = folder.with_name(f"{folder.name}-merged")
        return [
            f"servers do not take this adapter as it is ({'; '.join(faults)}); to merge it: "
            + shlex.join(["jtune", "export", str(folder), f"export_dir={merged}"])
        ]
    base, module = options["base_model_name_or_path"], f"{name_of(folder)}={folder}"
    words = ["vllm", "serve", base, "--enable-lora", "--lora-modules", module]
    if options["r"] > DEFAULT_RANK:
        words += ["--max-lora-rank", str(next(rank for rank in MAX_LORA_RANKS if rank >= options["r"]))]
    lines = [f"to serve it with vLLM:   {shlex.join(words)}"]
    if {name.rsplit(".")[-1] for name in options["target_modules"]} <= SGLANG_TARGETS:
        words = ["python", "-m", "sglang.launch_server", "--model-path", base, "--lora-paths", module]
        lines.append(f"to serve it with SGLang: {shlex.join(words)}")
    return lines


def name_of(folder: Path) -> str:
    """A name for a model, of letters that every server takes.

    >>> name_of(Path("out/My run"))
    'my-run'
    """
    return re.sub(r"[^a-z0-9._-]+", "-", folder.resolve().name.lower()).strip("-.") or "model"


# ---------------------------------------------------------------------- models


def next_commands(folder: Path) -> list[str]:
    """What to type to serve the model in `folder`, a line for each server."""
    name = name_of(folder)
    gguf = folder.with_name(f"{folder.name}.gguf")
    vllm = ["vllm", "serve", str(folder)]
    sglang = ["python", "-m", "sglang.launch_server", "--model-path", str(folder)]
    convert = ["python", "llama.cpp/convert_hf_to_gguf.py", str(folder), "--outfile", str(gguf)]
    ollama = ["ollama", "create", name, "-f", str(folder / MODELFILE)]
    return [
        f"vLLM:       {shlex.join(vllm)}",
        f"SGLang:     {shlex.join(sglang)}",
        f"llama.cpp:  {shlex.join(convert)} && {shlex.join(['llama-server', '-m', str(gguf)])}",
        f"Ollama:     {shlex.join(ollama)} && ollama run {name}",
    ]


def modelfile(form: ChatFormat | None, tokenizer: Any, stops: Sequence[str]) -> tuple[str, str | None]:
    """Ollama's Modelfile, and why it has no TEMPLATE if it has none.

    Args:
      form: the format of the template that the model was trained with; None: the tokenizer's own chat template.
      stops: the tokens that end an answer.
    """
    lines, missing = ["FROM ."], None
    template = go_template(form, tokenizer) if form is not None else None
    if template is not None:
        lines += [f'TEMPLATE """{template}"""']
    else:
        missing = "it is the tokenizer's own" if form is None else "Ollama's language cannot express it"
        lines += [f"# No TEMPLATE: {missing}. Ollama looks for one that fits the chat template of the tokenizer."]
    if form is not None and form.default_system and '"""' not in form.default_system:
        lines += [f'SYSTEM """{form.default_system}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop and "\n" not in stop]
    return "\n".join(lines) + "\n", missing


def go_template(form: ChatFormat, tokenizer: Any) -> str | None:
    """A chat format in Go's template language, over Ollama's `.System` and `.Messages`; None if it has no words for it.

    What takes earlier thoughts out of a conversation has none, nor has a bos before each question, since Ollama puts
    one in front of the whole. Tools are left out.
    """
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("a").input_ids[:1]
    words = {Special.BOS: tokenizer.bos_token or "", Special.EOS: tokenizer.eos_token or ""}
    prefix = [slot for slot in form.prefix if not (slot is Special.BOS and adds_bos)]
    said = [text for slots in (prefix, form.system, form.user, form.assistant) for text in _texts(slots, words)]
    awkward = any("{{" in text.replace(CONTENT, "") or '"""' in text for text in said)
    if form.thinking or Special.BOS in (*form.system, *form.user, *form.assistant) or awkward:
        return None
    join = lambda slots, variable: "".join(_texts(slots, words)).replace(CONTENT, variable)
    user, assistant = join(form.user, "{{ .Content }}"), join(form.assistant, "{{ .Content }}")
    system = f"{{{{ if .System }}}}{join(form.system, '{{ .System }}')}{{{{ end }}}}"
    if form.system_in_user:
        system = "{{ $system := .System }}"
        told = f'{{{{ if $system }}}}{join(form.system, "{{ $system }}")}{{{{ $system = "" }}}}{{{{ end }}}}'
        user = join(form.user, told + "{{ .Content }}")
    return (
        f"{''.join(_texts(prefix, words))}{system}"
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
        f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}'
    )


def _texts(slots: Sequence[Any] | Slots, words: Mapping[Special, str]) -> list[str]:
    named = lambda slot: slot.name if isinstance(slot, Token) else slot
    return [words[slot] if isinstance(slot, Special) else named(slot) for slot in slots]
