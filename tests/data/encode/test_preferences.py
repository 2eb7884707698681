"""Pairs of answers, and answers that are good or not: aligned and encoded for stages rm, dpo and kto."""

import pytest
from sets import load, write

from jtune.commands.data import check_rows, show_data
from jtune.config import load_config
from jtune.data import get_template
from jtune.errors import DataError

ALPACA = [{"instruction": "Say a.", "input": "Now.", "chosen": "A!", "rejected": "B, I think."}] * 3
SHAREGPT = [
    {
        "conversations": [{"from": "human", "value": "Say a.\nNow."}],
        "chosen": {"from": "gpt", "value": "A!"},
        "rejected": {"from": "gpt", "value": "B, I think."},
    }
] * 3
OPENAI = [
    {
        "messages": [{"role": "user", "content": "Say a.\nNow."}],
        "chosen": {"role": "assistant", "content": "A!"},
        "rejected": {"role": "assistant", "content": "B, I think."},
    }
] * 3
SIDES = {"chosen": "chosen", "rejected": "rejected"}


def decode(template, ids):
    return template.tokenizer.decode(ids)


@pytest.mark.parametrize("stage", ["rm", "dpo"])
@pytest.mark.parametrize(("form", "rows"), [("alpaca", ALPACA), ("sharegpt", SHAREGPT), ("openai", OPENAI)])
def test_pairs_of_every_form_share_their_prompt(form, rows, stage, template, tmp_path):
    columns = SIDES | ({"prompt": "instruction", "query": "input"} if form == "alpaca" else {})
    write(tmp_path, "a.json", rows, {"formatting": form, "ranking": True, "columns": columns})
    chosen = load(tmp_path, "a", template=template, stage=stage).train
    for side, answer in ((chosen, "A!"), (chosen.rejected, "B, I think.")):
        row = side[1]
        learned = row["labels"] != -100
        assert decode(template, row["input_ids"][learned]) == f"{answer}<|im_end|>\n"
        assert decode(template, row["input_ids"][~learned]).endswith("Say a.\nNow.<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_a_pair_may_say_by_how_much_its_answer_is_better(suffix, template, tmp_path):
    rows = [row | {"better": margin} for row, margin in zip(ALPACA, (0.5, None, 2))]
    info = {"ranking": True, "columns": SIDES | {"prompt": "instruction"}}
    write(tmp_path, f"a.{suffix}", rows, info | {"columns": info["columns"] | {"margin": "better"}})
    write(tmp_path, "b.json", ALPACA, info)
    made = load(tmp_path, "a", "b", template=template, stage="rm").train
    assert made.rows["margin"][:] == [0.5, 0, 2, 0, 0, 0]
    without = load(tmp_path, "b", template=template, stage="rm").train
    assert made.rows.column_names == [*without.rows.column_names, "margin"]
    assert made.rows[3].items() >= without.rows[0].items()
    write(tmp_path, f"a.{suffix}", rows[::-1], info | {"columns": info["columns"] | {"margin": "better"}})
    assert load(tmp_path, "a", template=template, stage="rm").train.rows["margin"][:] == [2, 0, 0.5]


def test_a_margin_is_a_number_and_of_pairs(template, tmp_path):
    rows = [row | {"better": margin} for row, margin in zip(ALPACA, (0.5, "much", "inf"))]
    columns = SIDES | {"prompt": "instruction", "margin": "better"}
    write(tmp_path, "a.json", rows, {"ranking": True, "columns": columns})
    splits = load(tmp_path, "a", template=template, stage="dpo", max_dropped=2)
    assert [str(dropped) for dropped in splits.report.sets[0].dropped] == [
        "2 better is not a number (a.json row 2, a.json row 3)"
    ]
    for info, message in (
        ({"columns": columns}, """only pairs have a margin: set "ranking": true, or leave it out"""),
        ({"ranking": True, "columns": columns | {"margin": "beter"}}, """"columns": {"margin": "better"}"""),
    ):
        write(tmp_path, "a.json", rows, info)
        with pytest.raises(DataError) as error:
            load(tmp_path, "a", template=template, stage="dpo")
        assert message in str(error.value)


def test_the_longer_answer_says_how_much_is_cut(template, tmp_path):
    write(tmp_path, "a.json", ALPACA, {"ranking": True, "columns": SIDES | {"prompt": "instruction"}})
    chosen = load(tmp_path, "a", template=template, stage="dpo", cutoff_len=12).train
    prompts = [side[0]["input_ids"][side[0]["labels"] == -100].tolist() for side in (chosen, chosen.rejected)]
    assert prompts[0] == prompts[1]
    assert chosen.rejected.lengths[0] == 12
    assert chosen.lengths[0] < 12


def test_feedback_comes_with_the_answer_of_the_row_before(template, tmp_path):
    rows = [{"instruction": f"Q{i}", "output": f"A{i}", "good": i % 2 == 0} for i in range(3)]
    write(tmp_path, "a.json", rows, {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"}})
    made = load(tmp_path, "a", template=template, stage="kto").train.rows
    assert made["kto_tags"][:] == [True, False, True]
    for i, row in enumerate(made):
        assert [label for label in row["labels"] if label != -100] == template.tokenizer(f"A{i}<|im_end|>\n")[
            "input_ids"
        ]
        assert f"Q{i}" in decode(template, row["kl_input_ids"])
        assert f"A{(i - 1) % 3}" in decode(template, row["kl_input_ids"])


def test_thoughts_of_earlier_answers_are_taken_out_and_none_is_added(template, tmp_path):
    turn = lambda role, text: {"from": role, "value": text}
    rows = [
        {
            "conversations": [turn("human", "a"), turn("gpt", "<think>\nhm\n</think>\n\nb"), turn("human", "c")],
            "chosen": turn("gpt", "d"),
            "rejected": turn("gpt", "e"),
        }
    ]
    write(tmp_path, "a.json", rows, {"formatting": "sharegpt", "ranking": True, "columns": SIDES})
    thinking = get_template("qwen3", template.tokenizer)
    row = load(tmp_path, "a", template=thinking, stage="dpo").train[0]
    text = decode(template, row["input_ids"])
    assert "hm" not in text
    assert text.count("<think>") == 1
    assert decode(template, row["input_ids"][row["labels"] != -100]).startswith("<think>\n\n</think>\n\nd")


@pytest.mark.parametrize(
    ("stage", "info", "message"),
    [
        (
            "sft",
            {"ranking": True, "columns": SIDES},
            "holds preferences (ranking): it is for stage rm and dpo, not sft",
        ),
        (
            "kto",
            {"ranking": True, "columns": SIDES},
            "holds preferences (ranking): it is for stage rm and dpo, not kto",
        ),
        ("dpo", {}, """holds no preferences, and stage dpo learns from them: "ranking": true"""),
        ("dpo", {"ranking": True}, "no column 'chosen' for the chosen"),
        ("sft", {"columns": {"kto_tag": "good"}}, "holds preferences (kto_tag): it is for stage kto, not sft"),
        ("kto", {"columns": {"kto_tag": "chosen"}}, "3 chosen is neither true nor false"),
    ],
)
def test_a_set_for_another_stage_is_refused(stage, info, message, template, tmp_path):
    rows = [row | {"output": "A", "good": True} for row in ALPACA]
    write(
        tmp_path,
        "a.json",
        rows if message.startswith("3") or stage != "dpo" else [{"instruction": "a", "output": "b"}],
        info,
    )
    with pytest.raises(DataError) as error:
        load(tmp_path, "a", template=template, stage=stage)
    assert message in str(error.value)


# ---------------------------------------------------------------------- answers that teach little

LONG = " b" * 30
POOR = [
    {"instruction": "q", "chosen": "a", "rejected": "b"},
    {"instruction": "q", "chosen": "a", "rejected": "a"},
    {"instruction": "q", "chosen": LONG + " a", "rejected": LONG + " c"},
    {"instruction": "q", "chosen": LONG, "rejected": LONG},
    {"instruction": "q", "chosen": "a", "rejected": " "},
    {"instruction": "q", "chosen": LONG + " a", "rejected": "c"},
    {"instruction": None, "chosen": "a", "rejected": "a"},
]


def check_poor(folder, template, capsys, caplog, stage, *words):
    """The lines of a check, then the warnings of a run."""
    template.tokenizer.save_pretrained(folder / "model")
    given = [f"model_name_or_path={folder / 'model'}", "template=chatml", f"dataset_dir={folder}", "cutoff_len=24"]
    assert check_rows(load_config([*given, "dataset=a", f"stage={stage}", *words], command="data")) == 0
    lines = capsys.readouterr().out.splitlines()
    caplog.clear()
    load(folder, "a", template=template, stage=stage, cutoff_len=24)
    return lines, [record.message for record in caplog.records if record.levelname == "WARNING"][1:]


@pytest.mark.parametrize("words", [[], ["streaming=true", "max_steps=1", "buffer_size=3"]])
def test_a_check_names_pairs_that_teach_little(words, template, tmp_path, capsys, caplog):
    write(tmp_path, "a.jsonl", POOR, {"ranking": True, "columns": SIDES | {"prompt": "instruction"}})
    lines, warnings = check_poor(tmp_path, template, capsys, caplog, "dpo", *words)
    place = "a.jsonl row {}" if words else "a.jsonl:{}"
    assert sorted(lines) == sorted(
        f"{place.format(row)}: {said}"
        for row, said in [
            (2, "the chosen and the rejected answer are the same"),
            (3, "the answers differ only beyond cutoff_len, where they are cut"),
            (3, "longer than cutoff_len, and cut"),
            (4, "the chosen and the rejected answer are the same"),
            (4, "longer than cutoff_len, and cut"),
            (5, "an answer without text"),
            (6, "longer than cutoff_len, and cut"),
            (7, "nothing in column instruction"),
        ]
    )
    assert warnings == [
        "train: 2 rows hold the same answer as chosen and as rejected, which teaches nothing (first: a.jsonl:2)",
        "train: 1 row holds answers that differ only beyond cutoff_len, where they are cut, and so teach nothing "
        "(first: a.jsonl:3)",
        "train: 1 row holds an answer without text, of which only the end is learned (first: a.jsonl:5)",
    ]


def test_a_check_names_feedback_that_teaches_little(template, tmp_path, capsys, caplog):
    rows = [{"instruction": "q", "output": text, "good": True} for text in ("a", "", LONG)]
    rows.append({"instruction": "q", "output": "a", "good": None})
    write(tmp_path, "a.jsonl", rows, {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"}})
    lines, warnings = check_poor(tmp_path, template, capsys, caplog, "kto")
    assert lines == [
        "a.jsonl:4: good is neither true nor false",
        "a.jsonl:2: an answer without text",
        "a.jsonl:3: longer than cutoff_len, and cut",
    ]
    assert warnings == [
        "train: 1 row holds an answer without text, of which only the end is learned (first: a.jsonl:2)"
    ]


def test_of_conversations_nothing_of_the_kind_is_said(template, tmp_path, caplog):
    rows = [{"instruction": "q", "output": text} for text in ("a", "", LONG)]
    write(tmp_path, "a.jsonl", rows)
    report = load(tmp_path, "a", template=template, cutoff_len=24).report.sets[0]
    assert (report.cut, report.notes) == (1, ())


def shown(folder, template, capsys, stage):
    template.tokenizer.save_pretrained(folder / "model")
    words = [f"model_name_or_path={folder / 'model'}", "template=chatml", f"dataset_dir={folder}", "dataset=a"]
    words += ["per_device_train_batch_size=2", "num_train_epochs=2"]
    assert show_data(load_config([*words, f"stage={stage}"], command="data"), rows=1) == 0
    return capsys.readouterr().out


def test_both_answers_of_a_pair_are_shown_with_what_is_trained_on(template, tmp_path, capsys):
    rows = [row | {"better": 1.5} for row in ALPACA]
    info = {"ranking": True, "columns": SIDES | {"prompt": "instruction", "margin": "better"}}
    write(tmp_path, "a.json", rows, info)
    text = shown(tmp_path, template, capsys, "rm")
    assert "row 1 of 3, chosen, margin 1.5: " in text
    assert "row 1 of 3, rejected: " in text
    assert "\u27e6A!<|im_end|>\n\u27e7" in text
    assert "\u27e6B, I think.<|im_end|>\n\u27e7" in text
    assert "\n3 pairs, " in text
    assert "\non one device: 2 steps an epoch, 4 in all; batches [accum x batch x seq] " in text


def test_feedback_is_shown_with_its_tag_and_the_row_of_another_answer(template, tmp_path, capsys):
    rows = [{"instruction": f"Q{i}", "output": f"A{i}", "good": i < 2} for i in range(3)]
    write(tmp_path, "a.json", rows, {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"}})
    text = shown(tmp_path, template, capsys, "kto")
    made = load(tmp_path, "a", template=template, stage="kto").train
    assert f"row 1 of 3, answer, good: {made.lengths[0]} tokens" in text
    assert "row 1 of 3, KL, with the answer of another row (measured, not trained on): " in text
    assert "\u27e6A2<|im_end|>\n\u27e7" in text
    assert f"3 rows, {made.lengths.sum()} tokens, {made.labelled.sum()} of them trained on" in text
    assert "\n2 good answers, 1 bad\nKL: 3 rows, " in text
    assert "\non one device: 2 steps an epoch, 4 in all" in text
