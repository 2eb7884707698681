"""The rows of a run, encoded with its template."""

import dataclasses
from typing import Any

from jtune.config import Config
from jtune.config.preference import WITH_MARGIN
from jtune.config.stages import rules_of
from jtune.data import Splits, Template, check_vocabulary, load_datasets, template_of
from jtune.data.cache.shards import GroupOf, alone
from jtune.data.pipeline import Wanted
from jtune.data.sources.load import Hub
from jtune.data.sources.registry import find_datasets
from jtune.errors import DataError


def data_template(config: Config, tokenizer: Any) -> Template:
    """The template of the run; where only answers are asked for, it need give no loss mask; texts need none."""
    only_prompts = not config.training.do_train and config.training.predict_with_generate
    return template_of(
        config.data, tokenizer, for_training=not only_prompts, for_chat=rules_of(config.finetuning.stage).has_prompts
    )


def load_data(
    config: Config, tokenizer: Any, vocab_size: int, group_of: GroupOf = alone, template: Template | None = None
) -> Splits:
    """The encoded training and evaluation sets, every id of them inside the vocabulary.

    Args:
      group_of: which processes share a folder, and so the work (see `load_datasets`).
      template: default: `data_template`.
    """
    data, training = config.data, config.training
    check_margins(config)
    template = data_template(config, tokenizer) if template is None else template
    splits = load_datasets(
        data,
        rules_of(config.finetuning.stage),
        training.seed,
        template,
        Wanted(training.do_train, training.do_eval or training.do_predict, training.predict_with_generate),
        hub=Hub(config.model.cache_dir, config.model.hf_hub_token),
        group_of=group_of,
    )
    for encoded in (splits.train, *splits.eval.values()):
        if encoded is not None:
            check_vocabulary(encoded, vocab_size)
    if splits.stream is None:
        return splits
    return dataclasses.replace(splits, stream=dataclasses.replace(splits.stream, vocab_size=vocab_size))


def check_margins(config: Config) -> None:
    """Look whether the loss of pairs reads the margins that sets have, before rows are read.

    Raises:
      DataError: a set has them, and no loss of `pref_loss` does.
    """
    finetuning, data = config.finetuning, config.data
    if not rules_of(finetuning.stage).compares_answers or set(WITH_MARGIN) & set(finetuning.pref_loss):
        return
    names = (*data.dataset, *data.eval_dataset)
    for entry in find_datasets(names, data.dataset_dir, allow_outside=data.allow_outside_dataset_dir):
        if entry.columns.margin:
            raise DataError(
                f"dataset {entry.name!r}: column {entry.columns.margin!r} is the margin of its pairs, which pref_loss: "
                f"{', '.join(finetuning.pref_loss)} does not use: take {' or '.join(WITH_MARGIN)}, or leave "
                f'"margin" out of its "columns" in dataset_info.json'
            )
