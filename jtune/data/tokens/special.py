"""Special tokens in the text of rows: found, so that they can be told, and with `split_special_tokens` made text.

The words around thoughts and calls are special tokens in some vocabularies, and stand in text on purpose.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from jtune.data.tokens.ids import Ids, TokenIds, token_ids

# What stands for a special token of the text while a template is written around it: private characters, a number.
GUARDED = re.compile("\ue000(\\d+)\ue001")


class SpecialTokens(NamedTuple):
    """The special tokens of a tokenizer, the longest first, and the words of a template that may hold some of them."""

    tokens: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def special_of(tokenizer: Any, words: Sequence[str]) -> SpecialTokens:
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return SpecialTokens(tuple(sorted(tokens, key=lambda token: (-len(token), token))), tuple(words))


@cache
def pattern(tokens: tuple[str, ...]) -> str:
    """A regular expression of any of them, in the words that Python and Arrow have in common."""
    return "|".join(map(re.escape, tokens))


@cache
def _any(special: SpecialTokens) -> tuple[re.Pattern[str], dict[str, int]]:
    numbers = {token: number for number, token in enumerate(special.tokens)}
    return re.compile(pattern((*special.words, *special.tokens))), numbers


def find(text: str, special: SpecialTokens) -> set[str]:
    """The special tokens in `text` that do not belong to `special.words`."""
    either, numbers = _any(special)
    return {token for token in either.findall(text) if token in numbers and token not in special.words}


def guard(text: str, special: SpecialTokens) -> str:
    """`text` with what `find` finds replaced by what `split_ids` knows it by."""
    either, numbers = _any(special)
    is_word = lambda token: token not in numbers or token in special.words
    return either.sub(lambda x: x[0] if is_word(x[0]) else f"\ue000{numbers[x[0]]}\ue001", text)


def with_guarded(
    write: Callable[..., Any],
    special: SpecialTokens,
    messages: Sequence[Mapping[str, Any]],
    system: str | None = None,
    tools: str | None = None,
    **how: Any,
) -> Any:
    """What `write(messages, system, tools)` makes of texts that are guarded."""
    guarded = lambda text: guard(text, special) if text else text
    texts = ("content", "original")
    safe = [{**message, **{key: guarded(message[key]) for key in texts if key in message}} for message in messages]
    return write(safe, guarded(system), guarded(tools), **how)


def split_ids(tokenizer: Any, special: SpecialTokens, whole: TokenIds, texts: Sequence[str]) -> Ids:
    """The ids of texts in which what was guarded is text, and every other special token is one.

    Args:
      whole: tokenises texts that hold nothing guarded.
    """
    pieces: list[tuple[str, bool]] = []  # and whether special tokens in it are text
    counts = []
    for text in texts:
        cut = re.split(f"({pattern(special.tokens)})", text) if GUARDED.search(text) else [text]
        own = [(GUARDED.sub(lambda x: special.tokens[int(x[1])], part), bool(GUARDED.search(part))) for part in cut]
        own = [part for part in own if part[0]]
        pieces += own
        counts.append(len(own))
    ids: list[list[int]] = [[]] * len(pieces)
    for split, tokenise in ((False, whole), (True, partial(token_ids, tokenizer, split_special=True))):
        places = [k for k, (_, is_split) in enumerate(pieces) if is_split == split]
        for place, made in zip(places, tokenise([pieces[k][0] for k in places]).lists()):
            ids[place] = made
    ends = np.cumsum([0, *counts]).tolist()
    return Ids.of([[i for part in ids[a:b] for i in part] for a, b in pairwise(ends)])
