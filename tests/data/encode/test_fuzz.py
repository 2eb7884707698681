"""Whatever the rows hold, each is learned from or left out for a reason, and only what an assistant says is learned.

Assistants speak in capitals and nobody else does, so that a wrong mask shows.
"""

import datasets
import numpy as np
import pytest

from jtune.config.stages import rules_of
from jtune.data.batching.pack import pack
from jtune.data.encode.encoded import IGNORED, Encoded
from jtune.data.encode.rows import encode_rows
from jtune.data.encode.turns import Rules
from jtune.data.formats.align import FaultyRow, align_row
from jtune.data.formats.fields import ALIGNED
from jtune.data.sources.registry import OPENAI_TAGS, Columns, Entry

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

LOW = st.text("ab {}:[]\n<|>", max_size=12) | st.sampled_from(
    ["{{content}}", "<|im_end|>\n", "<|im_start|>assistant\n"]
)
HIGH = st.text("AB \n", min_size=1, max_size=12)
JUNK = st.none() | st.integers() | st.lists(st.integers(), max_size=2)
CALL = st.sampled_from(['{"name": "F", "arguments": {}}', '{"name": "F"}', "F(", "[]", '{"name": "F", "arguments": 3}'])
SAID = {"human": LOW, "gpt": HIGH, "observation": LOW, "function_call": CALL, "system": LOW, "robot": LOW}


def turn(role):
    return st.fixed_dictionaries({"from": st.just(role), "value": st.one_of(SAID[role], SAID[role], SAID[role], JUNK)})


def good(turns):
    return st.lists(st.tuples(turn("human"), turn("gpt")), min_size=1, max_size=turns).map(
        lambda x: [t for p in x for t in p]
    )


any_turns = st.lists(st.sampled_from(sorted(SAID)).flatmap(turn), max_size=5)
SHAREGPT = st.fixed_dictionaries(
    {"conversations": good(3) | any_turns | JUNK},
    optional={"system": LOW | JUNK, "tools": st.sampled_from(["", "[]", "{", '[{"name": "f"}]', "3", None])},
)
ALPACA = st.fixed_dictionaries(
    {},
    optional={
        "instruction": LOW | JUNK,
        "input": LOW | JUNK,
        "output": HIGH | HIGH | JUNK,
        "history": JUNK | st.lists(st.tuples(LOW, HIGH), max_size=2),
    },
)
CHOSEN = st.fixed_dictionaries({"prompt": LOW, "chosen": HIGH | JUNK, "rejected": HIGH | JUNK})
ENTRIES = {
    "sharegpt": Entry("s", "file", "s.json", "sharegpt", columns=Columns(system="system", tools="tools")),
    "alpaca": Entry("a", "file", "a.json", "alpaca", columns=Columns(history="history")),
    "openai": Entry("o", "file", "o.json", "openai", columns=Columns(messages="messages"), tags=OPENAI_TAGS),
    "pairs": Entry(
        "p",
        "file",
        "p.json",
        "alpaca",
        True,
        columns=Columns("prompt", None, None, chosen="chosen", rejected="rejected"),
    ),
}
OPENAI_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "function"}


def openai(row):
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return {"messages": turns}
    return {"messages": [{"role": OPENAI_ROLES.get(t["from"], t["from"]), "content": t["value"]} for t in turns]}


ROWS = {"sharegpt": SHAREGPT, "alpaca": ALPACA, "openai": SHAREGPT.map(openai), "pairs": CHOSEN}


def aligned(rows, entry):
    made = []
    for number, row in enumerate(rows):
        said = {
            "messages": [],
            "system": "",
            "tools": "",
            "rejected": None,
            "margin": None,
            "desirable": None,
            "fault": "",
        }
        try:
            said |= align_row(row, entry)._asdict()
        except FaultyRow as fault:
            said["fault"] = str(fault)
        made.append(said | {"dataset": 0, "row": number})
    return datasets.Dataset.from_list(made, features=ALIGNED)


@hypothesis.settings(max_examples=120, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_a_row_is_learned_from_or_left_out_and_only_answers_are_learned(data, template):
    kind = data.draw(st.sampled_from(sorted(ROWS)))
    rows = data.draw(st.lists(ROWS[kind], min_size=1, max_size=4))
    rules = Rules(
        data.draw(st.sampled_from([4, 12, 40, 1000])),
        mask_history=data.draw(st.booleans()),
        overlong=data.draw(st.sampled_from(["truncate", "drop", "split"])) if kind != "pairs" else "truncate",
    )
    made = encode_rows(aligned(rows, ENTRIES[kind]), template, rules_of("dpo" if kind == "pairs" else "sft"), rules)
    kept = np.flatnonzero([not fault for fault in made["fault"][:]])
    assert set(made["row"][:]) == set(range(len(rows)))
    sides = ("chosen_", "rejected_") if kind == "pairs" else ("",)
    for encoded in (Encoded(made, kept, side) for side in sides):
        for i in range(len(encoded)):
            ids, labels = encoded[i]["input_ids"], encoded[i]["labels"]
            assert 0 < len(ids) == len(labels) <= rules.cutoff_len
            learned = ids[labels != IGNORED]
            assert (learned == labels[labels != IGNORED]).all()
            said = template.tokenizer.decode(learned, skip_special_tokens=True)
            assert not any(
                character.islower()
                for character in said.replace("name", "")
                .replace("arguments", "")
                .replace("Action Input", "")
                .replace("Action", "")
            ), said
        if len(encoded):
            packs = pack(encoded.lengths, rules.cutoff_len)
            assert sorted(packs.examples) == list(range(len(encoded)))
            assert packs.sums(encoded.lengths).max() <= rules.cutoff_len
