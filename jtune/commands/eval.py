"""`jtune eval CASE.yaml --tasks NAME,NAME`: benchmarks of the lm-evaluation-harness."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.utils import make_table

from jtune.config import Config
from jtune.evaluation.harness import run_tasks

log = logging.getLogger("jtune")


def evaluate(
    config: Config, tasks: Sequence[str], *, include_path: str | None = None, limit: float | None = None
) -> dict[str, Any]:
    """Print the harness's table; write `eval_tasks.json` into `output_dir` where one is given.

    Args:
      include_path, limit: see `run_tasks`.

    Returns:
      The figures of each task.

    Raises:
      JtuneError: see `run_tasks`.
    """
    for note in config.notes:
        log.info("note: %s", note)
    found = run_tasks(config, tasks, include_path=include_path, limit=limit)
    print(make_table(found))
    if "output_dir" in config.origins:
        path = Path(config.training.output_dir) / "eval_tasks.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found["results"], indent=2, ensure_ascii=False, default=str) + "\n")
        log.info("wrote %s", path)
    return found["results"]
