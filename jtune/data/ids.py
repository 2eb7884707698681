"""From texts to token ids: by the tokenizer itself, or by gigatoken, which is a hundred times faster.

gigatoken reads the same tokenizer.json. That its ids are the same is checked: on texts that tokenizers differ in before
it is used at all, and on every fiftieth text of the data.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jtune.errors import ConfigError, DataError

log = logging.getLogger("jtune")

TokenIds = Callable[[Sequence[str]], list[list[int]]]
CHECKED = 50  # one text of so many
PROBES = (
    "",
    " ",
    "  a  \n\n\tb\r\n c\n",
    "12345 3.14 1e-9 1,000,000",
    "I'LL say 'tis the dogs' 'S",
    "def f(x):\n    return {x: x**2}  # [1, 2]\n",
    "你好，世界。ＡＢＣ　１２３",  # noqa: RUF001
    "naïve café e\u0301 ﬁ Å ½ ²",
    "👩\u200d👩\u200d👧 🇮🇹 \u200b\u00a0x\ufeff",
    "العربية עברית हिन्दी ไทย 한국어",
    "\x00\x01\x7f\ufffd",
    "a" * 300,
    "https://example.org/?a=b&c=%20#d",
)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, no special tokens added."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    # As the tokenizer itself calls it, without the places of tokens in the text, which take half of the time.
    backend.encode_special_tokens = getattr(tokenizer, "split_special_tokens", False)
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def gigatoken_ids(tokenizer: Any) -> TokenIds | None:
    """`token_ids` of this tokenizer by gigatoken; None where gigatoken cannot read it, or gives other ids.

    Raises:
      ConfigError: gigatoken is not installed.
    """
    try:
        import gigatoken
    except ImportError as error:
        raise ConfigError("tokenizer_backend: gigatoken is not installed: pip install 'jtune[fast]'") from error
    special = list(tokenizer.get_added_vocab())
    texts = [*PROBES, *special, *(f" a{token} b\n{token}" for token in special)]
    expected = token_ids(tokenizer, texts)
    try:
        fast = gigatoken.Tokenizer.from_json(tokenizer.backend_tokenizer.to_str())
        found = fast.encode_batch_list(texts)
    except Exception as error:  # whatever it does not know
        log.warning("gigatoken cannot read this tokenizer, which is used itself: %s", str(error).splitlines()[0][:200])
        return None
    if found != expected:
        text = next(text for text, a, b in zip(texts, found, expected) if a != b)
        log.warning("gigatoken gives other ids than this tokenizer, which is used itself: as for %r", text[:40])
        return None
    return partial(_checked, fast, tokenizer)


def _checked(fast: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    ids = fast.encode_batch_list(list(texts))
    if ids[::CHECKED] != token_ids(tokenizer, texts[::CHECKED]):
        raise DataError(
            "gigatoken gives other ids than the tokenizer for a text of the data: set tokenizer_backend: huggingface"
        )
    return ids
