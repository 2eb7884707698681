"""From the arguments of a run to its tokenizer, and the rows that its embeddings need."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from jtune.config import Config, ModelArguments
from jtune.config.stages import rules_of
from jtune.data import load_tokenizer, template_of
from jtune.data.tokens.tokenizer import add_model_tokens, ids_of
from jtune.errors import ConfigError, DataError
from jtune.interop import hf, peft
from jtune.interop.layout import in_place
from jtune.loading.value_head import adapter_folders
from jtune.models import DecoderConfig, abstract_params
from jtune.models.families import decoder_config
from jtune.models.families.wrapped import with_text
from jtune.models.names import tensors
from jtune.sharding import tree_shardings
from jtune.tuning.axes import prepared_axes
from jtune.tuning.quantize import Form, apply
from jtune.tuning.vocabulary import TABLES, Change, embedding_modules, padded, resize

log = logging.getLogger("jtune")

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


class Vocabulary(NamedTuple):
    """What a run settles before it reads rows and weights."""

    tokenizer: Any
    decoder: DecoderConfig  # of the rows that the run has
    config: Config  # as given, but for `additional_target` where new rows must train
    change: Change | None  # from what is stored; None: nothing changes
    resized: bool = False  # rows are not the base's: an adapter must hold them

    def config_json(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of the model that is trained, from the one that is stored."""
        rows = {"vocab_size": self.decoder.vocab_size} if self.change else {}
        found = with_text(stored, rows)
        if decoder_config(stored).tie_word_embeddings and not self.decoder.tie_word_embeddings:
            found = {**with_text(found, {"tie_word_embeddings": False}), "tie_word_embeddings": False}
        return found


def resolve_vocabulary(config: Config, folder: Path, decoder: DecoderConfig) -> Vocabulary:
    """The tokenizer with the tokens that are asked for, and the decoder with rows for them.

    As in LLaMA-Factory, `add_tokens` and the like imply `resize_vocab` where they add anything; the stop words of the
    template count, too; rows are padded to a multiple of 64; and what new rows there are train whole beside an adapter
    unless `additional_target` says otherwise. An adapter that was trained so brings its rows and its tokenizer along;
    where no template is named, any brings the chat template that lies beside it.

    Args:
      decoder: what the config.json in `folder` describes.

    Raises:
      ConfigError: the arguments contradict each other or what an adapter holds.
      DataError: a tokenizer or an adapter cannot be read.
    """
    args = config.model
    adapters = adapter_folders(args)
    decoder, unties = untied(decoder, folder, adapters)
    tokenizer = load_tokenizer(str(folder), split_special_tokens=args.split_special_tokens)
    chat = config.data.template is None and rules_of(config.finetuning.stage).has_prompts
    for adapter in adapters:
        tokenizer = _larger(tokenizer, adapter, args, chat=chat)
    had = ids_of(tokenizer)
    added, descriptions = add_model_tokens(tokenizer, args)
    if added and not args.resize_vocab:
        log.info("resize_vocab: tokens are added, so the model gets rows for them")
    if added or args.resize_vocab:
        # Gives the tokenizer its stop words.
        template_of(config.data, tokenizer, for_training=False, for_chat=False)
        config = _trained(config, decoder)
    held = max((rows for adapter in adapters if (rows := stored_rows(adapter, decoder)) is not None), default=0)
    change = _change(decoder.vocab_size, held, tokenizer, had, bool(added or args.resize_vocab))
    if change is None:
        change = Change(decoder.vocab_size, decoder.vocab_size, unties=True) if unties else None
        return Vocabulary(tokenizer, decoder, config, change, bool(held))
    if decoder.per_layer_inputs and change.rows > decoder.per_layer_vocab_size:
        raise ConfigError(
            f"resize_vocab: {decoder.family} has a second table, of what each layer gets for a token, and it has "
            f"{decoder.per_layer_vocab_size} rows: new tokens would have none there. Use tokens that the tokenizer has"
        )
    change = change._replace(unties=unties)
    new = {i for i in ids_of(tokenizer) if i not in had}
    described = {
        tokenizer.convert_tokens_to_ids(token): tuple(
            i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i not in new
        )
        for token, text in descriptions.items()
    }
    if args.init_special_tokens != "noise_init" and descriptions:
        change = change._replace(
            described={i: tokens for i, tokens in described.items() if i in new},
            noise="described" if args.init_special_tokens == "desc_init_w_noise" else "none",
        )
    names = tokenizer.convert_ids_to_tokens(sorted(new))
    shown = f" for {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}" if names else ""
    log.info("vocabulary: %d rows%s (the model has %d)", change.rows, shown, change.stored)
    return Vocabulary(tokenizer, replace(decoder, vocab_size=change.rows), config, change, resized=True)


def untied(decoder: DecoderConfig, folder: Path, adapters: Sequence[Path]) -> tuple[DecoderConfig, bool]:
    """The decoder, with a head of its own where the files hold one though config.json says that it is the embedding.

    transformers and PEFT compute with both tables then.

    Args:
      folder: of the model; `adapters`: folders of those that are read onto it.

    Returns:
      The decoder, and whether it is an adapter that unties the two: the model's files have one table.

    Raises:
      DataError: an adapter has rows for the one table, and another makes two of it.
    """
    of_base = hf.has_own_head(folder, decoder)
    of_adapters = [str(adapter) for adapter in adapters if not of_base and peft.has_own_head(adapter, decoder)]
    if not of_base and not of_adapters:
        return decoder, False
    for adapter in adapters if of_adapters else ():
        if str(adapter) not in of_adapters and peft.read_options(adapter).get("trainable_token_indices"):
            raise DataError(
                f"{adapter}: it trained rows of the table that is embedding and head, and {of_adapters[0]} has a head "
                "of its own: merge the first with `jtune export`, and read the second onto what it writes"
            )
    log.info(
        "%s holds a head that is not the embedding: the model has both (tie_word_embeddings: false)",
        ", ".join(of_adapters) or folder,
    )
    return replace(decoder, tie_word_embeddings=False), bool(of_adapters)


def is_changed(args: ModelArguments) -> bool:
    """Whether the arguments may add tokens or rows."""
    return bool(args.resize_vocab or args.add_tokens or args.add_special_tokens or args.new_special_tokens_config)


def load_params(
    folder: Path,
    decoder: DecoderConfig,
    change: Change | None,
    mesh: Mesh | None,
    *,
    seed: int,
    dtype: Any = None,
    form: Form | None = None,
) -> Any:
    """`jtune.interop.hf.load_params`, then the rows that `change` adds.

    Args:
      decoder: of the run, its rows and tables those of `change`.
      mesh: None: everything goes to the first device.
    """
    stored = decoder
    if change is not None:
        tied = change.unties or decoder.tie_word_embeddings
        stored = replace(decoder, vocab_size=change.stored, tie_word_embeddings=tied)

    def shardings(config: DecoderConfig) -> Any:
        if mesh is None:
            return None
        like = jax.eval_shape(partial(apply, form=form), abstract_params(config))
        return tree_shardings(prepared_axes(like, config), like, mesh)

    params = hf.load_params(folder, stored, dtype=dtype, shardings=shardings(stored), form=form)
    return params if change is None else resize(params, change, jax.random.key(seed), shardings(decoder))


def vocabulary_of(
    decoder: DecoderConfig, folder: Path, adapters: Sequence[Path]
) -> tuple[DecoderConfig, Change | None]:
    """The decoder with the rows and tables that a model's files and its adapters hold, and the change that makes them.

    The rows are drawn, and those that an adapter holds take their place when it is read.

    Args:
      decoder: as config.json in `folder` describes it.
      adapters: folders of adapters that are read onto the model.
    """
    decoder, unties = untied(decoder, folder, adapters)
    rows = max([decoder.vocab_size, *(stored_rows(adapter, decoder) or 0 for adapter in adapters)])
    if rows == decoder.vocab_size and not unties:
        return decoder, None
    return replace(decoder, vocab_size=rows), Change(decoder.vocab_size, rows, unties=unties)


def stored_rows(adapter: Path, decoder: DecoderConfig) -> int | None:
    """How many rows the embedding has that an adapter's folder holds; None where it holds none, or is not here.

    Raises:
      DataError: the head, which is a table of its own, has not as many.
    """
    try:
        with safe_open(adapter / peft.WEIGHTS, "np") as file:
            every = {name.removeprefix(peft.PREFIX): name for name in file.keys()}  # noqa: SIM118
            names = {ours: every[name] for name, ours in in_place(every, decoder).items()}
            found: dict[str, int | None] = {}
            for module, leaf in TABLES:
                if module in embedding_modules(decoder.tie_word_embeddings) and leaf != "bias":
                    [part] = tensors((module, leaf), decoder, range(0))
                    stem = part.name.removesuffix(".weight")
                    forms = (part.name, f"{stem}.base_layer.weight", f"{stem}.token_adapter.base_layer.weight")
                    name = next((names[form] for form in forms if form in names), None)
                    found[module] = None if name is None else file.get_slice(name).get_shape()[0]
    except (FileNotFoundError, SafetensorError):
        return None  # said when it is read
    rows = {rows for rows in found.values() if rows is not None}
    if not rows - {decoder.vocab_size}:
        return rows.pop() if rows else None
    if len(rows) > 1 or None in found.values():
        each = ", ".join(f"{name}: {rows or 'none'}" for name, rows in found.items())
        raise DataError(
            f"{adapter / peft.WEIGHTS}: its vocabulary was resized, but its tables are not all there (rows of {each}): "
            f"the others' new rows are lost. Name both in additional_target when training"
        )
    return rows.pop()


def _larger(tokenizer: Any, adapter: Path, args: ModelArguments, *, chat: bool) -> Any:
    """The tokenizer beside an adapter, if it has all tokens of `tokenizer` and more; else `tokenizer`.

    Args:
      chat: also give `tokenizer` the chat template and the eos of one that has the same tokens.
    """
    if not any((adapter / name).exists() for name in TOKENIZER):
        return tokenizer
    own = load_tokenizer(str(adapter), split_special_tokens=args.split_special_tokens)
    ours, theirs = tokenizer.get_vocab().items(), own.get_vocab().items()
    if ours < theirs:
        log.info("the tokenizer is the one beside the adapter, which has %d tokens more", len(theirs) - len(ours))
        return own
    asks = lambda x: (x.chat_template, x.eos_token)
    if chat and ours == theirs and own.chat_template is not None and asks(own) != asks(tokenizer):
        log.info("the chat template is the one beside the adapter, in %s", adapter)
        tokenizer.chat_template, tokenizer.eos_token = own.chat_template, own.eos_token
    return tokenizer


def _change(stored: int, held: int, tokenizer: Any, had: frozenset[int], asked: bool) -> Change | None:
    """What becomes of `stored` rows.

    Args:
      held: rows that an adapter holds; 0: it holds none.
      had: ids that the tokenizer had before tokens were added.
      asked: whether rows are to be added for tokens that have none.
    """
    ids = ids_of(tokenizer)
    size = max(len(tokenizer), 1 + max(ids))
    rows = max(stored, held)
    if asked and size > rows:
        if held > stored:
            raise ConfigError(
                f"resize_vocab: the adapter holds {held} rows, the tokenizer has {size} tokens: `jtune export` the "
                "adapter with its base first, then add tokens to the model that it writes"
            )
        rows = padded(size)
    new = tuple(sorted(i for i in ids - had if i < stored)) if asked and not held else ()
    return Change(stored, rows, new) if new or rows > stored else None


def _trained(config: Config, decoder: DecoderConfig) -> Config:
    """The arguments, with the tables of rows among what trains beside an adapter."""
    finetuning = config.finetuning
    if finetuning.finetuning_type != "lora" or finetuning.additional_target:
        return config
    names: Sequence[str] = embedding_modules(decoder.tie_word_embeddings)
    if config.model.adapter_name_or_path and not finetuning.create_new_adapter:
        log.info("resize_vocab: what trains is what the given adapter holds")
    elif config.training.do_train:
        log.info("resize_vocab: %s train whole, beside the adapter (additional_target)", " and ".join(names))
    return replace(config, finetuning=replace(finetuning, additional_target=tuple(names)))
