"""Data: from a name in dataset_info.json to the batches of every update.

    registry ── load ── align ── templates ── encode ── pack ── batches

`load_datasets` goes the way from names to encoded sets; each step can be called alone (see pipeline.py).
"""

from jtune.data.batches import BatchPlan, EvalBatch, EvalPlan, eval_batches, packing_windows, plan_batches
from jtune.data.encoded import Encoded, check_id, check_vocabulary
from jtune.data.pipeline import Splits, load_datasets
from jtune.data.report import Report
from jtune.data.templates import Template, get_template, template_of
from jtune.data.tokenizer import load_tokenizer

__all__ = [
    "BatchPlan",
    "Encoded",
    "EvalBatch",
    "EvalPlan",
    "Report",
    "Splits",
    "Template",
    "check_id",
    "check_vocabulary",
    "eval_batches",
    "get_template",
    "load_datasets",
    "load_tokenizer",
    "packing_windows",
    "plan_batches",
    "template_of",
]
