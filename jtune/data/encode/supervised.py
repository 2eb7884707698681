"""Conversations as ids and labels: the answers are learned."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from jtune.data.encode.encoded import IGNORED
from jtune.data.encode.turns import (
    IDS,
    NOTED,
    NOTHING_TO_LEARN,
    NOTHING_WANTED,
    ORIGIN,
    Aligned,
    Rules,
    arrow_list,
    arrow_table,
    infer_seqlen,
    is_trained_on,
    label_turns,
    put_row,
    render_row,
    sequences,
    tokenised,
    too_long,
)
from jtune.data.templates.template import Template
from jtune.data.tokens.ids import Ids

log = logging.getLogger("jtune")
CONVERSATIONS = datasets.Features({"input_ids": IDS, "labels": IDS, **ORIGIN, **NOTED})


def encode_conversations(batch: Aligned, *, template: Template, rules: Rules) -> pa.Table:
    discard = rules.mask_history and not template.preserve_thinking
    label = partial(
        label_turns,
        cutoff_len=rules.cutoff_len,
        eos_id=template.eos_id,
        efficient_eos=template.efficient_eos,
        mask_history=rules.mask_history,
        train_on_prompt=rules.train_on_prompt,
    )
    rendered = render_row(batch, template, discard_history=discard)
    ids = template.tokenise(sequences(rendered))
    turns = np.array([0 if isinstance(row, str) else len(row) for row in rendered])
    chats = (chat for chat, row in zip(batch["messages"], rendered) if not isinstance(row, str))
    wanted = np.array([message.get("learned") is not False for chat in chats for message in chat], bool)
    labels = labels_of(ids, turns, template, rules, wanted)
    bounds = np.concatenate([[0], np.cumsum(ids.sizes)])  # of sequences in `ids.values`
    stops = 2 * np.cumsum(turns)  # of rows, in sequences
    ends, values = bounds[stops], ids.values  # of rows, in tokens
    if template.efficient_eos:
        last = np.where(np.concatenate([[True], wanted])[stops], template.eos_id, IGNORED)  # [0]: of rows left out
        values, labels = np.insert(values, ends, template.eos_id), np.insert(labels, ends, last)
        ends = ends + np.arange(1, len(ends) + 1)
    sizes = np.diff(ends, prepend=0)
    # With as many tokens as cutoff_len, the rounding of proportions may cut one.
    whole = (turns > 0) & (sizes < rules.cutoff_len) & rows_learn(labels, ends)

    # Rows that are as they should be, most of them, are taken in runs, without a look at each; the others one by one.
    runs: list[_Run] = []
    begin = 0
    for i in [*np.flatnonzero(~whole).tolist(), len(rendered)]:
        if i > begin:
            run = slice(ends[begin] - sizes[begin], ends[i - 1])
            runs.append(_Run([*range(begin, i)], values[run], labels[run], sizes[begin:i]))
        begin = i + 1
        if i == len(rendered):
            break
        if isinstance(rendered[i], str):
            runs.append(_Run([i], fault=rendered[i]))
            continue
        own = range(stops[i] - 2 * turns[i], stops[i])
        lists = [ids.values[bounds[k] : bounds[k + 1]].tolist() for k in own]
        may = wanted[own].tolist()
        parts = [label(list(zip(lists[::2], lists[1::2])), wanted=may)]
        nothing = NOTHING_TO_LEARN if any(may[-1:] if rules.mask_history else may[1::2]) else NOTHING_WANTED
        if parts[0][2] and rules.overlong == "drop":
            runs.append(_Run([i], fault=too_long(rules.cutoff_len)))
            continue
        if parts[0][2] and rules.overlong == "split":
            parts = [label(part, wanted=may) for part, may in _split(batch, i, template, rules, discard)]
        kept = [part for part in parts if is_trained_on(part[1])]
        lost = any(cut for _, learned, cut in parts if not is_trained_on(learned))
        for k, (tokens, learned, cut) in enumerate(kept):
            runs.append(_Run([i], tokens, learned, [len(tokens)], cut=cut or (lost and k == 0)))
        if not kept:  # a row is left out once, however many pieces it came in
            runs.append(_Run([i], fault=nothing, cut=lost))
    rows = [row for run in runs for row in run.rows]
    joined = {"input_ids": Ids.join([run.ids for run in runs]), "labels": Ids.join([run.labels for run in runs])}
    sizes = np.array([size for run in runs for size in run.sizes], np.int64)
    columns: dict[str, Any] = {name: ids._replace(sizes=sizes) for name, ids in joined.items()}
    columns |= {name: [getattr(run, name) for run in runs for _ in run.rows] for name in ("fault", "cut")}
    columns |= {name: np.asarray(batch[name])[rows] for name in ("dataset", "row")}
    return arrow_list(columns, CONVERSATIONS)


class _Run(NamedTuple):
    """Rows in a line, their ids and labels joined."""

    rows: list[int]  # of the batch
    ids: np.ndarray | Sequence[int] = ()
    labels: np.ndarray | Sequence[int] = ()
    sizes: np.ndarray | Sequence[int] = (0,)
    fault: str = ""
    cut: bool = False


def rows_learn(labels: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """`_learns` of each of the rows that end in `labels` at `ends`, bool `[rows]`."""
    learned = labels != IGNORED
    before = np.concatenate([[0], np.cumsum(learned)])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    return before[ends] > before[np.minimum(starts + 1, ends)]


def labels_of(ids: Ids, turns: np.ndarray, template: Template, rules: Rules, wanted: np.ndarray) -> np.ndarray:
    """The labels of rows that are not cut, as `label_turns` gives them, for all at once: int32 `[tokens]`.

    Args:
      ids: of prompt, answer, prompt, answer ...
      turns: how many of these pairs each row has, int `[rows]`.
      wanted: whether each may be learned, bool `[lists]`.
    """
    learned = np.zeros(len(ids.sizes), bool)
    learned[2 * np.cumsum(turns)[turns > 0] - 1 if rules.mask_history else slice(1, None, 2)] = True
    if rules.train_on_prompt:
        learned[::2] = True
    learned &= wanted
    labels = np.where(np.repeat(learned, ids.sizes), ids.values, np.int32(IGNORED))
    if template.efficient_eos and not rules.train_on_prompt and not rules.mask_history:
        later = np.arange(len(ids.sizes)) % 2 == 0  # prompts behind an answer: what ends it is learned where they begin
        later[2 * (np.cumsum(turns) - turns)[turns > 0]] = False
        later[1:] &= wanted[:-1]
        labels[ids.starts[later & (ids.sizes > 0)]] = template.eos_id
    return labels


def _split(batch: Aligned, i: int, template: Template, rules: Rules, discard: bool) -> list[Any]:
    """The turns of row i in pieces of at most `cutoff_len` tokens, each rendered as a conversation of its own.

    A piece begins with a question of the user; one question and what answers it may still be too long.
    """
    messages, parts = batch["messages"][i], []
    while messages:
        turns = template.render(messages, batch["system"][i], batch["tools"][i], discard_history=discard)
        [ids] = tokenised([turns], template)
        ends = [k for k in range(1, len(ids)) if messages[2 * k]["role"] == "user"] + [len(ids)]
        sizes = np.cumsum([len(prompt) + len(answer) for prompt, answer in ids]) + template.efficient_eos
        end = max((k for k in ends if sizes[k - 1] <= rules.cutoff_len), default=ends[0])
        parts.append((ids[:end], [message.get("learned") is not False for message in messages[: 2 * end]]))
        messages = messages[2 * end :]
    return parts


def one_turn(turns: Sequence[tuple[list[int], list[int]]], template: Template) -> tuple[list[int], list[int]]:
    """The last answer, and all before it as its prompt."""
    prompt = [token for asked, answer in turns[:-1] for token in (*asked, *answer)] + list(turns[-1][0])
    return prompt, [*turns[-1][1], template.eos_id] if template.efficient_eos else list(turns[-1][1])


def last_only(template: Template) -> dict[str, Any]:
    return {"last_only": True, "discard_history": not template.preserve_thinking}


def encode_last_answers(batch: Aligned, *, template: Template, rules: Rules) -> pa.Table:
    """The last answer, and all before it as the prompt that asks for it."""
    out = arrow_table(CONVERSATIONS)
    for i, turns in enumerate(tokenised(render_row(batch, template, **last_only(template)), template)):
        if isinstance(turns, str):
            put_row(out, batch, i, turns, False)
            continue
        prompt, answer = one_turn(turns, template)
        source, target = infer_seqlen(len(prompt), len(answer), rules.cutoff_len)
        cut = source < len(prompt) or target < len(answer)
        if cut and rules.overlong == "drop":
            put_row(out, batch, i, too_long(rules.cutoff_len), False)
        elif not source or not target:
            put_row(out, batch, i, NOTHING_TO_LEARN, cut)
        else:
            answer = answer[:target]
            ids, labels = prompt[:source] + answer, [IGNORED] * source + answer
            put_row(out, batch, i, "", cut, input_ids=ids, labels=labels)
    return arrow_list(out, CONVERSATIONS)
