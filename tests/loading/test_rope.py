"""rope_scaling makes the config.json that LLaMA-Factory would, and leaves short rows alone."""

import pytest

from jtune.config import load_config
from jtune.errors import ConfigError
from jtune.loading.rope import scale_rope, with_rope_scaling
from jtune.models.families import decoder_config, full_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rope_theta": 5000.0,
}
WORDS = ["model_name_or_path=m", "rope_scaling=yarn"]


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("linear", {}),
        ("dynamic", {"original_max_position_embeddings": 512}),
        ("yarn", {"original_max_position_embeddings": 512}),
        ("llama3", {"original_max_position_embeddings": 512, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ],
)
def test_rotations_reach_the_length_of_rows(kind, extra):
    scaled = scale_rope(LLAMA, kind, 1100)
    assert scaled["max_position_embeddings"] == 512 * 3
    assert scaled["rope_parameters"] == {"rope_theta": 5000.0, "rope_type": kind, "factor": 3.0, **extra}
    assert full_config(scaled)[0]["rope_parameters"].items() >= scaled["rope_parameters"].items()
    [rope] = decoder_config(scaled).ropes
    assert (rope.kind, rope.factor, rope.theta) == (kind, 3.0, 5000.0)


def test_a_model_that_is_scaled_already_is_scaled_from_its_first_length():
    first = scale_rope(LLAMA, "yarn", 1024)
    assert scale_rope(first, "yarn", 2048)["rope_parameters"]["factor"] == 4.0


def test_rows_that_fit_change_nothing(caplog):
    with caplog.at_level("INFO", logger="jtune"):
        assert scale_rope(LLAMA, "yarn", 512) == LLAMA
    assert "rope_scaling has no effect" in caplog.text


def test_training_scales_for_its_rows_and_so_does_chat_with_its_file():
    train = load_config([*WORDS, "dataset=a", "do_train=true", "cutoff_len=2000"])
    for trains in (True, False):
        assert with_rope_scaling(LLAMA, train, trains=trains)["rope_parameters"]["factor"] == 4.0
    chat = load_config(WORDS, command="chat")
    assert with_rope_scaling(LLAMA, chat, trains=False)["max_position_embeddings"] == 1024
    assert with_rope_scaling(LLAMA, load_config(WORDS[:1], command="chat"), trains=False) is LLAMA


def test_a_model_with_several_rotations_is_refused():
    with pytest.raises(ConfigError, match="one for each kind of layer"):
        scale_rope({"model_type": "gemma3_text"}, "yarn", 10**6)
