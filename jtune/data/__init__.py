"""Data: from a name in dataset_info.json to the batches of every update.

    registry ── load ── align ── templates ── encode ── pack ── batches

`load_datasets` goes the way from names to encoded sets; each step can be called alone (see pipeline.py).
"""

from jtune.data.batching.evaluation import EvalBatch, EvalPlan, eval_batches
from jtune.data.batching.stream import StreamPlan
from jtune.data.batching.train import packing_windows
from jtune.data.batching.units import (
    OTHER,
    TOKENS,
    Segments,
    Sizes,
    UnitSet,
    array_shapes,
    assumed_sizes,
    grouped,
    segments_of,
    units_of,
)
from jtune.data.batching.updates import Plan, length_seed, order_seed, plan_updates, rows_are_packed
from jtune.data.encode.encoded import Encoded, check_id, check_vocabulary
from jtune.data.pipeline import Splits, load_datasets
from jtune.data.report import Report
from jtune.data.stream import Stream
from jtune.data.templates.template import Template, get_template, template_of
from jtune.data.tokens.tokenizer import load_tokenizer

__all__ = [
    "OTHER",
    "TOKENS",
    "Encoded",
    "EvalBatch",
    "EvalPlan",
    "Plan",
    "Report",
    "Segments",
    "Sizes",
    "Splits",
    "Stream",
    "StreamPlan",
    "Template",
    "UnitSet",
    "array_shapes",
    "assumed_sizes",
    "check_id",
    "check_vocabulary",
    "eval_batches",
    "get_template",
    "grouped",
    "length_seed",
    "load_datasets",
    "load_tokenizer",
    "order_seed",
    "packing_windows",
    "plan_updates",
    "rows_are_packed",
    "segments_of",
    "template_of",
    "units_of",
]
