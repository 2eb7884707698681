"""A dialogue line by line: questions in, answers out as they come, thoughts apart."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TextIO

from jtune.errors import DataError
from jtune.generation.text import Piece, split_thoughts

log = logging.getLogger("jtune")

DIM, PLAIN = "\033[2m", "\033[0m"

Message = dict[str, str]


class Answer(NamedTuple):
    """An answer in pieces, as they come."""

    text: Iterator[str]
    thinking: bool  # the prompt has opened a thought already
    words: tuple[str, str]  # open and close a thought


Ask = Callable[[Sequence[Message], str | None, int], Answer]  # a conversation, its system message, the turn's number


def questions(typed: bool) -> Iterator[str]:
    """The lines of stdin, until its end.

    Raises:
      DataError: they are not UTF-8.
    """
    while True:
        try:
            line = input("\nUser: ") if typed else sys.stdin.readline()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise DataError(f"stdin is not text in {error.encoding}, at byte {error.start}: send UTF-8") from error
        if not typed and not line:
            return
        yield line.removesuffix("\n")


def talk(ask: Ask, lines: Iterable[str], out: TextIO, aside: TextIO, *, keep_going: bool) -> None:
    """Answer line after line, with the conversation so far, until `exit`.

    Args:
      aside: the stream for thoughts.
      keep_going: a conversation that is too long, or an interrupted answer, does not end the dialogue.
    """
    messages: list[Message] = []
    system: str | None = None
    for turn, line in enumerate(lines):
        command = line.strip()
        if command == "exit":
            return
        if command == "clear":
            messages = []
            log.info("forgotten.")
        elif command.split(maxsplit=1)[:1] == ["/system"]:
            system, messages = command.removeprefix("/system").strip() or None, []
            log.info("forgotten; system: %s", system or "as at the beginning")
        elif command:
            said: list[str] = []
            try:
                answer = ask([*messages, {"role": "user", "content": line}], system, turn)
                print("Assistant: " if keep_going else "", end="", file=out, flush=True)
                show(split_thoughts(_recorded(answer.text, said), answer.words, thinking=answer.thinking), out, aside)
            except DataError as error:
                if not keep_going:
                    raise
                log.info("%s: `clear` makes room", error)
                continue
            except KeyboardInterrupt:  # the answer is the text so far
                if not keep_going:
                    raise
                print(PLAIN if _in_colour(aside) else "", file=out)
            # The whole text: the template removes the thoughts again, for models trained without them.
            messages += [{"role": "user", "content": line}, {"role": "assistant", "content": "".join(said)}]


def _recorded(pieces: Iterable[str], said: list[str]) -> Iterator[str]:
    for piece in pieces:
        said.append(piece)
        yield piece


def show(pieces: Iterable[Piece], out: TextIO, aside: TextIO) -> None:
    """Write the answer to `out` and thoughts to `aside`, dimmed, with a blank line between them."""
    before, after = (DIM, PLAIN) if _in_colour(aside) else ("", "")
    thought = False
    for piece in pieces:
        if thought and not piece.thought:
            print("\n", file=aside, flush=True)
        thought = piece.thought
        text = f"{before}{piece.text}{after}" if thought else piece.text
        print(text, end="", file=aside if thought else out, flush=True)
    if thought:
        print(file=aside, flush=True)
    print(file=out, flush=True)


def _in_colour(out: TextIO) -> bool:
    return out.isatty() and "NO_COLOR" not in os.environ
