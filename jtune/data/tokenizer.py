"""The tokenizer of a model, and the special tokens that training needs."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jtune.errors import DataError

log = logging.getLogger("jtune")


def load_tokenizer(
    path: str,
    *,
    split_special_tokens: bool = False,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Any:
    """The transformers tokenizer of a model: of its folder, or of a hub id (`revision`, `cache_dir`, `token`).

    Raises:
      DataError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow to import
    from transformers.utils.hub import cached_file

    path, hub = str(path), {"revision": revision or "main", "cache_dir": cache_dir, "token": token}
    try:
        # tokenizer.json says all of what the tokenizer does. AutoTokenizer may prefer a class by the model's type,
        # whose own pre-tokenizer takes the place of the file's: other ids than the model was trained on.
        whole = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub)
        kind = PreTrainedTokenizerFast if whole is not None else AutoTokenizer
        return kind.from_pretrained(path, split_special_tokens=split_special_tokens, padding_side="right", **hub)
    except Exception as error:
        raise DataError(_unreadable(path, error)) from error


def fix_special_tokens(tokenizer: Any, stop_words: Sequence[str] = (), *, replace_eos: bool = False) -> None:
    """Give `tokenizer`, in place, an eos, a pad token, and the stop words of a template as special tokens.

    Stop words are special so that they are one token in text and are left out when an answer is shown. With
    `replace_eos` the first of them becomes eos. Doing it again changes nothing. Tokens that the vocabulary lacks are
    appended to it, with a warning: the model has no embedding for them.
    """
    before = len(tokenizer)
    if replace_eos and tokenizer.eos_token != stop_words[0]:
        log.info("the tokenizer's eos is now %s (it was %s)", stop_words[0], tokenizer.eos_token)
        tokenizer.add_special_tokens({"eos_token": stop_words[0]})
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
        log.info("the tokenizer has no eos: it is now <|endoftext|>")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        log.info("the tokenizer has no pad token: it is now %s", tokenizer.eos_token)
    others = list(stop_words[1:] if replace_eos else stop_words)
    if others:
        tokenizer.add_special_tokens({"extra_special_tokens": others}, replace_extra_special_tokens=False)
    if len(tokenizer) > before:
        added = tokenizer.convert_ids_to_tokens(list(range(before, len(tokenizer))))
        log.warning(
            "tokens that the tokenizer did not have: %s. Is it the template of this model?", ", ".join(map(str, added))
        )


def _unreadable(path: str, error: Exception) -> str:
    folder = Path(path)
    if folder.is_dir():
        files = {f.name for f in folder.iterdir()}
        if not files & {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"}:
            return f"{path} holds no tokenizer (no tokenizer.json): copy the tokenizer files of the model there"
    elif folder.is_absolute() or path.startswith(".") or path.count("/") > 1:
        return f"model_name_or_path {path!r}: there is no such folder"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return f"cannot read the tokenizer of {path!r}: {reason}"
