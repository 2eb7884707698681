"""`jtune chat CASE.yaml`: talk with a model at the terminal, or have it answer what comes through a pipe."""

import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, TextIO

from jtune.config import Config
from jtune.data import check_id
from jtune.errors import ConfigError, DataError
from jtune.generation import stream
from jtune.generation.settings import describe_sampling, most_tokens, read_generation_config, sampling_of
from jtune.generation.text import Piece, split_thoughts, stream_text
from jtune.loading.inference import load

log = logging.getLogger("jtune")

HELP = "`clear` forgets what was said, `/system TEXT` gives the model a part to play, `exit` ends."
DIM, PLAIN = "\033[2m", "\033[0m"

Message = dict[str, str]


class Answer(NamedTuple):
    """What comes, as it comes."""

    text: Iterator[str]
    thinking: bool  # the prompt has opened a thought already
    words: tuple[str, str]  # that open and close one


Ask = Callable[[Sequence[Message], str | None, int], Answer]  # of a conversation, its system message, its turn


def chat(config: Config) -> None:
    """Read questions from stdin, a line each, and write each answer to stdout as it comes.

    Through a pipe nothing but answers goes to stdout: thoughts, notes and what is being done go to stderr.

    Raises:
      JtuneError: what is wrong with the arguments or the files; through a pipe, a conversation that is too long.
    """
    if sys.stdin is None:
        raise ConfigError("stdin is closed: questions come from the terminal or through a pipe")
    typed = sys.stdin.isatty()
    if not typed:
        for handler in log.handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
    for note in config.notes:
        log.info("note: %s", note)
    ask = make_ask(config)
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401  (what gives input() its arrow keys)
        print(f"Ask something. {HELP}")
    talk(ask, questions(typed), sys.stdout, sys.stdout if typed else sys.stderr, keep_going=typed)


def make_ask(config: Config) -> Ask:
    """The model of `config` as a function from a conversation to its answer."""
    loaded = load(config, for_chat=True)
    args, positions = config.generating, loaded.model.config.learned_positions
    template = loaded.template
    assert template is not None
    sampling = sampling_of(args, read_generation_config(loaded.folder), template.stop_ids)
    log.info("answers: %s", describe_sampling(sampling))
    # Each start draws other answers, unless a seed is given.
    seed = config.training.seed if "seed" in config.origins else secrets.randbits(31)

    def ask(messages: Sequence[Message], system: str | None, turn: int) -> Answer:
        prompt = template.prompt(messages, system)
        check_id(max(prompt), loaded.model.config.vocab_size)
        most = most_tokens(args, sampling, len(prompt), positions)
        if most < 1:
            raise DataError(f"the conversation is {len(prompt)} tokens long, which leaves no room for an answer")
        chosen = replace(sampling, max_new_tokens=most)
        tokens = stream(loaded.model, loaded.params, prompt, chosen, seed=(seed + turn) % 2**32)
        opened = loaded.tokenizer.decode(prompt).rstrip().endswith(template.thought[0].strip())
        text = stream_text(loaded.tokenizer, tokens, skip_special_tokens=args.skip_special_tokens)
        return Answer(text, opened, template.thought)

    return ask


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
    """Answer line after line, what was said before in mind, until `exit`.

    Args:
      aside: where thoughts go.
      keep_going: a conversation that is too long, or an answer that is interrupted, does not end it.
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
                show(split_thoughts(_noted(answer.text, said), answer.words, thinking=answer.thinking), out, aside)
            except DataError as error:
                if not keep_going:
                    raise
                log.info("%s: `clear` makes room", error)
                continue
            except KeyboardInterrupt:  # what has been said so far is the answer
                if not keep_going:
                    raise
                print(PLAIN if _in_colour(aside) else "", file=out)
            # As it came: the template takes the thoughts out again, where the model learned to do without them.
            messages += [{"role": "user", "content": line}, {"role": "assistant", "content": "".join(said)}]


def _noted(pieces: Iterable[str], said: list[str]) -> Iterator[str]:
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
