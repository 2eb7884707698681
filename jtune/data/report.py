"""What became of the rows: read, kept, left out and why, cut."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

EXAMPLES = 3  # places that are named for each reason
REASONS = 6  # reasons that are named in a sentence


@dataclass(frozen=True)
class Dropped:
    reason: str
    count: int
    examples: tuple[str, ...]  # places, "file:18" or "file row 17"

    def __str__(self) -> str:
        more = ", ..." if self.count > EXAMPLES else ""
        return f"{self.count} {self.reason} ({', '.join(self.examples[:EXAMPLES])}{more})"


@dataclass(frozen=True)
class Note:
    """Something about rows that are learned from, all the same.

    >>> print(Note("special", 2, ("<|eot_id|>",), "a.jsonl:3"))
    2 rows hold special tokens in their text: `<|eot_id|>` (first: a.jsonl:3)
    """

    kind: str  # a key of NOTES
    count: int  # rows
    items: tuple[str, ...]  # which tokens, keys ..., the most frequent first
    first: str  # place of the first row
    more: tuple[str, ...] = ()  # places of further rows, of kinds in ROW_NOTES

    def named(self) -> Iterator[str]:
        """A line for each row, where it is of each that is said what is the matter with it."""
        for place in (self.first, *self.more) if self.kind in ROW_NOTES else ():
            yield f"{place}: {ROW_NOTES[self.kind]}"

    def __str__(self) -> str:
        rest = len(self.items) - REASONS
        items = ", ".join(f"`{item}`" for item in self.items[:REASONS]) + (f" and {rest} more" if rest > 0 else "")
        rows = "1 row holds" if self.count == 1 else f"{self.count} rows hold"
        return NOTES[self.kind].format(rows=rows, items=items) + f" (first: {self.first})"


NOTES = {
    "special": "{rows} special tokens in their text: {items}",
    "media": "{rows} {items}, which is text to jtune: no image, video or audio is read",
    "thoughts": "{rows} thoughts, which the template has no place for: they are learned as text in {items}",
    "tools": "{rows} {items}, which the chat template does not write",
    "unused": "keys of messages not used: {items}; {rows} such",
    "equal": "{rows} the same answer as chosen and as rejected, which teaches nothing",
    "late": "{rows} answers that differ only beyond cutoff_len, where they are cut, and so teach nothing",
    "empty": "{rows} an answer without text, of which only the end is learned",
    "long": "{rows} more tokens than cutoff_len, and are cut",
}

# Of pairs and marked answers: what is the matter with a row, each of which `jtune data --check` names.
ROW_NOTES = {
    "equal": "the chosen and the rejected answer are the same",
    "late": "the answers differ only beyond cutoff_len, where they are cut",
    "empty": "an answer without text",
    "long": "longer than cutoff_len, and cut",
}


@dataclass(frozen=True)
class SetReport:
    """One encoded set. Rows are rows of the data; `encoded` is what was made of them (blocks, in stage pt)."""

    name: str  # "train", "eval", "eval_<name>"
    read: int = 0
    encoded: int = 0
    tokens: int = 0
    trained: int = 0  # tokens the loss counts
    cut: int = 0  # rows longer than cutoff_len
    dropped: tuple[Dropped, ...] = ()
    joined: bool = False  # rows became blocks
    notes: tuple[Note, ...] = ()

    @property
    def left_out(self) -> int:
        return sum(d.count for d in self.dropped)

    def exceeds(self, most: float) -> bool:
        """Whether more than `most` of the rows are left out: a number of rows, or below 1 a share of them."""
        return self.left_out > (most if most >= 1 else most * self.read)

    def too_many(self, most: float) -> str:
        return f"{self.name}: {self.left_out} of {self.read} rows are left out, and max_dropped is {most:g}"

    @property
    def kept(self) -> int:
        return self.read - self.left_out

    def remarks(self) -> list[str]:
        """What is to be said of rows that are learned from; how many are cut, the sentence says."""
        return [f"{self.name}: {note}" for note in self.notes if note.kind != "long"]

    def sentence(self) -> str:
        """
        >>> print(SetReport("train", 10, 9, 900, 300, 2, (Dropped("no turns", 1, ("row 3",)),)).sentence())
        train: 9 of 10 rows, 900 tokens, 33% of them trained on; 2 cut to cutoff_len; left out: 1 no turns (row 3)
        """
        share = f", {self.trained / self.tokens:.0%} of them trained on" if self.tokens and not self.joined else ""
        blocks = f" in {self.encoded} blocks" if self.joined else ""
        parts = [f"{self.name}: {self.kept} of {self.read} rows, {self.tokens} tokens{blocks}{share}"]
        if self.cut:
            parts.append(f"{self.cut} cut to cutoff_len")
        if self.dropped:
            parts.append("left out: " + reasons(self.dropped))
        return "; ".join(parts)


@dataclass(frozen=True)
class Report:
    sets: tuple[SetReport, ...] = ()

    def __str__(self) -> str:
        return "\n".join(line for s in self.sets for line in (s.sentence(), *s.remarks()))


def add(a: SetReport, b: SetReport) -> SetReport:
    """The report of the rows of both; the places are those of the first."""
    counts = {d.reason: d.count for d in b.dropped}
    known = {d.reason for d in a.dropped}
    dropped = [replace(d, count=d.count + counts.get(d.reason, 0)) for d in a.dropped]
    sums = {key: getattr(a, key) + getattr(b, key) for key in ("read", "encoded", "tokens", "trained", "cut")}
    more = (d for d in b.dropped if d.reason not in known)
    notes = (*_added(a.notes, b.notes), *(note for note in b.notes if note.kind not in {n.kind for n in a.notes}))
    return replace(a, **sums, dropped=(*dropped, *more), joined=a.joined or b.joined, notes=notes)


def _added(notes: Sequence[Note], more: Sequence[Note]) -> Iterator[Note]:
    for note in notes:
        same = next((other for other in more if other.kind == note.kind), replace(note, count=0))
        items = tuple(dict.fromkeys((*note.items, *same.items)))
        yield replace(note, count=note.count + same.count, items=items)


def report_of(saved: Mapping[str, Any]) -> SetReport:
    """The report that `dataclasses.asdict` made this of, also where JSON was in between."""
    dropped = tuple(Dropped(d["reason"], d["count"], tuple(d["examples"])) for d in saved["dropped"])
    notes = tuple(
        Note(**{**n, "items": tuple(n["items"]), "more": tuple(n.get("more", ()))}) for n in saved.get("notes", ())
    )
    return SetReport(**{**saved, "dropped": dropped, "notes": notes})


def reasons(dropped: Sequence[Dropped]) -> str:
    """The most frequent reasons in one line."""
    ranked = sorted(dropped, key=lambda d: -d.count)
    rest = sum(d.count for d in ranked[REASONS:])
    return ", ".join(map(str, ranked[:REASONS])) + (f", {rest} for other reasons" if rest else "")
