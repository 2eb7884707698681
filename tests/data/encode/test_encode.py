"""Token ids and labels: what is learned, what is cut, what is left out."""

import json
from itertools import chain

import datasets
import numpy as np
import pytest

from jtune.commands.data import show_data
from jtune.commands.rows import json_rows, marked
from jtune.config import load_config
from jtune.config.stages import rules_of
from jtune.data import get_template
from jtune.data.encode.encoded import Encoded, check_vocabulary
from jtune.data.encode.pretraining import encode_documents
from jtune.data.encode.rows import encode_rows
from jtune.data.encode.turns import Rules, infer_seqlen
from jtune.data.formats.fields import ALIGNED
from jtune.errors import DataError

CHAT = [("user", "What is 1 + 1?"), ("assistant", "It is 2."), ("user", "And 2 + 2?"), ("assistant", "It is 4.")]


def table(*chats, tools="", rejected=None):
    made = [
        {
            "messages": [{"role": role, "content": content} for role, content in chat],
            "system": "",
            "tools": tools,
            "rejected": rejected and {"role": "assistant", "content": rejected},
            "margin": None,
            "desirable": None,
            "fault": "",
            "dataset": 0,
            "row": row,
        }
        for row, chat in enumerate(chats)
    ]
    return datasets.Dataset.from_list(made, features=ALIGNED)


def encode(template, *chats, **options):
    rules = {"cutoff_len": 1000, "mask_history": False, "train_on_prompt": False} | options
    return Encoded(encode_rows(table(*chats), template, rules_of("sft"), Rules(**rules)))


def learned(template, row):
    return template.tokenizer.decode([t for t, label in zip(row["input_ids"], row["labels"]) if label != -100])


def label_turns(
    turns,
    *,
    cutoff_len,
    eos_id,
    efficient_eos=False,
    mask_history=False,
    train_on_prompt=False,
    wanted=None,
):
    """LLaMA-Factory's loop over the turns of one conversation: ids, labels, and whether anything is cut."""
    parts = []
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
        learned = target if answered and (not mask_history or k == 0) else [-100] * len(target)
        given = source if train_on_prompt and asked else [-100] * len(source)
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
    return [*ids, eos_id], [*labels, eos_id if ends_wanted else -100], cut


def test_answers_are_learned_and_prompts_are_not(template):
    encoded = encode(template, CHAT)
    assert learned(template, encoded[0]) == "It is 2.<|im_end|>\nIt is 4.<|im_end|>\n"
    row = encoded[0]
    assert ((row["labels"] == -100) | (row["labels"] == row["input_ids"])).all()
    assert row["input_ids"].dtype == row["labels"].dtype == np.int32
    assert encoded.lengths.tolist() == [len(row["input_ids"])]
    assert encoded.labelled.tolist() == [int((row["labels"][1:] != -100).sum())]
    assert encoded.first_labelled.tolist() == [0]


def test_mask_history_and_train_on_prompt(template):
    assert learned(template, encode(template, CHAT, mask_history=True)[0]) == "It is 4.<|im_end|>\n"
    encoded = encode(template, CHAT, train_on_prompt=True)
    assert (encoded[0]["labels"] == encoded[0]["input_ids"]).all()
    assert encoded.first_labelled.tolist() == [1]
    assert encoded.labelled[0] == encoded.lengths[0] - 1


@pytest.mark.parametrize("cutoff", [3, 10, 17, 30])
def test_a_row_is_cut_to_cutoff_len_from_both_sides_of_a_turn(cutoff, template):
    whole, cut = encode(template, CHAT), encode(template, CHAT, cutoff_len=cutoff)
    assert cut.lengths[0] <= cutoff < whole.lengths[0]
    assert cut.table["cut"][0]


@pytest.mark.parametrize("rules", [{}, {"mask_history": True}, {"train_on_prompt": True}])
@pytest.mark.parametrize("name", ["chatml", "falcon"])
def test_rows_encoded_together_are_what_each_is_by_itself(name, rules, template):
    """All rows of a batch are labelled at once; only those that may have to be cut go turn by turn."""
    template = get_template(name, template.tokenizer)
    if template.efficient_eos and rules.get("train_on_prompt"):
        pytest.skip("refused")
    random = np.random.default_rng(1)
    text = lambda: "x" * int(random.integers(0, 9))
    chats = [[(("user", "assistant")[k % 2], text()) for k in range(2 * int(random.integers(1, 5)))] for _ in range(40)]
    chats[3:3] = [[("user", "no answer")], [("user", ""), ("assistant", "")]]  # one fault, one that is nearly nothing
    for cutoff in (20, 60, 200):
        encoded = encode_rows(table(*chats), template, rules_of("sft"), Rules(cutoff, **rules))
        assert encoded["fault"][3].startswith("1 messages")
        for i, chat in enumerate(chats):
            if i == 3:
                continue
            turns = template.encode([{"role": role, "content": content} for role, content in chat])
            ids, labels, cut = label_turns(
                turns, cutoff_len=cutoff, eos_id=template.eos_id, efficient_eos=template.efficient_eos, **rules
            )
            kept = any(label != -100 for label in labels[1:])
            found = encoded[i]
            assert (found["input_ids"], found["labels"], found["cut"]) == (
                (ids, labels, cut) if kept else ([], [], cut)
            )
            assert bool(found["fault"]) != kept


def test_documents_are_joined_by_eos_and_cut_into_blocks(template):
    texts = [[("user", f"Document {n} says this.")] for n in range(12)]
    joined = Encoded(encode_documents(table(*texts), template, cutoff_len=16, packing=True, neat_packing=False))
    assert set(joined.lengths.tolist()) == {16}
    text = template.tokenizer.decode(np.concatenate([joined[i]["input_ids"] for i in range(len(joined))]))
    assert text.startswith("Document 0 says this.<|im_end|>Document 1 says this.<|im_end|>")
    assert (joined.labelled == 15).all()
    assert (joined.first_labelled == 1).all()
    neat = Encoded(encode_documents(table(*texts), template, cutoff_len=5, packing=True, neat_packing=True))
    alone = encode_documents(table(*texts), template, cutoff_len=1000, packing=False, neat_packing=False)
    assert len(alone) == 12
    assert neat.lengths.max() == 5
    assert neat.lengths.sum() == Encoded(alone).lengths.sum()


def test_rows_are_encoded_once(template, monkeypatch, tmp_path):
    table(CHAT).save_to_disk(tmp_path)
    rules = {"cutoff_len": 1000, "mask_history": False, "train_on_prompt": False}
    again = lambda: Encoded(encode_rows(datasets.load_from_disk(tmp_path), template, rules_of("sft"), Rules(**rules)))
    first = again()
    monkeypatch.setattr("jtune.data.templates.template.Template.tokenise", lambda *_: pytest.fail("encoded again"))
    np.testing.assert_array_equal(again()[0]["input_ids"], first[0]["input_ids"])


def test_ids_outside_the_vocabulary_are_refused(template):
    encoded = encode(template, CHAT)
    check_vocabulary(encoded, len(template.tokenizer))
    with pytest.raises(DataError, match="vocabulary of 10"):
        check_vocabulary(encoded, 10)


def test_an_index_outside_is_an_error(template):
    encoded = encode(template, CHAT, CHAT[:2])
    assert len(encoded) == 2
    assert len(encoded[-1]["input_ids"]) < len(encoded[0]["input_ids"])
    with pytest.raises(IndexError):
        encoded[2]


def test_a_preview_is_json_for_programs_and_marks_what_is_learned_for_people(template, tmp_path, capsys):
    encoded = encode(template, CHAT)
    line = json.loads(next(json_rows(encoded, 5)))
    assert line.keys() == {"input_ids", "labels"}
    assert line["input_ids"] == encoded[0]["input_ids"].tolist()
    assert "\u27e6It is 2.<|im_end|>\n\u27e7" in marked(encoded[0], template.tokenizer, styled=False).plain
    template.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "Q", "output": "A"}] * 3))
    words = [f"model_name_or_path={tmp_path}", "template=chatml", f"dataset={tmp_path}/rows.json", "stage=sft"]
    config = load_config(words, command="data")
    assert show_data(config, rows=1) == 0
    said = capsys.readouterr().out
    assert "row 1 of 3" in said
    assert "3 rows" in said
    assert show_data(config, rows=2, as_json=True) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
