"""One side of data.py: LLaMA-Factory reads, encodes and packs the training set of a YAML; its figures, as JSON.

Run by LLaMA-Factory's Python.
"""

import json
import sys
import time

import yaml
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer


def main(path: str) -> None:
    with open(path) as file:
        model_args, data_args, training_args, _, _ = get_train_args(yaml.safe_load(file))
    began = time.perf_counter()
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    table = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"]
    seconds = time.perf_counter() - began
    masks = table.with_format("numpy")["attention_mask"][:]
    filled = sum(int((mask > 0).sum()) for mask in masks)
    total = sum(len(mask) for mask in masks)
    print(json.dumps({"packed": len(table), "tokens": filled, "seconds": seconds, "waste": 1 - filled / total}))


if __name__ == "__main__":
    main(sys.argv[1])
