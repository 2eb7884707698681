"""A stage that jtune does not have takes its record and its loss, and nothing else changes."""

from dataclasses import replace

import numpy as np
import pytest
import small

from jtune import stages
from jtune.commands.train import train
from jtune.config import load_config
from jtune.config.stages import RULES, StageRules
from jtune.losses.objective import Objective
from jtune.losses.token import token_nll
from jtune.planning.plan import plan

# [example]
# In config/stages.py: the rows that it reads, and which arguments are for it.
RULE = StageRules("surprise", "conversation", answers=True)


# In losses/: what is minimised, from logits float32 [..., vocab] and targets int32 [...].
def squared_nll(logits, targets):
    return token_nll(logits, targets) ** 2


# In stages/surprise.py: the stage itself.
SURPRISE = stages.Stage(RULE, objective=lambda finetuning, training: Objective("squared surprise", squared_nll))
# [example]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return small.write_model(folder / "model"), small.write_data(folder / "data")


@pytest.fixture
def surprise(monkeypatch):
    monkeypatch.setitem(RULES, "surprise", RULE)
    monkeypatch.setitem(stages.STAGES, "surprise", SURPRISE)


def configured(folder, parts, stage, command="train", **changes):
    case = small.case(folder, *parts, finetuning_type="lora", max_steps=2, save_strategy="no", mesh_fsdp=-1, **changes)
    config = load_config([str(case)], command=command)
    return replace(config, finetuning=replace(config.finetuning, stage=stage))


def test_a_new_stage_trains_with_its_loss_evaluates_and_is_planned(surprise, parts, tmp_path, caplog):
    with caplog.at_level("INFO", "jtune"):
        train(configured(tmp_path / "new", parts, "surprise"))
    train(configured(tmp_path / "sft", parts, "sft"))
    ours, plain = (small.state(tmp_path / name / "out") for name in ("new", "sft"))
    first, plain_first = ours["log_history"][0]["loss"], plain["log_history"][0]["loss"]
    # The base is random: all tokens are nearly as surprising, and the mean of squares is near the square of the mean.
    np.testing.assert_allclose(first, plain_first**2, rtol=0.05)
    assert first > 2 * plain_first
    assert "loss: squared surprise" in caplog.text
    assert any("eval_loss" in record for record in ours["log_history"])
    planned = plan(configured(tmp_path / "plan", parts, "surprise", command="plan"))
    assert planned["steps"] == 2
