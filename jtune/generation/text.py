"""From tokens that come one by one to text that can be shown, and to what of it is thinking."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are no character, or not yet


def stream_text(tokenizer: Any, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> Iterator[str]:
    """The text of `tokens` in pieces, each as soon as no later token can change it; joined, they are all of it.

    A character may take several tokens: what ends in the middle of one is held back until it is whole.

    >>> for piece in stream_text(tokenizer, [104, 105]): print(piece, end="")                  # doctest: +SKIP
    """
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    ids: list[int] = []
    start = read = 0  # shown is what comes before `read`; the text of `start` to `read` says where a piece begins
    for token in tokens:
        ids.append(token)
        shown, text = decode(ids[start:read]), decode(ids[start:])
        if len(text) > len(shown) and not text.endswith(UNFINISHED):
            yield text[len(shown) :]
            start, read = read, len(ids)
    shown, text = decode(ids[start:read]), decode(ids[start:])
    if len(text) > len(shown):
        yield text[len(shown) :]


class Piece(NamedTuple):
    text: str
    thought: bool


def split_thoughts(pieces: Iterable[str], words: Sequence[str], *, thinking: bool = False) -> Iterator[Piece]:
    """Text in pieces, what the answer begins with between two words set apart; without the words and the blanks there.

    >>> list(split_thoughts(["<thi", "nk>1 + 1", "</think>\\n\\n", "2"], ("<think>", "</think>")))
    [Piece(text='1 + 1', thought=True), Piece(text='2', thought=False)]

    Args:
      words: what opens and what closes a thought.
      thinking: the prompt has opened the thought already.
    """
    opening, closing = (word.strip() for word in words)
    part = "thought" if thinking else "unknown"
    fresh = True  # nothing of this part was shown: its first blanks are left out
    held = ""
    for piece in pieces:
        held += piece
        if part == "unknown":
            text = held.lstrip()
            if opening.startswith(text[: len(opening)]) and len(text) < len(opening):
                continue
            part, held = ("thought", text[len(opening) :]) if text.startswith(opening) else ("answer", held)
            fresh = part == "thought"
        held = held.lstrip() if fresh else held
        if part == "thought":
            before, found, after = held.partition(closing)
            ready = before.rstrip() if found else held[: _surely_before(closing, held)]
            if ready:
                yield Piece(ready, True)
                fresh = False
            if not found:
                held = held[len(ready) :]
                continue
            part, held, fresh = "answer", after.lstrip(), True
        if held:
            yield Piece(held, False)
            held, fresh = "", False
    if held:
        yield Piece(held, part == "thought")


def _surely_before(word: str, text: str) -> int:
    """How many characters of `text` come before `word`, and the blanks before it, whatever follows."""
    begun = next((k for k in range(len(word) - 1, 0, -1) if text.endswith(word[:k])), 0)
    return len(text[: len(text) - begun].rstrip())
