"""Conversations and documents as token ids and labels, kept in Arrow tables on disk.

The rules are LLaMA-Factory's, except:
  - with mask_history and a template of efficient_eos, the eos that ends an earlier answer is not learned;
    LLaMA-Factory learns it;
  - in stage pt every eos is learned; LLaMA-Factory learns none if the tokenizer has no pad token of its own;
  - rows without anything to learn are left out; in LLaMA-Factory they take part in a batch with nothing;
  - stage pt with neat_packing: a row for each document, long ones in pieces of cutoff_len; LLaMA-Factory refuses it.
"""

import logging
from functools import partial

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from jtune.config.stages import StageRules
from jtune.data.cache.fingerprint import fingerprint
from jtune.data.cache.shards import UNSHARED, Sharing, make_in_shards
from jtune.data.encode.arrow import aligned_columns, encode_slice
from jtune.data.encode.preference import FEEDBACK, encode_feedback, encode_pairs, pair_features
from jtune.data.encode.supervised import CONVERSATIONS, encode_conversations, encode_last_answers
from jtune.data.encode.turns import Rules
from jtune.data.templates.template import Template
from jtune.data.templates.tools import WHOLE
from jtune.errors import DataError

log = logging.getLogger("jtune")


def encode_rows(
    table: datasets.Dataset,
    template: Template,
    stage: StageRules,
    rules: Rules,
    sharing: Sharing = UNSHARED,
) -> datasets.Dataset:
    """Ids and labels of aligned rows: a row for each, empty where `fault` says why it is left out.

    Args:
      stage: by its rows, the columns: of conversations, `CONVERSATIONS`; of prompts the same, but only the last answer
        is labelled, and all of it; of pairs, `pair_features`; of feedback, `FEEDBACK`.

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
        "conversation": (encode_conversations, CONVERSATIONS),
        "prompt": (encode_last_answers, CONVERSATIONS),
        "feedback": (encode_feedback, FEEDBACK, "desirable"),
        "pair": (encode_pairs, pair_features(rules.margins), "rejected", "margin"),
    }[stage.rows]
    read = aligned_columns(table, "messages", "system", "tools", "fault", "dataset", "row", *more)
    # With kto, an answer is also set against the next question of its batch: rows depend on how they are batched.
    return make_in_shards(
        partial(encode_slice, read, encode, template=template, rules=rules),
        table,
        features,
        sharing,
        name=fingerprint(table, stage.rows, (rules, template.key, told_the_day)),
        what="Encoding",
        batched_for=sharing.num_proc or 1 if stage.rows == "feedback" else 1,
    )
