"""A template: what turns a conversation into prompt and response ids, for one tokenizer.

    get_template("llama3", tokenizer)     a format of table.py
    get_template(None, tokenizer)         the tokenizer's own chat template, where a sound loss mask can be had from it
    get_template("empty", tokenizer)      messages joined as they are

The ids are LLaMA-Factory's, except:
  - `{{idx}}` and the like in a message are text; there, they are replaced by the number of the turn;
  - a call, a list of tools or a role that cannot be rendered is the fault of one row, which is counted and left out;
    there, it stops the run;
  - templates share nothing: options of one do not change the next;
  - without a name, the whole conversation is rendered by the chat template, tools and calls as well. There, slots are
    cut from a rendering of single messages: what the chat template puts in front of a conversation (bos, a default
    system message) comes again with each turn, and twice with a system message.
The tool prompt of llama3 tells the day. It is today's, as there; `date=` sets another, so that ids can be repeated.
"""

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date as Date
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from jtune.config import DataArguments
from jtune.data.cache.fingerprint import tokenizer_key
from jtune.data.formats.align import as_messages
from jtune.data.formats.messages import THOUGHTS
from jtune.data.templates import chat_template
from jtune.data.templates.chat_format import CONTENT, EOS, ChatFormat, Pieces, Special, Token, Turn, ask, render
from jtune.data.templates.suggest import nearest
from jtune.data.templates.table import TABLE
from jtune.data.templates.tools import FORMATS
from jtune.data.tokens.ids import Ids, TokenIds, gigatoken_ids, token_ids
from jtune.data.tokens.special import SpecialTokens, guard, special_of, split_ids, with_guarded
from jtune.data.tokens.tokenizer import fix_special_tokens
from jtune.errors import ConfigError, DataError

log = logging.getLogger("jtune")
NO_SPECIAL = SpecialTokens()


@dataclass(frozen=True, eq=False)
class Template:
    """How conversations become ids with one tokenizer. Make it with `get_template`.

    Attributes:
      render: (messages, system, tools, *, discard_history) -> the pieces of each turn.
      ask: (messages, system, tools) -> the pieces of a prompt; the last message is the one to be answered.
      eos_id, efficient_eos, preserve_thinking: what encoding needs to know (see `ChatFormat`).
      end_id: the token that an answer ends with.
      stop_ids: it, and all others that end an answer.
      thought: what opens and closes the thinking of an answer.
      tool_format: how tools and calls are written; None: in the tokenizer's own way.
      form: what `render` renders; None: it is the tokenizer's own chat template.
      has_thoughts: whether thoughts have a place of their own.
      keys: what the tokenizer's own template reads of a message; None: a format of the table does, of role and content.
      special: the special tokens that the text of rows may hold by accident.
      backend: what tokenises: "huggingface", or "gigatoken" (see ids.py).
      key: changes with whatever the ids depend on, but for `day`, which only rows with tools may depend on.
    """

    name: str | None
    tokenizer: Any
    render: Callable[..., list[Turn]]
    ask: Callable[..., Pieces]
    eos_id: int
    end_id: int
    stop_ids: tuple[int, ...]
    key: str
    efficient_eos: bool = False
    preserve_thinking: bool = False
    thought: tuple[str, str] = ("<think>", "</think>")
    day: Date | None = None
    tool_format: str | None = None
    form: ChatFormat | None = None
    has_thoughts: bool = False
    keys: frozenset[str] | None = None
    special: SpecialTokens = NO_SPECIAL
    backend: str = "huggingface"

    @property
    def splits(self) -> bool:
        """Whether special tokens in the text of rows are text; those that the template writes are not."""
        return bool(getattr(self.tokenizer, "split_special_tokens", False) and self.special.tokens)

    def guard(self, text: str) -> str:
        """Text of a row, so that a template, or the end of a document, can be written around it."""
        return guard(text, self.special) if self.splits else text

    def encode(
        self, messages: Sequence[Mapping[str, Any]], system: str | None = None, tools: str | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """One `(prompt_ids, response_ids)` for each question and its answer; joined, they are the conversation.

        Args:
          messages: `{role, content}`, roles user, assistant, function, observation; or OpenAI's, with `tool_calls`,
            `reasoning_content` and role tool. Question and answer in turn, but for tool results that belong together.
          tools: JSON, a list of functions.

        Raises:
          DataError: the messages are no conversation, or tools or calls are not JSON.
        """
        turns = self.render(as_messages(messages), system, tools)
        ids = self.tokenise([pieces for turn in turns for pieces in turn]).lists()
        return list(zip(ids[::2], ids[1::2]))

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], system: str | None = None, tools: str | None = None
    ) -> list[int]:
        """What the model is given to answer the last of `messages`, as it was when the model learned to answer it.

        Args:
          messages: as for `encode`, but the last is a question.

        Raises:
          DataError: the messages are no conversation that ends with a question, or tools or calls are not JSON.
        """
        unanswered = {"role": "assistant", "content": ""}  # tool results belong to the question that it answers
        messages = as_messages([*messages, unanswered])[:-1]
        if len(messages) % 2 == 0:
            raise DataError(f"{len(messages)} messages: question and answer must alternate, and the last is a question")
        return self.tokenise([self.ask(messages, system, tools)]).lists()[0]

    def tokenise(self, sequences: Sequence[Pieces]) -> Ids:
        """The ids of each sequence of pieces: every string is tokenised on its own, no special tokens are added.

        Strings are tokenised in one call, and each only once: what stands around messages is the same in all rows.
        """
        numbers: dict[str | Special | Token, int] = {}
        index = [numbers.setdefault(piece, len(numbers)) for pieces in sequences for piece in pieces]
        texts = [piece for piece in numbers if isinstance(piece, str)]
        others = [piece for piece in numbers if not isinstance(piece, str)]
        known = Ids(*map(np.concatenate, zip(self.token_ids(texts), Ids.of([self._special(x) for x in others]))))
        place = np.empty(len(numbers), np.int64)  # in `known`, of each number
        place[[numbers[piece] for piece in (*texts, *others)]] = np.arange(len(numbers))
        index = place[np.array(index, np.int64)]
        ends = np.cumsum([0, *known.sizes[index]])
        counts = np.cumsum([0, *map(len, sequences)])
        return Ids(known.take(index), np.diff(ends[counts]))

    def _special(self, piece: Special | Token) -> list[int]:
        if isinstance(piece, Token):
            token = self.tokenizer.convert_tokens_to_ids(piece.name)
            if token is None:
                raise DataError(
                    f"the template needs {piece.name}, which the tokenizer lacks: is it the model's template?"
                )
            return [token]
        token = self.tokenizer.bos_token_id if piece is Special.BOS else self.tokenizer.eos_token_id
        return [] if token is None else [token]

    def token_ids(self, texts: Sequence[str]) -> Ids:
        """The ids of each text, no special tokens added."""
        if not self.splits:
            return (self._fast or partial(token_ids, self.tokenizer))(texts)
        whole = self._fast or partial(token_ids, self.tokenizer, split_special=False)
        return split_ids(self.tokenizer, self.special, whole, texts)

    @cached_property
    def _fast(self) -> TokenIds | None:
        return gigatoken_ids(self.tokenizer) if self.backend == "gigatoken" else None

    def __getstate__(self) -> dict[str, Any]:
        """Another process makes its own gigatoken."""
        return {name: value for name, value in self.__dict__.items() if name != "_fast"}


class TemplateOptions(NamedTuple):
    """What a template is made with, besides its name.

    Attributes:
      tool_format: how tools and calls are written, if not as the template does. As in LLaMA-Factory, calls then lose
        the text that the template puts around them, but for eos.
      default_system: system message of rows that have none; "" for none.
      enable_thinking, preserve_thinking: see `ChatFormat`; only for templates of thinking models.
      date: the day that tools are told; default: today.
      backend: see `Template`.
      for_training: False: only prompts are wanted, for which the tokenizer's own chat template need give no loss mask.
      for_chat: False: no messages are written: there need be no template.
    """

    tool_format: str | None = None
    default_system: str | None = None
    enable_thinking: bool | None = True
    preserve_thinking: bool = False
    date: Date | None = None
    backend: str = "huggingface"
    for_training: bool = True
    for_chat: bool = True


def get_template(name: str | None, tokenizer: Any, **options: Any) -> Template:
    """The template `name`, or the tokenizer's own for None. Adds to `tokenizer` the special tokens that it needs.

    >>> template = get_template("llama3", tokenizer)                                              # doctest: +SKIP
    >>> [(prompt, response)] = template.encode([{"role": "user", "content": "Hi"},
    ...                                         {"role": "assistant", "content": "Hello"}])       # doctest: +SKIP

    Args:
      options: fields of `TemplateOptions`.

    Raises:
      ConfigError: an unknown name; no name, and no chat template.
      DataError: the tokenizer's own chat template gives no sound loss mask.
    """
    return make_template(name, tokenizer, TemplateOptions(**options))


def make_template(name: str | None, tokenizer: Any, options: TemplateOptions) -> Template:
    """`get_template` with its options as a record."""
    if name is None and not chat_template.exists(tokenizer):
        if options.for_chat:
            raise ConfigError(_no_template(tokenizer))
        name = "empty"
    return _own_template(tokenizer, options) if name is None else _named_template(name, tokenizer, options)


def _own_template(tokenizer: Any, options: TemplateOptions) -> Template:
    """The tokenizer's own chat template."""
    if options.tool_format is not None:
        raise ConfigError("tool_format needs a template by name; the tokenizer's own writes tools in its own way")
    fix_special_tokens(tokenizer)
    how = _thinking(options)
    system = options.default_system or ""
    own = partial(chat_template.render, tokenizer, default_system=system, options=how)
    if options.for_training:
        chat_template.check(tokenizer, own)
    own_ask = partial(chat_template.ask, tokenizer, default_system=system, options=how)
    key = f"{tokenizer.chat_template!r} {options.default_system!r} {how} {options.backend}"
    keys = chat_template.keys_read(tokenizer)
    bound = _bind(None, tokenizer, own, own_ask, (), key)
    return _guarded(replace(bound, backend=options.backend, keys=keys, has_thoughts=not keys.isdisjoint(THOUGHTS)))


def _thinking(options: TemplateOptions) -> dict[str, bool]:
    """What the tokenizer's own chat template is told of thinking."""
    return {} if options.enable_thinking is None else {"enable_thinking": options.enable_thinking}


def _named_template(name: str, tokenizer: Any, options: TemplateOptions) -> Template:
    """A template of LLaMA-Factory's."""
    tool_format, default_system = options.tool_format, options.default_system
    form = chat_format(name)
    if tool_format is not None:
        if tool_format not in FORMATS:
            raise ConfigError(f"tool_format {tool_format!r} is unknown: {_near(tool_format, FORMATS)}")
        form = replace(form, tool_format=tool_format, function=(CONTENT,) if form.efficient_eos else (CONTENT, EOS))
    if default_system is not None:
        form = replace(form, default_system=default_system)
    if form.thinking:
        form = replace(form, enable_thinking=options.enable_thinking, preserve_thinking=options.preserve_thinking)
    own = chat_template.first_turn(tokenizer, _thinking(options))
    fix_special_tokens(tokenizer, form.stop_words, replace_eos=form.replace_eos)
    if own is not None and (difference := chat_template.difference(tokenizer, own, form)):
        log.info("template %s is not the model's own chat template: it writes %s", name, difference)
    day = options.date or Date.today()  # one day for the whole run, also over midnight
    today = replace(form, day=day)
    template = _bind(
        name, tokenizer, partial(render, today), partial(ask, today), form.stop_words, f"{form} {options.backend}"
    )
    bound = replace(
        template,
        backend=options.backend,
        efficient_eos=form.efficient_eos,
        preserve_thinking=form.preserve_thinking,
        thought=form.thought,
        has_thoughts=form.thinking,
        day=day,
        tool_format=form.tool_format,
        form=form,
    )
    return _guarded(bound, form.tool_call)


def _guarded(template: Template, words: Sequence[str] = ()) -> Template:
    """`template`, with what it needs to tell special tokens in the text of rows from its own."""
    template = replace(template, special=special_of(template.tokenizer, (*template.thought, *words)))
    if not template.splits:
        return template
    writes = {name: partial(with_guarded, getattr(template, name), template.special) for name in ("render", "ask")}
    return replace(template, **writes)


def _no_template(tokenizer: Any) -> str:
    name, to = nearest(tokenizer)
    advice = f"`template: {name}` is the nearest for {to}" if name else "Set it to the model's"
    return (
        "`template` is not set, and the tokenizer has no chat template: nothing says how messages are written and "
        f"where an answer ends. {advice}; `template: empty` joins them as they are"
    )


def template_of(
    data_args: DataArguments, tokenizer: Any, *, for_training: bool = True, for_chat: bool = True
) -> Template:
    """`get_template` of the arguments of a run.

    Args:
      for_training, for_chat: see `get_template`.
    """
    options = TemplateOptions(
        tool_format=data_args.tool_format,
        default_system=data_args.default_system,
        enable_thinking=data_args.enable_thinking,
        preserve_thinking=data_args.preserve_thinking,
        backend=data_args.tokenizer_backend,
        for_training=for_training,
        for_chat=for_chat,
    )
    return make_template(data_args.template, tokenizer, options)


def chat_format(name: str) -> ChatFormat:
    """The format `name` of the table.

    Raises:
      ConfigError: there is none, with the nearest names.
    """
    if name in TABLE:
        return TABLE[name]
    raise ConfigError(f"template {name!r} is unknown: {_near(name, TABLE)}")


def _bind(
    name: str | None, tokenizer: Any, render: Callable, ask: Callable, stop_words: Sequence[str], key: str
) -> Template:
    end = chat_template.answer_end(tokenizer, render)
    end = tokenizer.eos_token_id if end is None else end
    stops = {end, tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(word) for word in stop_words)}
    return Template(
        name=name,
        tokenizer=tokenizer,
        render=render,
        ask=ask,
        eos_id=tokenizer.eos_token_id,
        end_id=end,
        stop_ids=tuple(sorted(stops)),
        key=f"{key} {tokenizer_key(tokenizer)}",
    )


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
