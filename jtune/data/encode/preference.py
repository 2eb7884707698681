"""Pairs of answers, and answers that are good or not, as ids and labels."""

import datasets
import pyarrow as pa

from jtune.data.encode.arrow import IDS, NOTED, ORIGIN, Aligned, Rows
from jtune.data.encode.encoded import IGNORED
from jtune.data.encode.supervised import learned_after
from jtune.data.encode.turns import (
    NOTHING_TO_LEARN,
    Rules,
    infer_seqlen,
    one_turn,
    render_rows,
    rendering,
    tokenised,
    too_long,
)
from jtune.data.templates.template import Template

SIDE = {"input_ids": IDS, "labels": IDS}
BOTH = {f"{side}_{name}": feature for side in ("chosen", "rejected") for name, feature in SIDE.items()}
FEEDBACK = datasets.Features(
    {f"{prefix}{name}": feature for prefix in ("", "kl_") for name, feature in SIDE.items()}
    | {"kto_tags": datasets.Value("bool")}
    | ORIGIN
    | NOTED
)


def pair_features(margins: bool = False) -> datasets.Features:
    """The columns of encoded pairs: ids and labels of both answers, and where sets have `margins`, each pair's."""
    return datasets.Features(BOTH | ({"margin": datasets.Value("float32")} if margins else {}) | ORIGIN | NOTED)


def encode_pairs(batch: Aligned, *, template: Template, rules: Rules) -> pa.Table:
    """Chosen and rejected answers after the prompt they share; both are cut where the longer one must be. A pair of a
    set without margins has margin 0.
    """
    how = rendering(template, "pair")
    chosen = tokenised(render_rows(batch, template, how), template)
    rejected = tokenised(render_rows(batch, template, how, batch["rejected"]), template)
    out = Rows(batch, pair_features(rules.margins))
    for i, (better, worse) in enumerate(zip(chosen, rejected)):
        if isinstance(better, str) or isinstance(worse, str):
            out.add(i, fault=better if isinstance(better, str) else worse)
            continue
        (prompt, answer), (_, other) = one_turn(better, template), one_turn(worse, template)
        longest = max(len(answer), len(other))
        source, target = infer_seqlen(len(prompt), longest, rules.cutoff_len)
        cut = source < len(prompt) or target < longest
        prompt, answer, other = prompt[:source], answer[:target], other[:target]
        if cut and rules.overlong == "drop":
            out.add(i, fault=too_long(rules.cutoff_len))
        elif not answer or not other:
            out.add(i, fault=NOTHING_TO_LEARN, cut=cut)
        else:
            values: dict[str, list[int]] = {}
            values["chosen_input_ids"], values["chosen_labels"] = learned_after(prompt, answer)
            values["rejected_input_ids"], values["rejected_labels"] = learned_after(prompt, other)
            out.add(i, values, cut=cut)
    return out.table()


def encode_feedback(batch: Aligned, *, template: Template, rules: Rules) -> pa.Table:
    """Answers that are good or not, each with its prompt; and for KTO's estimate of the KL divergence, each prompt with
    the answer of the row before it, in its batch (the first with that of the last).
    """
    how = rendering(template, "feedback")
    kept = [i for i, fault in enumerate(batch["fault"]) if not fault]
    before = {i: batch["messages"][kept[k - 1]][-1] for k, i in enumerate(kept)}
    own = tokenised(render_rows(batch, template, how), template)
    others = tokenised(render_rows(batch, template, how, [before.get(i) for i in range(len(own))]), template)
    out = Rows(batch, FEEDBACK)
    for i, (turns, other) in enumerate(zip(own, others)):
        if isinstance(turns, str) or isinstance(other, str):
            out.add(i, fault=turns if isinstance(turns, str) else other)
            continue
        values: dict[str, list[int]] = {}
        cut = False
        for prefix, pair in (("", turns), ("kl_", other)):
            prompt, answer = one_turn(pair, template)
            source, target = infer_seqlen(len(prompt), len(answer), rules.cutoff_len)
            cut |= not prefix and (source < len(prompt) or target < len(answer))
            ids, labels = learned_after(prompt[:source], answer[:target])
            values |= {f"{prefix}input_ids": ids, f"{prefix}labels": labels}
        if cut and rules.overlong == "drop":
            out.add(i, fault=too_long(rules.cutoff_len))
        elif set(values["labels"][1:]) <= {IGNORED}:
            out.add(i, fault=NOTHING_TO_LEARN, cut=cut)
        else:
            out.add(i, values, cut=cut)
    return out.table()
