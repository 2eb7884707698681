"""What is to be said of rows that are learned from: text in them that is not learned as it stands.

It is looked for while rows are encoded, and kept with them: a set that was encoded before says the same.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jtune.data.cache.shards import arrow_column
from jtune.data.encode.answers import poor_answers
from jtune.data.formats.media import PLACEHOLDERS
from jtune.data.report import EXAMPLES, ROW_NOTES, Note
from jtune.data.sources.load import places
from jtune.data.sources.registry import Entry
from jtune.data.templates.template import Template
from jtune.data.tokens.special import find, pattern

KINDS = ("special", "media", "thoughts", "tools", "unused", *ROW_NOTES)


def noted(
    batch: pa.Table, template: Template, answers: Mapping[str, Iterable[int]] | None = None
) -> list[dict[str, Any]]:
    """What is to be said of aligned rows: `{kind: items}` with the `dataset` and `row` it is said of.

    Args:
      answers: rows of the batch by what is the matter with their answers (see answers.py).
    """
    said: dict[str, dict[int, set[str]]] = {kind: {} for kind in KINDS}
    tell = lambda kind, row, items: said[kind].setdefault(row, set()).update(items)
    fields = {name: _field(batch, name) for name in ("content", "original", "unused")}
    tools = [(batch["tools"], None)] if "tools" in batch.column_names else []
    if template.special.tokens and not template.splits:
        system = [(batch["system"], None)] if "system" in batch.column_names else []
        for column in (*fields["content"], *fields["original"], *tools, *system):
            for row, text in _matching(*column, pattern(template.special.tokens)):
                tell("special", row, find(text, template.special))
    for column in fields["content"]:
        for row, text in _matching(*column, "|".join(PLACEHOLDERS)):
            tell("media", row, [held for held in PLACEHOLDERS if held in text])
    if not template.has_thoughts:
        for column in fields["original"]:
            for row, _ in _matching(*column, '"reasoning_content": '):
                tell("thoughts", row, ["".join(word.strip() for word in template.thought)])
    if template.keys is not None and "tools" not in template.keys:
        for row, _ in _matching(*tools[0], r"\w") if tools else ():
            tell("tools", row, ["tools"])
    for column in fields["unused"]:
        for row, keys in _matching(*column, "."):
            tell("unused", row, [key for key in keys.split(", ") if key not in (template.keys or ())])
    for kind, numbers in (answers or {}).items():
        for row in numbers:
            tell(kind, row, ["answers"])
    rows = sorted({row for found in said.values() for row, items in found.items() if items})
    origin = batch.select(["dataset", "row"]).take(pa.array(rows, pa.int64())).to_pylist()
    found = ({kind: sorted(said[kind][row]) for kind in KINDS if said[kind].get(row)} for row in rows)
    return [one | place for one, place in zip(found, origin)]


def notes_of(made: datasets.Dataset, entries: Sequence[Entry], most_examples: int = EXAMPLES) -> tuple[Note, ...]:
    """The notes of encoded rows, which have a column `noted`.

    Args:
      most_examples: rows whose place is told, of each kind of `ROW_NOTES`; of the others, the first.
    """
    column = arrow_column(made, "noted")
    at = np.flatnonzero(pc.call_function("is_valid", [column]).to_numpy())
    rows: list[Mapping[str, Any]] = []
    for texts in column.take(pa.array(at)).to_pylist():
        rows += json.loads(texts)
    notes = []
    for kind in KINDS:
        held = [row for row in rows if kind in row]
        items = Counter(item for row in held for item in row[kind])
        if held:
            shown = held[: most_examples if kind in ROW_NOTES else 1]
            rows_of = datasets.Dataset.from_dict({name: [row[name] for row in shown] for name in ("dataset", "row")})
            first, *more = places(entries, rows_of)
            notes.append(Note(kind, len(held), tuple(x for x, _ in items.most_common()), first, tuple(more)))
    return tuple(notes)


def column_of(batch: pa.Table, made: pa.Table, template: Template) -> pa.Array:
    """The column `noted` of the rows `made` of a batch: JSON, a list of what `noted` says, mostly null."""
    told = noted(batch, template, poor_answers(batch, made))
    if not told or not len(made):
        return pa.nulls(len(made), pa.string())
    if "row" not in made.column_names:  # texts of many rows, joined
        lists = [told, *([None] * (len(made) - 1))]
    else:  # of several pieces of a row, the first
        of = {(one["dataset"], one["row"]): [one] for one in told}
        rows = zip(*(made[name].to_pylist() for name in ("dataset", "row", "fault")))
        lists = [None if fault else of.pop(tuple(place), None) for *place, fault in rows]
    return pa.array([one and json.dumps(one, ensure_ascii=False) for one in lists], pa.string())


def _field(batch: pa.Table, name: str) -> list[tuple[Any, pa.Array | None]]:
    """A key of all messages of a batch, with the rows they stand in; and of the rejected answers."""
    messages = batch["messages"].combine_chunks()
    columns: list[tuple[Any, pa.Array | None]] = [
        (messages.flatten().field(name), pc.call_function("list_parent_indices", [messages]))
    ]
    if "rejected" in batch.column_names:
        columns.append((batch["rejected"].combine_chunks().field(name), None))
    return columns


def _matching(column: Any, parents: pa.Array | None, regex: str) -> list[tuple[int, str]]:
    """The row and the text of each text of `column` that a regular expression is found in."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if column.null_count == len(column):
        return []
    hits = pc.call_function("match_substring_regex", [column], pc.MatchSubstringOptions(regex))
    found = np.flatnonzero(pc.call_function("coalesce", [hits, False]).to_numpy(zero_copy_only=False))
    rows = found if parents is None else parents.to_numpy()[found]
    return list(zip(rows.tolist(), column.take(pa.array(found)).to_pylist()))
