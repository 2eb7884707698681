"""Data sets written to a folder and loaded, and the segments of batches by plain loops."""

import json

import datasets
import numpy as np

from jtune.config import DataArguments
from jtune.config.stages import rules_of
from jtune.data import load_datasets
from jtune.data.cache.shards import alone
from jtune.data.pipeline import Wanted

ALPACA = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}!"} for n in range(20)]
SHAREGPT = [
    {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "now", "arguments": {}}'},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "Sunny."},
        ],
        "system": "Be kind.",
        "tools": '[{"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}]',
    }
]
OPENAI = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "sun"},
            {"role": "assistant", "content": "Sunny."},
        ]
    }
]


def write(folder, name, content, info=None):
    path = folder / name
    if name.endswith(".csv"):
        datasets.Dataset.from_list(content).to_csv(path, index=False)
    elif name.endswith(".parquet"):
        datasets.Dataset.from_list(content).to_parquet(path)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    index = folder / "dataset_info.json"
    known = json.loads(index.read_text()) if index.exists() else {}
    index.write_text(json.dumps(known | {name.split(".")[0]: {"file_name": name} | (info or {})}))


def load(folder, *names, stage="sft", train=True, evaluate=False, seed=0, template=None, group_of=alone, **args):
    arguments = DataArguments(**{"dataset": names, "dataset_dir": str(folder), "template": "chatml", **args})
    return load_datasets(arguments, rules_of(stage), seed, template, Wanted(train, evaluate), group_of=group_of)


def texts(template, encoded):
    return [template.tokenizer.decode(encoded[i]["input_ids"]) for i in range(len(encoded))]


def segments(arrays):
    """Every segment of `[..., seq]` arrays by plain loops: (tokens, targets, weights, positions)."""
    flat = {k: x.reshape(-1, x.shape[-1]) for k, x in arrays.items() if x.ndim}
    for row in range(len(flat["input_ids"])):
        ids = flat["segment_ids"][row]
        for s in range(1, ids.max(initial=0) + 1):
            (at,) = np.nonzero(ids == s)
            assert (np.diff(at) == 1).all(), "a segment has a hole"
            yield tuple(flat[k][row][at] for k in ("input_ids", "targets", "loss_weights", "positions"))
