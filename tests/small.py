"""A model, a data set and a YAML so small that a whole run takes seconds; made without torch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import yaml

from jtune.data.templates.chat_format import ChatFormat, Token
from jtune.interop import hf
from jtune.models import init_params
from jtune.models.families import decoder_config
from jtune.quickstart.make_data import FOLDER
from jtune.quickstart.make_model import make_tokenizer

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
    "dtype": "float32",
}


def rows(count: int = 120) -> list[dict[str, str]]:
    lines = (FOLDER / "dates_train.jsonl").read_text().splitlines()[:count]
    return [json.loads(line) for line in lines]


def write_model(folder: Path, **changes) -> Path:
    """A llama with random weights and a tokenizer."""
    tokenizer = make_tokenizer([" ".join(row.values()) for row in rows(400)])
    tokenizer.save_pretrained(folder)
    config = {**CONFIG, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **changes}
    decoder = decoder_config(config)
    hf.save_model(jax.jit(lambda: init_params(decoder, jax.random.key(0)))(), decoder, config, folder)
    return folder


def add_words(tokenizer, form: ChatFormat) -> None:
    """Make the words in brackets of a chat format special tokens of the tokenizer."""
    slots = (form.user, form.assistant, form.system, form.observation or (), form.function or (), form.prefix)
    special = {slot.name for part in slots for slot in part if isinstance(slot, Token)}
    for text in (*(slot for part in slots for slot in part if isinstance(slot, str)), *form.thought):
        special |= set(re.findall(r"<[^<>\s]+>|\[[^\[\]\s]+\]", text))
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(special)})


def write_data(folder: Path, **sets) -> Path:
    """A dataset_dir with the sets `dates` and `texts`, and whatever rows are given by name."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [{"text": " ".join(row.values())} for row in rows()]
    sets = {"dates": rows(), "texts": texts} | sets
    for name, content in sets.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    info = {name: {"file_name": f"{name}.json"} for name in sets} | {
        "texts": {"file_name": "texts.json", "columns": {"prompt": "text"}}
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def write_preferences(folder: Path) -> Path:
    """A dataset_dir with the sets `pairs` and `marked`, beside those of `write_data`."""
    answers = rows()
    others = [row["output"] for row in (*answers[1:], answers[0])]
    pairs = [
        {"instruction": row["instruction"], "chosen": row["output"], "rejected": x} for row, x in zip(answers, others)
    ]
    marked = [row | {"kto_tag": i % 3 != 0} for i, row in enumerate(answers)]
    write_data(folder, pairs=pairs, marked=marked)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["pairs"] |= {"ranking": True, "columns": {"chosen": "chosen", "rejected": "rejected"}}
    info["marked"] |= {"columns": {"kto_tag": "kto_tag"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def case(folder: Path, model: Path, data: Path, **changes) -> Path:
    """A YAML: 12 updates, a checkpoint every third, an evaluation every sixth."""
    content = {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "dates",
        "dataset_dir": str(data),
        "template": "chatml",
        "cutoff_len": 64,
        "val_size": 0.1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "max_steps": 12,
        "logging_steps": 1,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "mesh_fsdp": 1,
        "compile_cache_dir": str(data.parent / "compiled"),
        "output_dir": str(folder / "out"),
        **changes,
    }
    path = folder / "case.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


def command(path: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "jtune.cli.main", "train", str(path), *overrides]


def environment(devices: int = 1) -> dict[str, str]:
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def train(path: Path, *overrides: str, devices: int = 1) -> subprocess.CompletedProcess:
    """`jtune train` in a process of its own."""
    return subprocess.run(command(path, *overrides), env=environment(devices), capture_output=True, text=True)


def state(folder: Path) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def curve(folder: Path, *keys: str) -> list[tuple]:
    """What was logged at every step, to the bit."""
    keys = keys or ("step", "loss", "grad_norm", "learning_rate", "epoch", "eval_loss")
    return [tuple(record.get(key) for key in keys) for record in state(folder)["log_history"]]
