"""From texts to token ids: by the tokenizer itself, or by gigatoken, which is a hundred times faster.

gigatoken reads the same tokenizer.json. That its ids are the same is checked: on texts that tokenizers differ in before
it is used at all, and on every fiftieth text of the data.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from jtune.errors import ConfigError, DataError

log = logging.getLogger("jtune")


class Ids(NamedTuple):
    """Lists of token ids, in one array: no token is ever a Python number on the way to the file."""

    values: np.ndarray  # int32 [tokens]
    sizes: np.ndarray  # int64 [lists]

    @property
    def starts(self) -> np.ndarray:
        """Where each list begins in `values`, int64 `[lists]`."""
        return np.cumsum(self.sizes) - self.sizes

    def take(self, index: np.ndarray) -> np.ndarray:
        """The lists of these numbers, one after the other, int32."""
        sizes = self.sizes[index]
        ends = np.cumsum(sizes)
        return self.values[np.repeat(self.starts[index] - ends + sizes, sizes) + np.arange(sizes.sum())]

    def lists(self) -> list[list[int]]:
        values, ends = self.values.tolist(), np.cumsum(self.sizes).tolist()
        return [values[start:end] for start, end in zip([0, *ends], ends)]

    @classmethod
    def join(cls, lists: Sequence[np.ndarray | Sequence[int]]) -> "Ids":
        """As `of`, of arrays, or few lists."""
        arrays = [np.zeros(0, np.int32), *(np.asarray(row, np.int32) for row in lists)]
        return cls(np.concatenate(arrays), np.array([len(row) for row in lists], np.int64))

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "Ids":
        sizes = np.fromiter(map(len, lists), np.int64, len(lists))
        return cls(np.fromiter(chain.from_iterable(lists), np.int32, int(sizes.sum())), sizes)


TokenIds = Callable[[Sequence[str]], Ids]
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


def token_ids(tokenizer: Any, texts: Sequence[str], *, split_special: bool | None = None) -> Ids:
    """The ids of each text, no special tokens added.

    Args:
      split_special: whether special tokens in it are text; None: as the tokenizer is set.
    """
    if not texts:
        return Ids.of([])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if split_special is None:
        split_special = getattr(tokenizer, "split_special_tokens", False)
    if backend is None:
        plain = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return Ids.of(tokenizer(list(texts), split_special_tokens=split_special, **plain)["input_ids"])
    # As the tokenizer itself calls it, without the places of tokens in the text, which take half of the time.
    backend.encode_special_tokens = split_special
    backend.no_truncation()
    backend.no_padding()
    return Ids.of([encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)])


def gigatoken_ids(tokenizer: Any) -> TokenIds | None:
    """`token_ids` of this tokenizer by gigatoken; None where gigatoken cannot read it, or gives other ids.

    Raises:
      ConfigError: gigatoken is not installed.
    """
    try:
        import gigatoken
    except ImportError as error:
        raise ConfigError("tokenizer_backend: gigatoken is not installed: pip install 'jtune-llm[fast]'") from error
    special = list(tokenizer.get_added_vocab())
    texts = [*PROBES, *special, *(f" a{token} b\n{token}" for token in special)]
    expected = token_ids(tokenizer, texts).lists()
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


def _checked(fast: Any, tokenizer: Any, texts: Sequence[str]) -> Ids:
    import awkward  # what gigatoken gives arrays of

    if not texts:
        return Ids.of([])
    found = fast.encode_batch(list(texts))
    sizes = awkward.to_numpy(awkward.num(found)).astype(np.int64)
    ids = Ids(awkward.to_numpy(awkward.flatten(found)).astype(np.int32), sizes)
    expected = token_ids(tokenizer, texts[::CHECKED])
    sample = np.arange(0, len(texts), CHECKED)
    if not (np.array_equal(ids.sizes[sample], expected.sizes) and np.array_equal(ids.take(sample), expected.values)):
        raise DataError(
            "gigatoken gives other ids than the tokenizer for a text of the data: set tokenizer_backend: huggingface"
        )
    return ids
