"""Conversations and documents as token ids and labels, kept in Arrow tables on disk.

The rules are LLaMA-Factory's, except:
  - with mask_history and a template of efficient_eos, the eos that ends an earlier answer is not learned; there it is;
  - in stage pt every eos is learned; there none is where the tokenizer has no pad token of its own;
  - rows without anything to learn are left out; there they take part in a batch with nothing;
  - stage pt with neat_packing: a row for each document, long ones in pieces of cutoff_len. There it is refused.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jtune.data.align import FaultyRow
from jtune.data.cache import fingerprint
from jtune.data.chat_format import Pieces, Turn
from jtune.data.pack import preprocessing_batches
from jtune.data.templates import Template, token_ids, tokenise
from jtune.data.tools import WHOLE
from jtune.errors import DataError

log = logging.getLogger("jtune")

IGNORED = -100  # the label of a token that is not learned
NOTHING_TO_LEARN = "nothing to learn (no token of an answer is left)"
IDS = datasets.List(datasets.Value("int32"))
ENCODED = datasets.Features(
    {
        "input_ids": IDS,
        "labels": IDS,
        "cut": datasets.Value("bool"),
        "fault": datasets.Value("string"),
        "dataset": datasets.Value("int32"),
        "row": datasets.Value("int64"),
    }
)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Encoded examples, memory-mapped: `len(encoded)`, `encoded[i]`.

    Attributes:
      table: what `encode_conversations` or `encode_documents` made; without labels, all tokens are learned.
      kept: rows of `table` that are examples, int64; None: all.
    """

    table: datasets.Dataset
    kept: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.table) if self.kept is None else len(self.kept)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`input_ids` and `labels`, int32 `[length]`, read-only views of the file."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        row = index % len(self) if self.kept is None else int(self.kept[index])
        ids = self._ids[row]
        return {"input_ids": ids, "labels": ids if self._labels is None else self._labels[row]}

    @property
    def rows(self) -> datasets.Dataset:
        """The examples as a table with the columns input_ids and, but for stage pt, labels."""
        columns = [name for name in ("input_ids", "labels") if name in self.table.column_names]
        table = self.table.select_columns(columns)
        return table if self.kept is None else table.select(self.kept)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 `[n]`."""
        return self._of_kept(self._ids.lengths)

    @cached_property
    def labelled(self) -> np.ndarray:
        """Targets of each example, int32 `[n]`: places t with labels[t + 1] != -100. The first token is no target."""
        if self._labels is None:
            return np.maximum(self.lengths - 1, 0)
        return self._of_kept(self._labels.count_after_first(IGNORED))

    @cached_property
    def first_labelled(self) -> np.ndarray:
        """int32 `[n]`: 1 where the first token has a label; nothing predicts it, yet HF's Trainer counts it."""
        if self._labels is None:
            return (self.lengths > 0).astype(np.int32)
        return self._of_kept(self._labels.first_is_not(IGNORED))

    def preprocessing_batches(self, batch_size: int, processes: int | None) -> np.ndarray:
        """Which batch of rows each example was encoded in, int64 `[n]` (see jtune.data.pack)."""
        return self._of_kept(preprocessing_batches(len(self.table), batch_size, processes))

    def _of_kept(self, per_row: np.ndarray) -> np.ndarray:
        return per_row if self.kept is None else per_row[self.kept]

    @cached_property
    def _ids(self) -> "Lists":
        return Lists(self.table, "input_ids")

    @cached_property
    def _labels(self) -> "Lists | None":
        return Lists(self.table, "labels") if "labels" in self.table.column_names else None


class Lists:
    """A column of int32 lists as numpy views of the Arrow buffers: nothing is copied, no Python list is made."""

    def __init__(self, table: datasets.Dataset, name: str):
        chunks = [c for c in table.data.column(name).chunks if len(c)]
        self.offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self.values = [chunk.values.to_numpy() for chunk in chunks]
        self.starts = np.concatenate([[0], np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)])

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self.starts, row, side="right")) - 1
        start, end = self.offsets[chunk][row - self.starts[chunk] :][:2]
        return self.values[chunk][start:end]

    @property
    def lengths(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int32), *(np.diff(offsets) for offsets in self.offsets)]).astype(np.int32)

    def max(self) -> int:
        return max((int(v[o[0] : o[-1]].max()) for v, o in zip(self.values, self.offsets) if o[-1] > o[0]), default=-1)

    def count_after_first(self, ignored: int) -> np.ndarray:
        """How many values of each list, but for its first, are not `ignored`, int32."""
        counts = [np.zeros(0, np.int32)]
        for values, offsets in zip(self.values, self.offsets):
            first, last = offsets[0], offsets[-1]
            counted = values[first:last] != ignored
            before = np.concatenate([[0], np.cumsum(counted, dtype=np.int32)])
            starts, ends = offsets[:-1] - first, offsets[1:] - first
            counts.append(before[ends] - before[np.minimum(starts + 1, ends)])
        return np.concatenate(counts).astype(np.int32)

    def first_is_not(self, ignored: int) -> np.ndarray:
        """1 for each list whose first value is not `ignored`, int32; 0 for the others and for empty lists."""
        found = [np.zeros(0, np.int32)]
        for values, offsets in zip(self.values, self.offsets):
            starts, filled = offsets[:-1], np.diff(offsets) > 0
            first = np.zeros(len(starts), bool)
            first[filled] = values[starts[filled]] != ignored
            found.append(first.astype(np.int32))
        return np.concatenate(found)


def check_vocabulary(encoded: Encoded, vocab_size: int) -> None:
    """Raise a DataError if an id is outside a vocabulary of `vocab_size`: the model has no embedding for it."""
    highest = encoded._ids.max()
    if highest >= vocab_size:
        raise DataError(
            f"token id {highest} is outside the model's vocabulary of {vocab_size}: the tokenizer has more tokens than "
            "the model. Is it the model's tokenizer, and `template` the model's template (another one's special tokens "
            "are added to the vocabulary)?"
        )


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
) -> tuple[list[int], list[int], bool]:
    """Join the turns of a conversation, at most `cutoff_len` tokens, and mark what is learned.

    Turns that do not fit are left out: the last ones, or with `mask_history` the first.

    Returns:
      ids, labels (-100 where nothing is learned), and whether anything was cut.
    """
    parts: list[tuple[list[int], list[int]]] = []
    used = 1 if efficient_eos else 0
    cut = False
    for k, (source, target) in enumerate(reversed(turns) if mask_history else turns):
        if used >= cutoff_len:
            cut = True
            break
        kept_source, kept_target = infer_seqlen(len(source), len(target), cutoff_len - used)
        cut |= kept_source < len(source) or kept_target < len(target)
        source, target = source[:kept_source], target[:kept_target]
        used += kept_source + kept_target
        learned = target if not mask_history or k == 0 else [IGNORED] * len(target)
        given = source if train_on_prompt else [IGNORED] * len(source)
        if efficient_eos and k > 0 and not train_on_prompt and not mask_history and source:
            given = [eos_id, *given[1:]]  # what ends the answer before is learned where this turn begins
        parts.append((source + target, given + learned))
    if mask_history:
        parts.reverse()
    ids = list(chain.from_iterable(ids for ids, _ in parts))
    labels = list(chain.from_iterable(labels for _, labels in parts))
    return ([*ids, eos_id], [*labels, eos_id], cut) if efficient_eos else (ids, labels, cut)


def encode_conversations(
    table: datasets.Dataset,
    template: Template,
    *,
    cutoff_len: int,
    mask_history: bool = False,
    train_on_prompt: bool = False,
    batch_size: int = 1000,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
) -> datasets.Dataset:
    """Ids and labels of aligned rows: a row for each, empty where `fault` says why it is left out.

    Raises:
      DataError: `train_on_prompt` with a template that cannot.
    """
    if train_on_prompt and template.efficient_eos:
        raise DataError(f"template {template.name!r} learns eos where a prompt begins: train_on_prompt is not for it")
    rules = {"cutoff_len": cutoff_len, "mask_history": mask_history, "train_on_prompt": train_on_prompt}
    tools = pc.call_function("not_equal", [_column(table, "tools"), pa.scalar("")])
    has_tools = bool(pc.call_function("any", [tools]).as_py())
    told_the_day = template.day if has_tools else None
    if has_tools and template.tool_format in WHOLE:
        log.warning(
            "template %s: calls are written as LLaMA-Factory writes them, which is not how the model is told to write "
            "them: a part is missing. `tool_format: %s` writes them whole",
            template.name,
            WHOLE[template.tool_format],
        )
    return table.map(
        partial(_encode_batch, template=template, **rules),
        batched=True,
        batch_size=batch_size,
        remove_columns=table.column_names,
        features=ENCODED,
        num_proc=num_proc,
        load_from_cache_file=not overwrite_cache,
        new_fingerprint=fingerprint(table, "sft", (rules, template.key, told_the_day)),
        desc="Encoding",
    )


def _encode_batch(
    batch: Mapping[str, Sequence[Any]],
    *,
    template: Template,
    cutoff_len: int,
    mask_history: bool,
    train_on_prompt: bool,
) -> dict[str, Any]:
    n = len(batch["fault"])
    faults = list(batch["fault"])
    rendered: list[list[Turn]] = [[] for _ in range(n)]
    discard = mask_history and not template.preserve_thinking
    for i in range(n):
        if faults[i]:
            continue
        try:
            rendered[i] = template.render(
                batch["messages"][i], batch["system"][i], batch["tools"][i], discard_history=discard
            )
        except FaultyRow as fault:
            faults[i] = str(fault)
    flat: list[Pieces] = [pieces for turns in rendered for turn in turns for pieces in turn]
    ids = iter(tokenise(template.tokenizer, flat))
    out: dict[str, Any] = {"input_ids": [], "labels": [], "cut": []}
    for i in range(n):
        tokens, labels, cut = [], [], False
        if not faults[i]:
            tokens, labels, cut = label_turns(
                [(next(ids), next(ids)) for _ in rendered[i]],
                cutoff_len=cutoff_len,
                eos_id=template.eos_id,
                efficient_eos=template.efficient_eos,
                mask_history=mask_history,
                train_on_prompt=train_on_prompt,
            )
            if all(label == IGNORED for label in labels[1:]):  # the first token is nothing's next one
                tokens, labels, faults[i] = [], [], NOTHING_TO_LEARN
        out["input_ids"].append(np.array(tokens, np.int32))
        out["labels"].append(np.array(labels, np.int32))
        out["cut"].append(cut)
    return out | {"fault": faults, "dataset": batch["dataset"], "row": batch["row"]}


# ---------------------------------------------------------------------- stage pt


def encode_documents(
    table: datasets.Dataset,
    template: Template,
    *,
    cutoff_len: int,
    packing: bool = True,
    neat_packing: bool = False,
    batch_size: int = 1000,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
) -> datasets.Dataset:
    """Ids of the texts of aligned rows; every token is learned, so there is no column of labels.

    With `packing`, the texts of each batch of rows are joined by eos and cut every `cutoff_len` tokens, and what is
    left at the end of a batch is dropped. Without, each text is cut to `cutoff_len`. With `neat_packing`, each text is
    a row, or several.
    """
    form = "documents" if neat_packing else "blocks" if packing else "truncated"
    args = {"cutoff_len": cutoff_len, "form": form, "eos": document_end(template), "batch_size": batch_size}
    return table.map(
        partial(_encode_texts, tokenizer=template.tokenizer, **{k: args[k] for k in ("cutoff_len", "form", "eos")}),
        batched=True,
        batch_size=batch_size,
        remove_columns=table.column_names,
        features=datasets.Features({"input_ids": IDS}),
        num_proc=num_proc,
        load_from_cache_file=not overwrite_cache,
        new_fingerprint=fingerprint(table, "pt", (args, template.key)),
        desc="Encoding",
    )


def document_end(template: Template) -> str:
    """The text that ends a document: Llama 3's answers end with another token than its documents."""
    return "<|end_of_text|>" if template.name == "llama3" else template.tokenizer.eos_token


def _encode_texts(
    batch: Mapping[str, Sequence[Any]], *, tokenizer: Any, cutoff_len: int, form: str, eos: str
) -> dict[str, list[np.ndarray]]:
    texts = [messages[0]["content"] + eos for messages, fault in zip(batch["messages"], batch["fault"]) if not fault]
    bos = tokenizer.bos_token_id if getattr(tokenizer, "add_bos_token", False) else None
    if bos is not None and form != "blocks":
        texts = [tokenizer.bos_token + text for text in texts]
    documents = [np.array(ids, np.int32) for ids in token_ids(tokenizer, texts)]
    if form == "truncated":
        return {"input_ids": [ids[:cutoff_len] for ids in documents]}
    if form == "documents":
        return {"input_ids": [ids[i : i + cutoff_len] for ids in documents for i in range(0, len(ids), cutoff_len)]}
    joined = np.concatenate([np.zeros(0, np.int32), *documents])
    blocks = joined[: len(joined) // cutoff_len * cutoff_len].reshape(-1, cutoff_len)
    if bos is not None:
        blocks[:, 0] = bos  # in the place of a token, as LLaMA-Factory does
    return {"input_ids": list(blocks)}


def _column(table: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column of the rows of `table`, in their order."""
    return table.select_columns([name]).with_format("arrow")[:][name]
