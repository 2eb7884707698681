"""Conversations as ids and labels: the answers are learned."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from jtune.data.encode.arrow import IDS, NOTED, ORIGIN, Aligned, Rows, arrow_table
from jtune.data.encode.encoded import IGNORED
from jtune.data.encode.turns import (
    NOTHING_TO_LEARN,
    NOTHING_WANTED,
    Rules,
    cut_turns,
    infer_seqlen,
    one_turn,
    render_rows,
    rendering,
    sequences,
    tokenised,
    too_long,
)
from jtune.data.templates.template import Template
from jtune.data.tokens.ids import Ids

CONVERSATIONS = datasets.Features({"input_ids": IDS, "labels": IDS, **ORIGIN, **NOTED})


class Chats(NamedTuple):
    """Conversations as ids, all in one array. A row of the batch is one chat, or with `overlong: split` several."""

    rows: np.ndarray  # int64 [chats]: of the batch
    turns: np.ndarray  # int64 [chats]: the number of its turns
    ids: Ids  # prompt, answer, prompt, answer ... of all chats
    wanted: np.ndarray  # bool [prompts and answers]: whether it may be learned
    faults: np.ndarray  # object [chats]: why the row is left out; "" if it is not
    cut: np.ndarray  # bool [chats]: whether tokens are missing

    @property
    def bounds(self) -> np.ndarray:
        """Where the prompts and answers of each chat begin, and the end, int64 `[chats + 1]`."""
        return 2 * np.concatenate([[0], np.cumsum(self.turns)])


def encode_conversations(batch: Aligned, *, template: Template, rules: Rules) -> pa.Table:
    """All answers learned, or with `mask_history` the last ones; what does not fit is cut, dropped or split."""
    how = rendering(template, "conversation", rules.mask_history)
    rendered = render_rows(batch, template, how)
    chats = _fitted(_chats(range(len(rendered)), rendered, batch["messages"], template), batch, template, rules)
    values, labels, sizes = _labelled(chats, template, rules)
    learns = _learns(labels, sizes)
    kept, faults, cut = _without_silent(chats, learns, batch, rules)
    tokens, rows = np.repeat(learns, sizes), chats.rows[kept]
    sizes = np.where(learns, sizes, 0)[kept]
    columns: dict[str, Any] = {name: np.asarray(batch[name])[rows] for name in ("dataset", "row")}
    columns |= {"input_ids": Ids(values[tokens], sizes), "labels": Ids(labels[tokens], sizes)}
    return arrow_table(columns | {"fault": faults[kept], "cut": cut[kept]}, CONVERSATIONS)


def _chats(rows: Iterable[int], rendered: Sequence[Any], messages: Sequence[Any], template: Template) -> Chats:
    """Rendered conversations, or their faults, as chats; `messages` are theirs."""
    faults = np.array([turns if isinstance(turns, str) else "" for turns in rendered], object)
    return Chats(
        rows=np.fromiter(rows, np.int64),
        turns=np.array([0 if fault else len(turns) for turns, fault in zip(rendered, faults)], np.int64),
        ids=template.tokenise(sequences(rendered)),
        wanted=np.array([may for chat, fault in zip(messages, faults) if not fault for may in _wanted(chat)], bool),
        faults=faults,
        cut=np.zeros(len(faults), bool),
    )


def _wanted(messages: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each message of a conversation may be learned."""
    return [message.get("learned") is not False for message in messages]


# ---------------------------------------------------------------------- length


def _fitted(chats: Chats, batch: Aligned, template: Template, rules: Rules) -> Chats:
    """The chats with none longer than `cutoff_len`: what `overlong` asks for is done to those that are."""
    bounds, budget = chats.bounds, rules.cutoff_len - template.efficient_eos
    tokens = np.diff(np.concatenate([[0], np.cumsum(chats.ids.sizes)])[bounds])
    # With as many tokens as there is room, the rounding of proportions may cut one.
    large = np.flatnonzero((chats.turns > 0) & (tokens >= budget)).tolist()
    if not large:
        return chats
    turns, faults, cut = chats.turns.copy(), chats.faults.copy(), chats.cut.copy()
    lengths, stays = chats.ids.sizes.copy(), np.ones(len(chats.ids.sizes), bool)
    split: list[int] = []
    for i in large:
        first, stop = bounds[i : i + 2].tolist()
        flat = chats.ids.sizes[first:stop].tolist()
        sizes = list(zip(flat[::2], flat[1::2]))
        kept = cut_turns(sizes, budget, last_first=rules.mask_history)
        if kept == sizes:
            continue
        if rules.overlong == "truncate":
            cut[i] = True
        elif rules.overlong == "drop":
            kept, faults[i] = [], too_long(rules.cutoff_len)
        else:
            kept, _ = [], split.append(i)
        turns[i], stays[first:stop] = len(kept), False
        own = slice(stop - 2 * len(kept), stop) if rules.mask_history else slice(first, first + 2 * len(kept))
        stays[own], lengths[own] = True, list(chain.from_iterable(kept))
    place = np.arange(len(chats.ids.values)) - np.repeat(chats.ids.starts, chats.ids.sizes)
    values = chats.ids.values[place < np.repeat(np.where(stays, lengths, 0), chats.ids.sizes)]
    fitted = Chats(chats.rows, turns, Ids(values, lengths[stays]), chats.wanted[stays], faults, cut)
    if not split:
        return fitted
    pieces = _pieces(chats.rows[split].tolist(), batch, template, rules)
    return _replaced(fitted, split, _fitted(pieces, batch, template, replace(rules, overlong="truncate")))


def _pieces(rows: Sequence[int], batch: Aligned, template: Template, rules: Rules) -> Chats:
    """These rows in pieces of at most `cutoff_len` tokens, each rendered as a conversation of its own.

    A piece begins with a question of the user; one question and its answers may still be too long.
    """
    how = rendering(template, "conversation", rules.mask_history)
    own, rendered, said = [], [], []
    for i in rows:
        messages = batch["messages"][i]
        while messages:
            turns = template.render(messages, batch["system"][i], batch["tools"][i], **how)
            sizes = np.cumsum(template.tokenise(sequences([turns])).sizes)[1::2] + template.efficient_eos
            ends = [k for k in range(1, len(turns)) if messages[2 * k]["role"] == "user"] + [len(turns)]
            end = max((k for k in ends if sizes[k - 1] <= rules.cutoff_len), default=ends[0])
            own.append(i)
            rendered.append(turns[:end])
            said.append(messages[: 2 * end])
            messages = messages[2 * end :]
    return _chats(own, rendered, said, template)


def _replaced(chats: Chats, split: Sequence[int], pieces: Chats) -> Chats:
    """The chats, but for `split` (which have no turns) the pieces of their rows, in the order of rows."""
    others = np.delete(np.arange(len(chats.rows)), split)
    index = np.concatenate([others, len(chats.rows) + np.arange(len(pieces.rows))])
    rows, turns, faults, cut = (
        np.concatenate([getattr(chats, name), getattr(pieces, name)]) for name in ("rows", "turns", "faults", "cut")
    )
    index = index[np.argsort(rows[index], kind="stable")]
    firsts = 2 * (np.cumsum(turns) - turns)
    lists = np.array(
        [k for begin, n in zip(firsts[index].tolist(), turns[index].tolist()) for k in range(begin, begin + 2 * n)], int
    )
    ids = Ids(*map(np.concatenate, zip(chats.ids, pieces.ids)))
    wanted = np.concatenate([chats.wanted, pieces.wanted])[lists]
    return Chats(rows[index], turns[index], Ids(ids.take(lists), ids.sizes[lists]), wanted, faults[index], cut[index])


# ---------------------------------------------------------------------- labels


def _labelled(chats: Chats, template: Template, rules: Rules) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids and labels of all chats, int32 `[tokens]`, and the tokens of each chat, int64 `[chats]`.

    The answers that are wanted are learned; with `mask_history` the last one of each chat; with `train_on_prompt` the
    prompts, too. With a template of `efficient_eos` the eos after an answer is learned in the place of the first token
    of the next prompt, and after the last answer it is added.
    """
    (values, sizes), firsts, stops = chats.ids, chats.bounds[:-1], chats.bounds[1:]
    learned = np.zeros(len(sizes), bool)
    learned[stops[chats.turns > 0] - 1 if rules.mask_history else slice(1, None, 2)] = True
    if rules.train_on_prompt:
        learned[::2] = True
    learned &= chats.wanted
    labels = np.where(np.repeat(learned, sizes), values, np.int32(IGNORED))
    begins = np.concatenate([[0], np.cumsum(sizes)])
    if template.efficient_eos and not rules.train_on_prompt and not rules.mask_history:
        later = np.arange(len(sizes)) % 2 == 0  # prompts that follow an answer of the same chat
        later[firsts[chats.turns > 0]] = False
        later[1:] &= chats.wanted[:-1]
        labels[begins[:-1][later & (sizes > 0)]] = template.eos_id
    ends = begins[stops]
    if template.efficient_eos:
        last = np.where(np.concatenate([[True], chats.wanted])[stops], template.eos_id, IGNORED)
        values, labels = np.insert(values, ends, template.eos_id), np.insert(labels, ends, last)
        ends = ends + np.arange(1, len(ends) + 1)
    return values, labels, np.diff(ends, prepend=0)


def _learns(labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whether a token of each chat has a label, bool `[chats]`. The first does not count: nothing predicts it."""
    before = np.concatenate([[0], np.cumsum(labels != IGNORED)])
    ends = np.cumsum(sizes)
    return before[ends] > before[np.minimum(ends - sizes + 1, ends)]


def _without_silent(
    chats: Chats, learns: np.ndarray, batch: Aligned, rules: Rules
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which chats are kept, their faults, and whether they are cut: chats without a label are left out.

    A row is left out once, however many pieces it came in; a row that loses a piece counts as cut if the piece was.
    """
    kept, faults, cut = np.ones(len(learns), bool), chats.faults.copy(), chats.cut.copy()
    silent = ~learns & (faults == "")
    for row in np.unique(chats.rows[silent]).tolist():
        pieces = np.flatnonzero(chats.rows == row)
        lost = bool(chats.cut[pieces[silent[pieces]]].any())
        kept[pieces[silent[pieces]]] = False
        if learns[pieces].any():
            cut[pieces[learns[pieces]][0]] |= lost
            continue
        answers = _wanted(batch["messages"][row])[1::2]
        first = pieces[0]
        kept[first], cut[first] = True, lost
        faults[first] = NOTHING_TO_LEARN if any(answers[-1:] if rules.mask_history else answers) else NOTHING_WANTED
    return kept, faults, cut


# ---------------------------------------------------------------------- rows to be answered


def encode_last_answers(batch: Aligned, *, template: Template, rules: Rules) -> pa.Table:
    """The last answer, and all before it as the prompt that asks for it.

    An answer without a word is none: the row is its prompt alone, and nothing in it has a label.
    """
    out = Rows(batch, CONVERSATIONS)
    rendered = render_rows(batch, template, rendering(template, "prompt"))
    for i, turns in enumerate(tokenised(rendered, template)):
        if isinstance(turns, str):
            out.add(i, fault=turns)
            continue
        prompt, answer = one_turn(turns, template)
        if not (batch["messages"][i][-1]["content"] or batch["messages"][i][-1].get("original")):
            answer = []
        source, target = infer_seqlen(len(prompt), len(answer), rules.cutoff_len)
        cut = source < len(prompt) or target < len(answer)
        if cut and rules.overlong == "drop":
            out.add(i, fault=too_long(rules.cutoff_len))
        elif not source or (answer and not target):
            out.add(i, fault=NOTHING_TO_LEARN, cut=cut)
        else:
            ids, labels = learned_after(prompt[:source], answer[:target])
            out.add(i, {"input_ids": ids, "labels": labels}, cut=cut)
    return out.table()


def learned_after(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    """Ids and labels of an answer after its prompt; the answer is learned.

    >>> learned_after([5, 6], [7])
    ([5, 6, 7], [-100, -100, 7])
    """
    return prompt + answer, [IGNORED] * len(prompt) + answer
