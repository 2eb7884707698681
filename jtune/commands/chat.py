"""`jtune chat CASE.yaml`: talk with a model at the terminal, or have it answer questions that come through a pipe."""

import logging
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from jtune.commands.dialogue import Answer, Ask, Message, questions, talk
from jtune.config import Config
from jtune.data import check_id
from jtune.errors import ConfigError, DataError
from jtune.generation import stream
from jtune.generation.settings import describe_sampling, most_tokens, read_generation_config, sampling_of
from jtune.generation.text import stream_text
from jtune.loading.inference import load

log = logging.getLogger("jtune")

HELP = "`clear` forgets what was said, `/system TEXT` gives the model a part to play, `exit` ends."


def chat(config: Config) -> None:
    """Read questions from stdin, one a line, and write each answer to stdout as it comes.

    Through a pipe only answers go to stdout, and thoughts to stderr.

    Raises:
      JtuneError: an argument or a file is wrong; through a pipe, also a conversation that is too long.
    """
    if sys.stdin is None:
        raise ConfigError("stdin is closed: questions come from the terminal or through a pipe")
    typed = sys.stdin.isatty()
    for note in config.notes:
        log.info("note: %s", note)
    ask = make_ask(config)
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() its arrow keys)
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
        limited = replace(sampling, max_new_tokens=most)
        tokens = stream(loaded.model, loaded.params, prompt, limited, seed=(seed + turn) % 2**32)
        opened = loaded.tokenizer.decode(prompt).rstrip().endswith(template.thought[0].strip())
        text = stream_text(loaded.tokenizer, tokens, skip_special_tokens=args.skip_special_tokens)
        return Answer(text, opened, template.thought)

    return ask
