"""Conversations and documents as token ids and labels, kept in Arrow tables on disk.

The rules are LLaMA-Factory's, except:
  - with mask_history and a template of efficient_eos, the eos that ends an earlier answer is not learned; there it is;
  - in stage pt every eos is learned; there none is where the tokenizer has no pad token of its own;
  - rows without anything to learn are left out; there they take part in a batch with nothing;
  - stage pt with neat_packing: a row for each document, long ones in pieces of cutoff_len. There it is refused.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jtune.config.stages import StageRules
from jtune.data.cache.fingerprint import fingerprint
from jtune.data.cache.shards import ALONE, Team, in_parts
from jtune.data.encode.encoded import IGNORED
from jtune.data.encode.notes import column_of
from jtune.data.formats.messages import FaultyRow
from jtune.data.templates.chat_format import Pieces
from jtune.data.templates.template import Template
from jtune.data.templates.tools import WHOLE
from jtune.data.tokens.ids import Ids
from jtune.errors import DataError

log = logging.getLogger("jtune")

NOTHING_TO_LEARN = "nothing to learn (no token of an answer is left)"
NOTHING_WANTED = "nothing to learn (no answer is to be learned: weight, train, loss)"
IDS = datasets.List(datasets.Value("int32"))
NOTED = {"noted": datasets.Value("string")}  # see notes.py
ORIGIN = {
    "cut": datasets.Value("bool"),
    "fault": datasets.Value("string"),
    "dataset": datasets.Value("int32"),
    "row": datasets.Value("int64"),
}
CONVERSATIONS = datasets.Features({"input_ids": IDS, "labels": IDS, **ORIGIN, **NOTED})
PAIRS = datasets.Features(
    {
        "chosen_input_ids": IDS,
        "chosen_labels": IDS,
        "rejected_input_ids": IDS,
        "rejected_labels": IDS,
        **ORIGIN,
        **NOTED,
    }
)
FEEDBACK = datasets.Features(
    {
        "input_ids": IDS,
        "labels": IDS,
        "kl_input_ids": IDS,
        "kl_labels": IDS,
        "kto_tags": datasets.Value("bool"),
        **ORIGIN,
        **NOTED,
    }
)
DOCUMENTS = datasets.Features({"input_ids": IDS, "cut": datasets.Value("bool"), **NOTED})


# ---------------------------------------------------------------------- stage sft


def infer_seqlen(source: int, target: int, budget: int) -> tuple[int, int]:
    """How many tokens of a prompt and of its answer are kept so that both fit into `budget`.

    The longer is cut if the other takes less than half; else both, in proportion.

    >>> infer_seqlen(30, 5, 20), infer_seqlen(5, 30, 20), infer_seqlen(30, 30, 20)
    ((15, 5), (5, 15), (10, 10))
    """
    if 2 * target < budget:
        most = budget
    elif 2 * source < budget:
        most = budget - source
    else:
        most = int(budget * (target / (source + target)))  # as a float product: the rounding is part of the rule
    target = min(most, target)
    return min(max(budget - target, 0), source), target


def label_turns(
    turns: Sequence[tuple[list[int], list[int]]],
    *,
    cutoff_len: int,
    eos_id: int,
    efficient_eos: bool = False,
    mask_history: bool = False,
    train_on_prompt: bool = False,
    wanted: Sequence[bool] | None = None,
) -> tuple[list[int], list[int], bool]:
    """Join the turns of a conversation, at most `cutoff_len` tokens, and mark what is learned.

    Turns that do not fit are left out: the last ones, or with `mask_history` the first.

    Args:
      wanted: of each message, question, answer, question ...: whether it may be learned; None: all may.

    Returns:
      ids, labels (-100 where nothing is learned), and whether anything was cut.
    """
    parts: list[tuple[list[int], list[int]]] = []
    used = 1 if efficient_eos else 0
    cut = False
    may = np.reshape([True] * 2 * len(turns) if wanted is None else list(wanted), (-1, 2)).tolist()
    ends_wanted = True  # whether the last answer is
    for k in range(len(turns)):
        turn = len(turns) - 1 - k if mask_history else k
        source, target = turns[turn]
        if used >= cutoff_len:
            cut = True
            break
        kept_source, kept_target = infer_seqlen(len(source), len(target), cutoff_len - used)
        cut |= kept_source < len(source) or kept_target < len(target)
        source, target = source[:kept_source], target[:kept_target]
        used += kept_source + kept_target
        asked, answered = may[turn]
        learned = target if answered and (not mask_history or k == 0) else [IGNORED] * len(target)
        given = source if train_on_prompt and asked else [IGNORED] * len(source)
        if efficient_eos and k > 0 and not train_on_prompt and not mask_history and source and ends_wanted:
            given = [eos_id, *given[1:]]  # what ends the answer before is learned where this turn begins
        ends_wanted = answered if k == 0 or not mask_history else ends_wanted
        parts.append((source + target, given + learned))
    if mask_history:
        parts.reverse()
    ids = list(chain.from_iterable(ids for ids, _ in parts))
    labels = list(chain.from_iterable(labels for _, labels in parts))
    if not efficient_eos:
        return ids, labels, cut
    return [*ids, eos_id], [*labels, eos_id if ends_wanted else IGNORED], cut


@dataclass(frozen=True)
class Rules:
    """How rows become ids.

    Attributes:
      overlong: what becomes of a row of more than `cutoff_len` tokens. "truncate": it is cut, as in LLaMA-Factory;
        "drop": it is left out; "split": a conversation becomes several, each beginning with a question.
    """

    cutoff_len: int
    mask_history: bool = False
    train_on_prompt: bool = False
    overlong: str = "truncate"


def encode_rows(
    table: datasets.Dataset,
    template: Template,
    stage: StageRules,
    rules: Rules,
    *,
    batch_size: int = 1000,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
    team: Team = ALONE,
    folder: Path | None = None,
) -> datasets.Dataset:
    """Ids and labels of aligned rows: a row for each, empty where `fault` says why it is left out.

    Args:
      stage: by its rows, the columns: of conversations, `CONVERSATIONS`; of prompts the same, but only the last answer
        is labelled, and all of it; of pairs, `PAIRS`; of feedback, `FEEDBACK`.
      team, folder: who shares the work, and where the files lie (see `in_parts`).

    Raises:
      DataError: `train_on_prompt` with a template that cannot.
    """
    if rules.train_on_prompt and template.efficient_eos:
        raise DataError(f"template {template.name!r} learns eos where a prompt begins: train_on_prompt is not for it")
    # Of the whole file, also where `table` is some of its rows: the column is not copied.
    tools = pc.call_function("not_equal", [table.data.column("tools"), pa.scalar("")])
    has_tools = bool(pc.call_function("any", [tools]).as_py())
    told_the_day = template.day if has_tools else None
    if has_tools and template.tool_format in WHOLE:
        log.warning(
            "template %s: calls are written as LLaMA-Factory writes them, which is not how the model is told to write "
            "them: a part is missing. `tool_format: %s` writes them whole",
            template.name,
            WHOLE[template.tool_format],
        )
    encode, features, *more = {
        "conversation": (_encode_conversations, CONVERSATIONS),
        "prompt": (_encode_last_answers, CONVERSATIONS),
        "feedback": (_encode_feedback, FEEDBACK, "desirable"),
        "pair": (_encode_pairs, PAIRS, "rejected"),
    }[stage.rows]
    read = _columns(table, "messages", "system", "tools", "fault", "dataset", "row", *more)
    # With kto, an answer is also set against the next question of its batch: rows depend on how they are batched.
    return in_parts(
        partial(_encode_slice, read, encode, template=template, rules=rules),
        table,
        features,
        name=fingerprint(table, stage.rows, (rules, template.key, told_the_day)),
        what="Encoding",
        batch_size=batch_size,
        batched_for=num_proc or 1 if stage.rows == "feedback" else 1,
        num_proc=num_proc,
        overwrite=overwrite_cache,
        team=team,
        folder=folder,
    )


Aligned = Mapping[str, Sequence[Any]]  # a batch of aligned rows


def _encode_slice(
    table: datasets.Dataset, encode: Callable[..., pa.Table], start: int, stop: int, *, template: Template, **how: Any
) -> pa.Table:
    """What `encode` makes of the rows of `table`, whose format is Arrow, from one number up to another."""
    batch: Any = table[start:stop]
    rows = {name: _filled(batch[name]).to_pylist() for name in batch.column_names}
    made = encode(rows, template=template, **how)
    return made.append_column("noted", column_of(batch, made, template))


def _filled(column: pa.ChunkedArray) -> pa.Array:
    """Messages without the keys that none of them has: each key costs time, and most rows have two."""
    array = column.combine_chunks()
    if not pa.types.is_list(array.type):
        return array
    values = array.flatten()
    names = [field.name for k, field in enumerate(array.type.value_type) if values.field(k).null_count < len(values)]
    messages = pa.StructArray.from_arrays([values.field(name) for name in names], names) if names else values
    offsets = pc.call_function("subtract", [array.offsets, array.offsets[0]])
    return pa.ListArray.from_arrays(offsets, messages)


def _columns(table: datasets.Dataset, *names: str) -> datasets.Dataset:
    """What is read of aligned rows. As Arrow: `datasets` takes three times as long to make Python objects of it."""
    return table.select_columns(list(names)).with_format("arrow")


def _render(batch: Aligned, template: Template, answers: Sequence[Any] | None = None, **how: bool) -> list[Any]:
    """What each row is rendered to, or why it cannot be: a list of turns, or the text of a fault.

    Args:
      answers: messages in the place of the rows' last ones.
    """
    rendered: list[Any] = []
    for i, fault in enumerate(batch["fault"]):
        messages = batch["messages"][i]
        if not fault:
            try:
                chat = messages if answers is None else [*messages[:-1], answers[i]]
                rendered.append(template.render(chat, batch["system"][i], batch["tools"][i], **how))
                continue
            except FaultyRow as error:
                fault = str(error)
        rendered.append(fault)
    return rendered


def _sequences(rendered: Sequence[Any]) -> list[Pieces]:
    return [pieces for turns in rendered if not isinstance(turns, str) for turn in turns for pieces in turn]


def _tokenised(rendered: Sequence[Any], template: Template) -> list[Any]:
    """The ids of `_render`'s turns, `[(prompt, answer), ...]`, in one call; faults stay as they are."""
    ids = iter(template.tokenise(_sequences(rendered)).lists())
    return [turns if isinstance(turns, str) else [(next(ids), next(ids)) for _ in turns] for turns in rendered]


def _table(names: Iterable[str]) -> dict[str, list[Any]]:
    return {name: [] for name in names if name not in NOTED}


def _put(out: dict[str, list[Any]], batch: Aligned, i: int, fault: str, cut: bool, **values: Any) -> None:
    """Add a row. Ids and labels that are not given are empty."""
    for name in out:
        if name in ("dataset", "row"):
            out[name].append(batch[name][i])
        elif name == "kto_tags":
            out[name].append(bool(batch["desirable"][i]))
        elif name not in ORIGIN:
            out[name].append(values.get(name, ()))
    out["fault"].append(fault)
    out["cut"].append(cut)


def _arrow(rows: Mapping[str, Any], features: datasets.Features) -> pa.Table:
    """Rows as a table, but for what is noted. Lists of ids are joined: Arrow takes one array sooner than many lists."""
    columns = []
    features = datasets.Features({name: feature for name, feature in features.items() if name not in NOTED})
    for name, feature in features.items():
        if feature != IDS:
            columns.append(pa.array(rows[name], feature.pa_type))
            continue
        ids = rows[name] if isinstance(rows[name], Ids) else Ids.join(rows[name])
        offsets = np.concatenate([[0], np.cumsum(ids.sizes)]).astype(np.int32)
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids.values)))
    return pa.Table.from_arrays(columns, schema=features.arrow_schema)


def _learns(labels: Sequence[int] | np.ndarray) -> bool:
    """Whether a token other than the first has a label: nothing comes before the first one that could predict it."""
    return bool((np.asarray(labels)[1:] != IGNORED).any())


def _encode_conversations(batch: Aligned, *, template: Template, rules: Rules) -> pa.Table:
    discard = rules.mask_history and not template.preserve_thinking
    label = partial(
        label_turns,
        cutoff_len=rules.cutoff_len,
        eos_id=template.eos_id,
        efficient_eos=template.efficient_eos,
        mask_history=rules.mask_history,
        train_on_prompt=rules.train_on_prompt,
    )
    rendered = _render(batch, template, discard_history=discard)
    ids = template.tokenise(_sequences(rendered))
    turns = np.array([0 if isinstance(row, str) else len(row) for row in rendered])
    chats = (chat for chat, row in zip(batch["messages"], rendered) if not isinstance(row, str))
    wanted = np.array([message.get("learned") is not False for chat in chats for message in chat], bool)
    labels = _labels(ids, turns, template, rules, wanted)
    bounds = np.concatenate([[0], np.cumsum(ids.sizes)])  # of sequences in `ids.values`
    stops = 2 * np.cumsum(turns)  # of rows, in sequences
    ends, values = bounds[stops], ids.values  # of rows, in tokens
    if template.efficient_eos:
        last = np.where(np.concatenate([[True], wanted])[stops], template.eos_id, IGNORED)  # [0]: of rows left out
        values, labels = np.insert(values, ends, template.eos_id), np.insert(labels, ends, last)
        ends = ends + np.arange(1, len(ends) + 1)
    sizes = np.diff(ends, prepend=0)
    # With as many tokens as cutoff_len, the rounding of proportions may cut one.
    whole = (turns > 0) & (sizes < rules.cutoff_len) & _rows_learn(labels, ends)

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
        kept = [part for part in parts if _learns(part[1])]
        lost = any(cut for _, learned, cut in parts if not _learns(learned))
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
    return _arrow(columns, CONVERSATIONS)


class _Run(NamedTuple):
    """Rows in a line, their ids and labels joined."""

    rows: list[int]  # of the batch
    ids: np.ndarray | Sequence[int] = ()
    labels: np.ndarray | Sequence[int] = ()
    sizes: np.ndarray | Sequence[int] = (0,)
    fault: str = ""
    cut: bool = False


def _rows_learn(labels: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """`_learns` of each of the rows that end in `labels` at `ends`, bool `[rows]`."""
    learned = labels != IGNORED
    before = np.concatenate([[0], np.cumsum(learned)])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    return before[ends] > before[np.minimum(starts + 1, ends)]


def _labels(ids: Ids, turns: np.ndarray, template: Template, rules: Rules, wanted: np.ndarray) -> np.ndarray:
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


def too_long(cutoff_len: int) -> str:
    return f"longer than cutoff_len {cutoff_len}"


def _split(batch: Aligned, i: int, template: Template, rules: Rules, discard: bool) -> list[Any]:
    """The turns of row i in pieces of at most `cutoff_len` tokens, each rendered as a conversation of its own.

    A piece begins with a question of the user; one question and what answers it may still be too long.
    """
    messages, parts = batch["messages"][i], []
    while messages:
        turns = template.render(messages, batch["system"][i], batch["tools"][i], discard_history=discard)
        [ids] = _tokenised([turns], template)
        ends = [k for k in range(1, len(ids)) if messages[2 * k]["role"] == "user"] + [len(ids)]
        sizes = np.cumsum([len(prompt) + len(answer) for prompt, answer in ids]) + template.efficient_eos
        end = max((k for k in ends if sizes[k - 1] <= rules.cutoff_len), default=ends[0])
        parts.append((ids[:end], [message.get("learned") is not False for message in messages[: 2 * end]]))
        messages = messages[2 * end :]
    return parts


def _one_turn(turns: Sequence[tuple[list[int], list[int]]], template: Template) -> tuple[list[int], list[int]]:
    """The last answer, and all before it as its prompt."""
    prompt = [token for asked, answer in turns[:-1] for token in (*asked, *answer)] + list(turns[-1][0])
    return prompt, [*turns[-1][1], template.eos_id] if template.efficient_eos else list(turns[-1][1])


def _last_only(template: Template) -> dict[str, Any]:
    return {"last_only": True, "discard_history": not template.preserve_thinking}


def _encode_last_answers(batch: Aligned, *, template: Template, rules: Rules) -> pa.Table:
    """The last answer, and all before it as the prompt that asks for it."""
    out = _table(CONVERSATIONS)
    for i, turns in enumerate(_tokenised(_render(batch, template, **_last_only(template)), template)):
        if isinstance(turns, str):
            _put(out, batch, i, turns, False)
            continue
        prompt, answer = _one_turn(turns, template)
        source, target = infer_seqlen(len(prompt), len(answer), rules.cutoff_len)
        cut = source < len(prompt) or target < len(answer)
        if cut and rules.overlong == "drop":
            _put(out, batch, i, too_long(rules.cutoff_len), False)
        elif not source or not target:
            _put(out, batch, i, NOTHING_TO_LEARN, cut)
        else:
            answer = answer[:target]
            ids, labels = prompt[:source] + answer, [IGNORED] * source + answer
            _put(out, batch, i, "", cut, input_ids=ids, labels=labels)
    return _arrow(out, CONVERSATIONS)


def _encode_pairs(batch: Aligned, *, template: Template, rules: Rules) -> pa.Table:
    """Chosen and rejected answers after the prompt they share; both are cut where the longer one must be."""
    how = _last_only(template)
    chosen = _tokenised(_render(batch, template, **how), template)
    rejected = _tokenised(_render(batch, template, batch["rejected"], **how), template)
    out = _table(PAIRS)
    for i, (better, worse) in enumerate(zip(chosen, rejected)):
        if isinstance(better, str) or isinstance(worse, str):
            _put(out, batch, i, better if isinstance(better, str) else worse, False)
            continue
        (prompt, answer), (_, other) = _one_turn(better, template), _one_turn(worse, template)
        longest = max(len(answer), len(other))
        source, target = infer_seqlen(len(prompt), longest, rules.cutoff_len)
        cut = source < len(prompt) or target < longest
        prompt, answer, other = prompt[:source], answer[:target], other[:target]
        if cut and rules.overlong == "drop":
            _put(out, batch, i, too_long(rules.cutoff_len), False)
        elif not answer or not other:
            _put(out, batch, i, NOTHING_TO_LEARN, cut)
        else:
            masked = [IGNORED] * len(prompt)
            sides = {"chosen": answer, "rejected": other}
            ids = {f"{side}_input_ids": prompt + tokens for side, tokens in sides.items()}
            labels = {f"{side}_labels": masked + tokens for side, tokens in sides.items()}
            _put(out, batch, i, "", cut, **ids, **labels)
    return _arrow(out, PAIRS)


def _encode_feedback(batch: Aligned, *, template: Template, rules: Rules) -> pa.Table:
    """Answers that are good or not, each with its prompt; and for KTO's estimate of the KL divergence, each prompt with
    the answer of the row before it, in its batch (the first with that of the last).
    """
    how = _last_only(template)
    kept = [i for i, fault in enumerate(batch["fault"]) if not fault]
    before = {i: batch["messages"][kept[k - 1]][-1] for k, i in enumerate(kept)}
    own = _tokenised(_render(batch, template, **how), template)
    others = _tokenised(_render(batch, template, [before.get(i) for i in range(len(own))], **how), template)
    out = _table(FEEDBACK)
    for i, (turns, other) in enumerate(zip(own, others)):
        if isinstance(turns, str) or isinstance(other, str):
            _put(out, batch, i, turns if isinstance(turns, str) else other, False)
            continue
        values: dict[str, list[int]] = {}
        cut = False
        for prefix, pair in (("", turns), ("kl_", other)):
            prompt, answer = _one_turn(pair, template)
            source, target = infer_seqlen(len(prompt), len(answer), rules.cutoff_len)
            cut |= not prefix and (source < len(prompt) or target < len(answer))
            values[f"{prefix}input_ids"] = prompt[:source] + answer[:target]
            values[f"{prefix}labels"] = [IGNORED] * source + answer[:target]
        if cut and rules.overlong == "drop":
            _put(out, batch, i, too_long(rules.cutoff_len), False)
        elif not _learns(values["labels"]):
            _put(out, batch, i, NOTHING_TO_LEARN, cut)
        else:
            _put(out, batch, i, "", cut, **values)
    return _arrow(out, FEEDBACK)


# ---------------------------------------------------------------------- stage pt


def encode_documents(
    table: datasets.Dataset,
    template: Template,
    *,
    cutoff_len: int,
    packing: bool = True,
    neat_packing: bool = False,
    overlong: str = "truncate",
    batch_size: int = 1000,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
    team: Team = ALONE,
    folder: Path | None = None,
) -> datasets.Dataset:
    """Ids of the texts of aligned rows; every token is learned, so there is no column of labels.

    With `packing`, the texts of each batch of rows are joined by eos and cut every `cutoff_len` tokens, and what is
    left at the end of a batch is dropped. Without, each text is a row, and one of more than `cutoff_len` tokens becomes
    what `overlong` says (see `Rules`); with `neat_packing` it is split.
    """
    form = "split" if neat_packing else "blocks" if packing else overlong
    args = {"cutoff_len": cutoff_len, "form": form, "eos": document_end(template)}
    return in_parts(
        partial(
            _encode_slice,
            _columns(table, "messages", "fault", "dataset", "row"),
            _encode_texts,
            template=template,
            **args,
        ),
        table,
        DOCUMENTS,
        name=fingerprint(table, "pt", (args, template.key)),
        what="Encoding",
        batch_size=batch_size,
        batched_for=num_proc or 1 if form == "blocks" else 1,
        num_proc=num_proc,
        overwrite=overwrite_cache,
        team=team,
        folder=folder,
    )


def document_end(template: Template) -> str:
    """The text that ends a document: Llama 3's answers end with another token than its documents."""
    return "<|end_of_text|>" if template.name == "llama3" else template.tokenizer.eos_token


def _encode_texts(batch: Aligned, *, template: Template, cutoff_len: int, form: str, eos: str) -> pa.Table:
    tokenizer = template.tokenizer
    kept = [messages[0]["content"] for messages, fault in zip(batch["messages"], batch["fault"]) if not fault]
    texts = [template.guard(text) + eos for text in kept]
    bos = tokenizer.bos_token_id if getattr(tokenizer, "add_bos_token", False) else None
    if bos is not None and form != "blocks":
        texts = [tokenizer.bos_token + text for text in texts]
    ids = template.token_ids(texts)
    documents = np.split(ids.values, np.cumsum(ids.sizes)[:-1]) if texts else []
    if form == "split":
        pieces = [ids[i : i + cutoff_len] for ids in documents for i in range(0, len(ids), cutoff_len)]
        return _arrow({"input_ids": pieces, "cut": [False] * len(pieces)}, DOCUMENTS)
    if form != "blocks":
        cut = [len(ids) > cutoff_len for ids in documents]
        most = 0 if form == "drop" else cutoff_len
        kept = [ids[:most] if long else ids for ids, long in zip(documents, cut)]
        return _arrow({"input_ids": kept, "cut": cut}, DOCUMENTS)
    joined = np.concatenate([np.zeros(0, np.int32), *documents])
    blocks = joined[: len(joined) // cutoff_len * cutoff_len].reshape(-1, cutoff_len)
    if bos is not None:
        blocks[:, 0] = bos  # in the place of a token, as LLaMA-Factory does
    return _arrow({"input_ids": list(blocks), "cut": [False] * len(blocks)}, DOCUMENTS)
