"""`jtune.json`: what it says, what it never says, and that it says the same each time."""

import hashlib
import json
import sys

from jtune import __version__
from jtune.config import load_config
from jtune.interop import manifest

WORDS = [
    "model_name_or_path=m", "hf_hub_token=hf_sesame_sesame", "swanlab_api_key=sesame_key", "use_swanlab=true",
    "default_system=see https://me:word@host", "template=chatml", "finetuning_type=full",
]  # fmt: skip


def write_base(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model-1.safetensors").write_bytes(b"1234")
    return folder


def test_it_says_what_the_model_was_made_from_and_no_secret(tmp_path):
    base = write_base(tmp_path / "snapshots" / "abc")
    identity = {"data": "d1", "frozen weights": "f1", "rows": [True, 64]}
    content = manifest.describe(load_config([*WORDS, "do_train=true", "dataset=a"]), base, identity)
    manifest.write(tmp_path, content)
    text = (tmp_path / "jtune.json").read_text()
    assert "sesame" not in text
    assert "me:word" not in text
    found = json.loads(text)
    assert (found["stage"], found["finetuning_type"], found["template"]) == ("sft", "full", "chatml")
    assert found["base"] == {
        "model_name_or_path": "m",
        "model_revision": "main",
        "commit": "abc",
        "config_sha256": hashlib.sha256(b"{}").hexdigest(),
        "weight_bytes": {"model-1.safetensors": 4},
    }
    assert found["fingerprints"] == {"data": "d1", "frozen weights": "f1"}
    assert found["versions"]["jtune"] == __version__
    assert {"python", "jax", "flax", "transformers"} <= found["versions"].keys()
    assert found["devices"]["platform"] == "cpu"
    assert found["arguments"]["learning_rate"] == 5e-5
    manifest.write(tmp_path, content)
    assert (tmp_path / "jtune.json").read_text() == text


def test_the_command_is_the_one_that_was_typed_without_its_secrets(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/jtune", "train", "a case.yaml", "--hf_hub_token", "sesame", "seed=1"])
    assert manifest.command_line() == "jtune train 'a case.yaml' seed=1"
    monkeypatch.setattr(sys, "argv", ["/lib/jtune/cli/main.py", "export", "b.yaml"])
    assert manifest.command_line() == "jtune export b.yaml"
    monkeypatch.setattr(sys, "argv", ["/bin/pytest", "b.yaml"])
    assert manifest.command_line() is None


def test_a_library_without_metadata_is_unknown(monkeypatch):
    monkeypatch.setattr(manifest, "LIBRARIES", ("no-such-library",))
    assert manifest.versions()["no-such-library"] == "unknown"
