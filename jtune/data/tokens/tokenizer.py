"""The tokenizer of a model, and the special tokens that training needs."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from jtune.errors import ConfigError, DataError
from jtune.files import read_object

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

    Code of the model's repository never runs.

    Raises:
      DataError: there is none, it cannot be read, or only code of its repository makes it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow to import
    from transformers.utils.hub import cached_file

    whole = None
    path, hub = str(path), {"revision": revision or "main", "cache_dir": cache_dir, "token": token}
    try:
        # tokenizer.json says all of what the tokenizer does. AutoTokenizer may prefer a class by the model's type,
        # whose own pre-tokenizer takes the place of the file's: other ids than the model was trained on.
        whole = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub)
        kind = PreTrainedTokenizerFast if whole is not None else AutoTokenizer
        # transformers asks on stdin whether to run a repository's code, unless it is told.
        tokenizer = kind.from_pretrained(
            path, split_special_tokens=split_special_tokens, padding_side="right", trust_remote_code=False, **hub
        )
        ids = set(tokenizer.encode("a date", add_special_tokens=False))
        # Of a class by its name transformers makes one without its files, too, to which every text is empty or unknown.
        if whole is None and ids <= {tokenizer.unk_token_id, *tokenizer.convert_tokens_to_ids(["▁"])}:
            raise ValueError(f"{type(tokenizer).__name__} has no vocabulary: its files are missing (tokenizer.json)")
        return tokenizer
    except Exception as error:
        code = [] if whole is not None else _code(path, hub, "trust_remote_code" in str(error))
        if code:
            raise DataError(
                f"the tokenizer of {path!r} can only be had by running code of its repository ({', '.join(code)}), "
                "which jtune never does (trust_remote_code has no effect). A folder with a tokenizer.json needs no "
                "such code: look for a release of the model that has one"
            ) from error
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


def ids_of(tokenizer: Any) -> frozenset[int]:
    """Every id that it may give."""
    return frozenset(tokenizer.get_vocab().values())


def add_tokens(tokenizer: Any, plain: Sequence[str] = (), special: Sequence[str] = ()) -> list[str]:
    """Append tokens to the vocabulary of `tokenizer`, in place; those that it has are not added again.

    Returns:
      Those that it did not have.
    """
    before = tokenizer.get_vocab()
    tokenizer.add_tokens(list(plain), special_tokens=False)
    tokenizer.add_tokens(list(special), special_tokens=True)
    return [token for token in dict.fromkeys((*plain, *special)) if token not in before]


def add_model_tokens(tokenizer: Any, args: Any) -> tuple[list[str], dict[str, str]]:
    """`add_tokens` as the arguments of a run ask for it; what was added, and what was said of the special ones.

    Args:
      args: with LLaMA-Factory's names (jtune.config.ModelArguments).
    """
    descriptions = read_descriptions(args.new_special_tokens_config) if args.new_special_tokens_config else {}
    return add_tokens(tokenizer, args.add_tokens, tuple(descriptions) or args.add_special_tokens), descriptions


def read_descriptions(path: str) -> dict[str, str]:
    """The content of a `new_special_tokens_config`: special tokens, and a text that says what each means.

    Raises:
      ConfigError: there is no such file, or it is not `token: description`.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise ConfigError(f"new_special_tokens_config: {path} cannot be read: {reason}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"new_special_tokens_config: {path} must hold lines of `token: description`")
    for token, text in content.items():
        if not isinstance(token, str) or not isinstance(text, str):
            raise ConfigError(
                f"new_special_tokens_config: {path}: {token!r}: {text!r} is not text: write both in quotes"
            )
    return content


def _code(path: str, hub: dict[str, Any], of_config: bool) -> list[str]:
    """The files with code that a model's configurations name for its tokenizer (`auto_map`), or for `of_config`."""
    from transformers.utils.hub import cached_file

    found: dict[str, set[str]] = {"AutoTokenizer": set(), "AutoConfig": set()}
    for name in ("tokenizer_config.json", "config.json"):
        try:
            file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
            named = json.loads(Path(file).read_text(encoding="utf-8")).get("auto_map") if file else None
        except (OSError, ValueError, AttributeError):
            continue
        # Older files hold the tokenizer's classes alone, slow and fast.
        named = named if isinstance(named, dict) else {"AutoTokenizer": named}
        for key, files in found.items():
            classes = named.get(key)
            for word in classes if isinstance(classes, list) else [classes]:
                if isinstance(word, str):  # "owner/repository--module.Class": code of another repository
                    files.add(f"{word.rpartition('.')[0].replace('--', '/')}.py")
    return sorted(found["AutoTokenizer"] or (found["AutoConfig"] if of_config else ()))


def _unreadable(path: str, error: Exception) -> str:
    folder = Path(path)
    if folder.is_dir():
        for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
            try:
                read_object(folder / name)
            except FileNotFoundError:
                continue
            except DataError as fault:
                return str(fault)
        files = {f.name for f in folder.iterdir()}
        if not files & {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"}:
            return f"{path} holds no tokenizer (no tokenizer.json): copy the tokenizer files of the model there"
    elif folder.is_absolute() or path.startswith(".") or path.count("/") > 1:
        return f"model_name_or_path {path!r}: there is no such folder"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return f"cannot read the tokenizer of {path!r}: {reason}"
