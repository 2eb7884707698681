"""The first things a new user does."""

from pathlib import Path

import pytest

from jtune.cli.main import main
from jtune.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_quickstart_trains_shows_answers_and_says_what_is_next(tmp_path, capsys):
    short = ("max_steps=2", "logging_steps=1", "per_device_train_batch_size=1", "eval_strategy=no")
    assert main(["quickstart", str(tmp_path), *short]) == 0
    said = capsys.readouterr().out
    assert "exact match on 300 unseen questions: 0% before" in said
    assert "Write this date in words." in said
    assert f"jtune train {tmp_path}/quickstart.yaml" in said
    assert f"jtune chat {tmp_path}/quickstart.yaml" in said
    assert (tmp_path / "run" / "training_loss.png").stat().st_size > 0


def test_the_files_of_the_quickstart_are_what_its_scripts_write(tmp_path):
    from jtune.quickstart import make_data, make_model

    make_data.write(tmp_path / "data")
    for file in (tmp_path / "data").iterdir():
        assert file.read_text() == (make_data.FOLDER / file.name).read_text()
    make_model.write(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == (make_model.FOLDER / "config.json").read_text()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_made_configs_are_valid(path):
    config = load_config([str(path)], command="export" if "export" in path.stem else "train")
    assert config.notes == ()
