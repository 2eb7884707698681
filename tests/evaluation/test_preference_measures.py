"""Evaluation of pairs and feedback, by whole runs."""

import json
import math

import pytest
from small import case, write_model, write_preferences

from jtune.cli.main import main


@pytest.mark.parametrize(("stage", "rows", "loss"), [("dpo", "pairs", math.log(2)), ("kto", "marked", 0.5)])
@pytest.mark.slow
def test_a_model_that_is_its_own_reference_has_no_rewards(stage, rows, loss, tmp_path):
    parts = write_model(tmp_path / "model"), write_preferences(tmp_path / "data")
    how = {"do_train": False, "do_eval": True, "dataset": None, "val_size": 0, "eval_strategy": "no", "mesh_fsdp": -1}
    path = case(tmp_path, *parts, stage=stage, eval_dataset=rows, max_samples=20, **how)
    assert main(["train", str(path)]) == 0
    found = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert "eval_logps/chosen" in found
    assert not any("rewards" in key for key in found)
