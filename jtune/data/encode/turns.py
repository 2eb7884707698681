"""The turns of conversations: rendered, tokenised, and cut to the length of a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jtune.config.stages import RowKind
from jtune.data.encode.arrow import Aligned
from jtune.data.formats.messages import FaultyRow
from jtune.data.templates.chat_format import Pieces
from jtune.data.templates.template import Template

NOTHING_TO_LEARN = "nothing to learn (no token of an answer is left)"
NOTHING_WANTED = "nothing to learn (no answer is to be learned: weight, train, loss)"

TurnIds = tuple[list[int], list[int]]  # a prompt and its answer


@dataclass(frozen=True)
class Rules:
    """How rows become ids.

    Attributes:
      overlong: what becomes of a row of more than `cutoff_len` tokens. "truncate": it is cut, as in LLaMA-Factory;
        "drop": it is left out; "split": a conversation becomes several, each beginning with a question.
      margins: of pairs, whether some set says by how much the chosen answer is better.
    """

    cutoff_len: int
    mask_history: bool = False
    train_on_prompt: bool = False
    overlong: str = "truncate"
    margins: bool = False


def too_long(cutoff_len: int) -> str:
    """The fault of a row that `overlong: drop` leaves out."""
    return f"longer than cutoff_len {cutoff_len}"


# ---------------------------------------------------------------------- text


def rendering(template: Template, rows: RowKind, mask_history: bool = False) -> dict[str, bool]:
    """The options of `Template.render` for a kind of rows: whether earlier answers are learned, and keep thoughts."""
    last_only = rows in ("prompt", "pair", "feedback")
    return {"last_only": last_only, "discard_history": (last_only or mask_history) and not template.preserve_thinking}


def render_rows(
    batch: Aligned, template: Template, how: Mapping[str, bool], answers: Sequence[Any] | None = None
) -> list[Any]:
    """The turns of each row, or the text of its fault.

    Args:
      how: see `rendering`.
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


def sequences(rendered: Sequence[Any]) -> list[Pieces]:
    """The prompts and answers of `render_rows`, in order; rows with a fault have none."""
    return [pieces for turns in rendered if not isinstance(turns, str) for turn in turns for pieces in turn]


# ---------------------------------------------------------------------- ids


def tokenised(rendered: Sequence[Any], template: Template) -> list[Any]:
    """The ids of the turns of `render_rows`, `[(prompt, answer), ...]`, in one call; faults stay as they are."""
    ids = iter(template.tokenise(sequences(rendered)).lists())
    return [turns if isinstance(turns, str) else [(next(ids), next(ids)) for _ in turns] for turns in rendered]


def one_turn(turns: Sequence[TurnIds], template: Template) -> TurnIds:
    """The last answer, and everything before it as its prompt."""
    prompt = [token for asked, answer in turns[:-1] for token in (*asked, *answer)] + list(turns[-1][0])
    return prompt, [*turns[-1][1], template.eos_id] if template.efficient_eos else list(turns[-1][1])


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


def cut_turns(sizes: Sequence[tuple[int, int]], budget: int, *, last_first: bool = False) -> list[tuple[int, int]]:
    """How many tokens of each prompt and answer of a conversation are kept so that all fit into `budget`.

    Turns that do not fit are left out: the last ones, or with `last_first` the first.

    >>> cut_turns([(4, 2), (6, 6), (3, 3)], 14), cut_turns([(4, 2), (6, 6), (3, 3)], 14, last_first=True)
    ([(4, 2), (4, 4)], [(4, 4), (3, 3)])
    """
    kept = []
    for source, target in reversed(sizes) if last_first else sizes:
        if budget <= 0:
            break
        kept.append(infer_seqlen(source, target, budget))
        budget -= sum(kept[-1])
    return kept[::-1] if last_first else kept
