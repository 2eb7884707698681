"""Pairs of answers, and answers that are good or not, as ids and labels."""

import logging

import datasets
import pyarrow as pa

from jtune.data.encode.encoded import IGNORED
from jtune.data.encode.supervised import last_only, one_turn
from jtune.data.encode.turns import (
    IDS,
    NOTED,
    NOTHING_TO_LEARN,
    ORIGIN,
    Aligned,
    Rules,
    arrow_list,
    arrow_table,
    infer_seqlen,
    is_trained_on,
    put_row,
    render_row,
    tokenised,
    too_long,
)
from jtune.data.templates.template import Template

log = logging.getLogger("jtune")
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


def encode_pairs(batch: Aligned, *, template: Template, rules: Rules) -> pa.Table:
    """Chosen and rejected answers after the prompt they share; both are cut where the longer one must be."""
    how = last_only(template)
    chosen = tokenised(render_row(batch, template, **how), template)
    rejected = tokenised(render_row(batch, template, batch["rejected"], **how), template)
    out = arrow_table(PAIRS)
    for i, (better, worse) in enumerate(zip(chosen, rejected)):
        if isinstance(better, str) or isinstance(worse, str):
            put_row(out, batch, i, better if isinstance(better, str) else worse, False)
            continue
        (prompt, answer), (_, other) = one_turn(better, template), one_turn(worse, template)
        longest = max(len(answer), len(other))
        source, target = infer_seqlen(len(prompt), longest, rules.cutoff_len)
        cut = source < len(prompt) or target < longest
        prompt, answer, other = prompt[:source], answer[:target], other[:target]
        if cut and rules.overlong == "drop":
            put_row(out, batch, i, too_long(rules.cutoff_len), False)
        elif not answer or not other:
            put_row(out, batch, i, NOTHING_TO_LEARN, cut)
        else:
            masked = [IGNORED] * len(prompt)
            sides = {"chosen": answer, "rejected": other}
            ids = {f"{side}_input_ids": prompt + tokens for side, tokens in sides.items()}
            labels = {f"{side}_labels": masked + tokens for side, tokens in sides.items()}
            put_row(out, batch, i, "", cut, **ids, **labels)
    return arrow_list(out, PAIRS)


def encode_feedback(batch: Aligned, *, template: Template, rules: Rules) -> pa.Table:
    """Answers that are good or not, each with its prompt; and for KTO's estimate of the KL divergence, each prompt with
    the answer of the row before it, in its batch (the first with that of the last).
    """
    how = last_only(template)
    kept = [i for i, fault in enumerate(batch["fault"]) if not fault]
    before = {i: batch["messages"][kept[k - 1]][-1] for k, i in enumerate(kept)}
    own = tokenised(render_row(batch, template, **how), template)
    others = tokenised(render_row(batch, template, [before.get(i) for i in range(len(own))], **how), template)
    out = arrow_table(FEEDBACK)
    for i, (turns, other) in enumerate(zip(own, others)):
        if isinstance(turns, str) or isinstance(other, str):
            put_row(out, batch, i, turns if isinstance(turns, str) else other, False)
            continue
        values: dict[str, list[int]] = {}
        cut = False
        for prefix, pair in (("", turns), ("kl_", other)):
            prompt, answer = one_turn(pair, template)
            source, target = infer_seqlen(len(prompt), len(answer), rules.cutoff_len)
            cut |= not prefix and (source < len(prompt) or target < len(answer))
            values[f"{prefix}input_ids"] = prompt[:source] + answer[:target]
            values[f"{prefix}labels"] = [IGNORED] * source + answer[:target]
        if cut and rules.overlong == "drop":
            put_row(out, batch, i, too_long(rules.cutoff_len), False)
        elif not is_trained_on(values["labels"]):
            put_row(out, batch, i, NOTHING_TO_LEARN, cut)
        else:
            put_row(out, batch, i, "", cut, **values)
    return arrow_list(out, FEEDBACK)
