"""Cases as LLaMA-Factory ships them and as people publish them load, but for what is refused by name."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from jtune.config import load_config
from jtune.config.stages import RULES
from jtune.errors import ConfigError

# Settings of published cases; those with "like" have the rest of LLaMA-Factory's examples, too.
CASES = json.loads((Path(__file__).parent / "published.json").read_text())
PUBLISHED = {**CASES["examples of LLaMA-Factory"], **CASES["published by others"]}

# What is not built, and would change what is computed.
REFUSED = {
    "extras/badam/llama3_full_sft": "use_badam",
    "extras/mod/llama3_full_sft": "mixture_of_depths",
    "extras/oft/llama3_oft_sft": "finetuning_type: oft",
    "extras/qoft/llama3_oft_sft_bnb_npu": "finetuning_type: oft",
    "merge_lora/qwen3_gptq": "export_quantization_bit",
    "v1/train_lora/train_lora_sft": "train_dataset",
    "v1/train_full/train_full_ulysses_cp": "train_dataset",
    "old benchmark, two lengths": "max_source_length",
    "long context attention, Qwen3 0.6B": "shift_attn",
}


def words_of(case) -> tuple[list[str], dict[str, object]]:
    """The words of a command line and, for a case that is a file, its settings."""
    return case.get("words", []), CASES.get(case.get("like"), {}) | case.get("args", {})


def refusal(name) -> str | None:
    """What a case is refused for."""
    words, settings = words_of(PUBLISHED[name])
    stage = settings.get("stage") or dict(pairwise(words)).get("--stage", "sft")
    untrained = stage in RULES and not RULES[stage].trains
    return REFUSED.get(name, f"stage: {stage}" if untrained else None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_case_loads_or_is_refused_by_name(name, tmp_path):
    case = PUBLISHED[name]
    words, settings = words_of(case)
    if not words:
        (tmp_path / "case.json").write_text(json.dumps(settings))
        words = [str(tmp_path / "case.json")]
    reason = refusal(name)
    if reason is None:
        config = load_config(words, command=case["command"])
        assert all(" is not an argument" not in note for note in config.notes)
        return
    with pytest.raises(ConfigError, match=reason) as error:
        load_config(words, command=case["command"])
    assert "is not an argument" not in str(error.value)


def test_most_of_them_load():
    assert len(CASES["examples of LLaMA-Factory"]) > 65
    assert len(CASES["published by others"]) > 25
    assert sum(refusal(name) is None for name in PUBLISHED) == 116
