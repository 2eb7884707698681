"""A model before its weights are read: where its files lie, its decoder, and the vocabulary of the run."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jtune.config import Config, ModelArguments
from jtune.errors import ConfigError
from jtune.interop import hf, value_head
from jtune.loading.rope import with_rope_scaling
from jtune.loading.value_head import head_folder, scores
from jtune.loading.vocabulary import resolve_vocabulary
from jtune.models import DecoderConfig
from jtune.models.families import decoder_config
from jtune.tuning.vocabulary import Change


class Source(NamedTuple):
    """What a run knows of its model before it reads weights."""

    folder: Path
    config_json: dict[str, Any]  # the Hugging Face config.json, with the vocabulary of the run
    decoder: DecoderConfig
    config: Config  # the arguments; `additional_target` names the tables of new rows
    tokenizer: Any = None  # None: the model has none, and none is needed
    change: Change | None = None  # from the stored vocabulary to that of the run
    resized: bool = False  # an adapter must hold the tables: their rows are not the base's
    value_head: Path | None = None  # the folder of the value head; None: it is drawn, or the stage has none
    second: "Source | None" = None  # of the model beside this one, if there is one (`jtune.loading.second`)

    @property
    def vocab_size(self) -> int:
        """Every id of a row must be below it: each model needs an embedding for it."""
        own = self.decoder.vocab_size
        return own if self.second is None else min(own, self.second.decoder.vocab_size)

    @property
    def stored_dtype(self) -> jnp.dtype:
        return hf.stored_dtype(self.config_json)


def fetch_model(args: ModelArguments, *, weights: bool = True) -> Path:
    """The folder of `model_name_or_path`, downloaded if it is a hub id.

    Args:
      weights: False: the small files only.

    Raises:
      ConfigError: `model_name_or_path` is not set.
      DataError: there is no such model.
    """
    if args.model_name_or_path is None:
        raise ConfigError("model_name_or_path is not set: the folder of a Hugging Face model, or a hub id")
    return hf.fetch(args.model_name_or_path, weights=weights, **args.hub)


def read_source(config: Config, folder: Path | None = None, *, trains: bool = True) -> Source:
    """Read config.json and the tokenizer, and resolve the vocabulary.

    Args:
      folder: of the model; default: what `fetch_model` gives.
      trains: apply the arguments that change the decoder in training only (`moe_aux_loss_coef`), and scale rotations
        for the rows of the run (`rope_scaling`).

    Raises:
      ConfigError: the arguments ask for what the model does not have, or contradict each other or an adapter.
      DataError: a file cannot be read, or jtune does not know the model.
    """
    folder = fetch_model(config.model) if folder is None else folder
    bare = read_bare_source(config, folder, trains=trains)
    vocabulary = resolve_vocabulary(config, folder, bare.decoder)
    return Source(
        folder,
        vocabulary.config_json(bare.config_json),
        vocabulary.decoder,
        vocabulary.config,
        vocabulary.tokenizer,
        vocabulary.change,
        vocabulary.resized,
        head_folder(config, folder),
    )


def read_bare_source(config: Config, folder: Path, *, trains: bool = True) -> Source:
    """`read_source` without a tokenizer, the vocabulary as it is stored."""
    stored = hf.read_config(folder)
    if scores(config) and value_head.is_classifier(stored):
        stored = value_head.without_labels(stored)
    config_json = with_rope_scaling(stored, config, trains=trains)
    decoder = decoder_of(config_json, config.model) if trains else decoder_config(config_json)
    return Source(folder, config_json, decoder, config)


def decoder_of(config_json: Mapping[str, Any], args: ModelArguments) -> DecoderConfig:
    """The decoder that a config.json describes, with what the arguments change of it.

    Raises:
      ConfigError: they ask for what this model does not have.
      DataError: see `jtune.models.families.decoder_config`.
    """
    decoder = decoder_config(config_json)
    if not args.moe_aux_loss_coef:
        return decoder
    if decoder.experts is None:
        raise ConfigError(f"moe_aux_loss_coef: {decoder.family} has no experts to balance: leave it out")
    return replace(decoder, experts=replace(decoder.experts, aux_coef=args.moe_aux_loss_coef))
