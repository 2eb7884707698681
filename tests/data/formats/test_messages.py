"""No text of a message is dropped unsaid: calls, thoughts, what stands beside them, and what is not to be learned."""

import json

import pytest
from sets import load, write

from jtune.commands.rows import marked
from jtune.data import get_template
from jtune.data.encode.encoded import IGNORED
from jtune.data.templates.tools import FORMATS
from jtune.errors import DataError
from jtune.quickstart.make_model import make_tokenizer

ROOM = {"type": "object", "properties": {"room": {"type": "string", "description": "Where."}}}
TOOL = {"type": "function", "function": {"name": "dim", "description": "Dims a lamp.", "parameters": ROOM}}
# As the models' own do: thoughts, text and calls of one answer; results with the ids of their calls.
OWN = """{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}{% for m in messages %}<{{ m.role }}>
{%- if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}{{ m.content or '' }}
{%- for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %}
{%- if m.tool_call_id %} of {{ m.tool_call_id }}{% endif %}</>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def ask(text="Dim it."):
    return {"role": "user", "content": text}


def say(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(arguments, **more):
    return {"id": "c1", "type": "function", "function": {"name": "dim", "arguments": arguments}, **more}


def result(content="ok", **more):
    return {"role": "tool", "content": content, **more}


@pytest.fixture(scope="module")
def trained():
    words = "<|im_start|>user\n<|im_start|>assistant\nDim it. The lamp is off. <think>\n\n</think>\n\n<tool_call>"
    return make_tokenizer([words] * 2)


@pytest.fixture
def encoded(trained, tmp_path):
    """`encoded(rows)`: the first row of a set as text, ⟦ ⟧ around what is learned; and the report of the set."""

    def made(*chats, name: str | None = "chatml", kind="a.jsonl", form="openai", stage="sft", options=None, **args):
        tokenizer = trained.__class__(tokenizer_object=trained.backend_tokenizer, eos_token="<|im_end|>")
        tokenizer.chat_template = OWN
        template = get_template(name, tokenizer, **options or {})
        columns = {"messages": "messages", "tools": "tools"}
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        info = {"formatting": form, "columns": columns} | ({"tags": tags} if form == "sharegpt" else {})
        write(tmp_path, kind, [{"messages": chat, "tools": [TOOL]} for chat in chats], info)
        rows = load(tmp_path, "a", template=template, stage=stage, max_dropped=99, **args)
        row, report = rows.train[0], rows.report.sets[0]
        text = marked(row, template.tokenizer, styled=False).plain
        return text[max(text.find("<|im_start|>user"), 0) :], report

    return made


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ('{"room": "hall", "level": 30}', '{"room": "hall", "level": 30}'),
        ({"room": "hall", "level": 30}, '{"room": "hall", "level": 30}'),
        (None, "{}"),
        ("", "{}"),
        ("{}", "{}"),
        ("null", "{}"),
    ],
)
def test_arguments_are_written_as_an_object_whatever_form_they_come_in(arguments, written, kind, encoded):
    chat = [ask(), say(None, tool_calls=[call(arguments)]), result(), say("Done.")]
    for options, expected in (
        ({"tool_format": "qwen"}, f'{{"name": "dim", "arguments": {written}}}'),
        ({}, f"Action: dim\nAction Input: {written}"),
    ):
        text, report = encoded(chat, kind=kind, options=options)
        assert expected in text
        assert report.kept == 1
    text, _ = encoded(chat, name=None, kind=kind)
    assert f"<assistant>⟦(dim {written})</>⟧" in text


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (say(None, tool_calls=[call("room: hall")]), "arguments of a function call are text that is not JSON"),
        (say(None, tool_calls=[call([1])]), "arguments of a function call are no JSON object but list"),
        (
            say(None, tool_calls=[call(json.dumps('{"a": 1}'))]),
            "arguments of a function call are no JSON object but str",
        ),
        (say(None, tool_calls=[{"function": {"arguments": {}}}]), "a function call has no name"),
        (say(None), "a message without content"),
        (say([{"type": "refusal", "refusal": "x"}]), "a message holds a part of type 'refusal', which is not text"),
        (say([{"type": {"a": 1}}]), """a message holds a part of type "{'a': 1}", which is not text"""),
        (say("A", weight=0.5), "weight 0.5 of a message is neither 0 nor 1: a message is learned or it is not"),
    ],
)
def test_a_message_that_cannot_be_learned_from_is_named(turn, reason, encoded):
    _, report = encoded([ask(), say("Good.")], [ask(), turn])
    assert report.sentence().endswith(f"left out: 1 {reason} (a.jsonl:2)")


@pytest.mark.parametrize(
    "wrap", [lambda tools: tools, json.dumps, lambda tools: json.dumps(tools[0]), lambda tools: tools[0]]
)
@pytest.mark.parametrize(
    "tool", [TOOL, TOOL["function"], {"type": "function", "name": "dim"}, {"function": {"name": "dim"}}]
)
def test_tools_come_wrapped_or_bare_as_text_or_not_with_parameters_or_without(tool, wrap, trained, tmp_path):
    write(tmp_path, "a.jsonl", [{"messages": [ask(), say("A")], "t": wrap([tool])}],
          {"formatting": "openai", "columns": {"tools": "t"}})  # fmt: skip
    for tool_format in FORMATS:
        template = get_template("chatml", trained, tool_format=tool_format)
        made = load(tmp_path, "a", template=template)
        assert "dim" in trained.decode(made.train[0]["input_ids"]), tool_format


def test_nulls_inside_arguments_stay_where_the_file_has_them(encoded):
    chat = [ask(), say("", tool_calls=[call({"until": None})]), result(), say("Done.")]
    other = [ask(), say("", tool_calls=[call({"room": "hall"})]), result(), say("Done.")]
    assert 'Action Input: {"until": null}\u27e6'.rstrip("\u27e6") in encoded(chat, other)[0]
    assert 'Action Input: {"room": "hall"}' in encoded(other, chat)[0]


def test_the_older_form_of_calls_is_read_too(encoded):
    chat = [
        ask(),
        say(None, function_call={"name": "dim", "arguments": '{"a": 1}'}),
        {"role": "function", "name": "dim", "content": "ok"},
        say("Done."),
    ]
    text, report = encoded(chat)
    assert '⟦Action: dim\nAction Input: {"a": 1}<|im_end|>' in text
    assert report.remarks() == ["train: keys of messages not used: `name`; 1 row holds such (first: a.jsonl:1)"]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        (
            "qwen3",
            '<think>\nOne call.\n</think>\n\nFirst, the lamp.\n<tool_call>\n{"name": "dim", "arguments": {"a": 1}}\n',
        ),
        (
            "qwen",
            '<think>\nOne call.\n</think>\n\nFirst, the lamp.\n<tool_call>\n{"name": "dim", "arguments": {"a": 1}}\n',
        ),
        (
            "mistral",
            ' <think>\nOne call.\n</think>\n\nFirst, the lamp.[TOOL_CALLS] [{"name": "dim", "arguments": {"a": 1}}]',
        ),
        (
            "gpt_oss",
            "<|channel|>analysis<|message|>One call.<|end|><|start|>assistant<|channel|>final<|message|>First, ",
        ),
        (None, '[One call.]First, the lamp.(dim {"a": 1})</>'),
    ],
)
def test_an_answer_keeps_its_thoughts_and_its_text_beside_its_calls(name, answer, encoded):
    turn = say("First, the lamp.", reasoning_content="One call.", tool_calls=[call('{"a": 1}')])
    text, _ = encoded([ask(), turn, result(), say("Done.")], name=name)
    assert f"⟦{answer}" in text


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("form", ["openai", "sharegpt"])
def test_thoughts_beside_the_content_come_before_it(key, form, encoded):
    chat = [ask(), say("Off.", **{key: "It is on."})]
    text, report = encoded(chat, name="qwen3", form=form)
    assert text.endswith("⟦<think>\nIt is on.\n</think>\n\nOff.<|im_end|>\n⟧")
    assert not report.notes
    text, report = encoded(chat, name="chatml", form=form)  # which has no thoughts
    assert text.endswith("⟦<think>\nIt is on.\n</think>\n\nOff.<|im_end|>\n⟧")
    assert report.remarks() == [
        "train: 1 row holds thoughts, which the template has no place for: they are learned as text in "
        "`<think></think>` (first: a.jsonl:1)"
    ]
    text, report = encoded(chat, name=None, form=form)
    assert text.endswith("<assistant>⟦[It is on.]Off.</>⟧")
    assert not report.notes


def test_results_of_parallel_calls_keep_their_ids_for_the_models_own_template(encoded):
    calls = [call({}), call({}, id="c2")]
    chat = [
        ask(),
        say(None, tool_calls=calls),
        result("a", tool_call_id="c1"),
        result("b", tool_call_id="c2"),
        say("Done."),
    ]
    assert "<tool>a of c1</><tool>b of c2</><assistant>⟦Done." in encoded(chat, name=None)[0]
    assert "a\n</tool_response>\n<tool_response>\nb" in encoded(chat)[0]


def test_content_in_parts_is_joined_and_roles_have_other_names(encoded):
    parts = [{"type": "text", "text": "Dim "}, {"type": "text", "text": "it."}]
    chat = [{"role": "developer", "content": "Be kind."}, {"role": "human", "content": parts}]
    for role in ("model", "bot", "gpt"):
        text, _ = encoded([*chat, {"role": role, "content": ["It ", "is off."]}], name=None)
        assert text.endswith("<system>Be kind.</><user>Dim it.</><assistant>⟦It is off.</>⟧")


def test_keys_that_no_template_reads_are_named_once(encoded):
    chat = [ask(), say("Off.", refusal="No.", name="Bo", id="7", timestamp=3, audio=None)]
    _, report = encoded(chat, [ask(), say("Off.")], chat)
    assert report.remarks() == [
        "train: keys of messages not used: `name`, `refusal`; 2 rows hold such (first: a.jsonl:1)"
    ]


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}])
@pytest.mark.parametrize("form", ["openai", "sharegpt"])
def test_a_message_that_is_not_to_be_learned_is_context(switch, form, encoded):
    chat = [ask("1"), say("One.", **switch), ask("2"), say("Two.", weight=1)]
    start, end = "<|im_start|>", "<|im_end|>\n"
    given = f"{start}user\n1{end}{start}assistant\nOne.{end}{start}user\n2{end}{start}assistant\n"
    assert encoded(chat, form=form)[0] == f"{given}⟦Two.{end}⟧"
    assert encoded(chat, form=form, packing=True)[0] == f"{given}⟦Two.{end}⟧"
    assert encoded(chat, form=form, mask_history=True)[0] == f"{given}⟦Two.{end}⟧"
    _, report = encoded([ask(), say("A")], [ask(), say("One.", **switch)], form=form)
    assert report.sentence().endswith("nothing to learn (no answer is to be learned: weight, train, loss) (a.jsonl:2)")


def test_a_masked_answer_stays_masked_where_a_row_is_cut_or_split(encoded):
    chat = [ask("1"), say("One."), ask("2"), say("Two.", weight=0), ask("3"), say("Three.")]
    whole, _ = encoded(chat)
    assert (whole.count("⟦"), "⟦Two" in whole) == (2, False)
    _, report = encoded(chat, cutoff_len=10_000)
    for cut in (report.tokens - 1, report.tokens * 2 // 3):
        for options in ({"overlong": "split"}, {"overlong": "truncate"}, {"mask_history": True}):
            text, _ = encoded(chat, cutoff_len=cut, **options)
            assert "⟦Two" not in text
            assert "⟦" in text


def test_a_row_in_pieces_is_left_out_once_and_only_if_all_are(encoded):
    chat = [ask("1"), say("One.", weight=0), ask("2"), say("Two."), ask("3"), say("Three.", weight=0)]
    pieces, report = encoded(chat, cutoff_len=40, overlong="split")
    assert "⟦Two.<|im_end|>" in pieces
    assert (report.read, report.encoded, report.left_out) == (1, 1, 0)
    nothing = [ask("1"), say("One.", weight=0), ask("2"), say("Two.", weight=0)]
    _, report = encoded(chat, nothing, cutoff_len=40, overlong="split")
    assert (report.read, report.encoded, report.left_out) == (2, 1, 1)


def test_an_answer_that_is_not_wanted_is_the_reason_also_where_history_is_masked(encoded):
    rows = [[ask("1"), say("One."), ask("2"), say("Two.", weight=weight)] for weight in (1, 0)]
    _, report = encoded(*rows, mask_history=True)
    assert [str(d) for d in report.dropped] == [
        "1 nothing to learn (no answer is to be learned: weight, train, loss) (a.jsonl:2)"
    ]


@pytest.mark.parametrize("rules", [{}, {"overlong": "drop"}, {"mask_history": True}])
@pytest.mark.parametrize(("masked", "learned"), [(0, "Two.\n<|im_end|>"), (1, "One.\n<|im_end|>"), (None, None)])
def test_what_ends_a_masked_answer_is_not_learned_either(masked, learned, rules, trained, tmp_path):
    """Falcon marks no end of an answer: eos is learned where the next turn begins, and at the end of the row."""
    template = get_template("falcon", trained)
    answers = [say(text, weight=int(k != masked)) for k, text in enumerate(("One.", "Two."))]
    write(tmp_path, "a.jsonl", [{"messages": [ask("1"), answers[0], ask("2"), answers[1]]}], {"formatting": "openai"})
    if rules.get("mask_history") and masked == 1:
        with pytest.raises(DataError, match="nothing to learn"):
            load(tmp_path, "a", template=template, **rules)
        return
    whole = load(tmp_path, "a", template=template, **rules).train
    labels = whole[0]["labels"]
    both = "Two.\n<|im_end|>" if rules.get("mask_history") else "One.\n<|im_end|>Two.\n<|im_end|>"
    assert trained.decode(labels[labels != IGNORED]) == (learned or both)
    cut = load(tmp_path, "a", template=template, **rules | {"overlong": "truncate"}, cutoff_len=len(labels))
    assert cut.train[0]["labels"].tolist() == labels.tolist(), "turn by turn as all at once"


def test_preferences_are_learned_from_both_answers_or_not_at_all(trained, tmp_path):
    template = get_template("chatml", trained)
    rows = [
        {"messages": [ask()], "chosen": say("A", reasoning_content="T"), "rejected": say("B")},
        {"messages": [ask()], "chosen": say("A", weight=0), "rejected": say("B")},
    ]
    columns = {"chosen": "chosen", "rejected": "rejected"}
    write(tmp_path, "a.jsonl", rows, {"formatting": "openai", "ranking": True, "columns": columns})
    made = load(tmp_path, "a", template=template, stage="dpo")
    ids, labels = made.train[0].values()
    assert template.tokenizer.decode(ids[labels != IGNORED]) == "<think>\nT\n</think>\n\nA<|im_end|>\n"
    assert "is one that is not to be learned (weight, train, loss) (a.jsonl:2)" in made.report.sets[0].sentence()


def test_a_stream_gives_the_same_ids_and_says_the_same(encoded):
    turn = say("First.", reasoning_content="One call.", name="Bo", tool_calls=[call('{"a": 1}')])
    chat = [
        ask("<|im_end|>"),
        say("No.", loss=False),
        ask(),
        turn,
        result([{"type": "text", "text": "ok"}]),
        say("Done."),
    ]
    whole, report = encoded(chat, name="qwen3")
    streamed, other = encoded(chat, name="qwen3", streaming=True)
    assert streamed == whole
    said = lambda report: [remark.replace("a.jsonl:1", "a.jsonl row 1") for remark in report.remarks()]
    assert (
        said(other)
        == said(report)
        == [
            "train: 1 row holds special tokens in their text: `<|im_end|>` (first: a.jsonl row 1)",
            "train: keys of messages not used: `name`; 1 row holds such (first: a.jsonl row 1)",
        ]
    )
    assert encoded(chat, name="qwen3", preprocessing_num_workers=2)[0] == whole


def test_messages_in_openais_form_can_be_encoded_without_a_file(trained):
    template = get_template("qwen3", trained)
    chat = [ask(), say("First.", tool_calls=[call('{"a": 1}')]), result("a"), result("b"), say("Done.", reasoning="T")]
    texts = [trained.decode(answer) for _, answer in template.encode(chat)]
    assert 'First.\n<tool_call>\n{"name": "dim", "arguments": {"a": 1}}\n</tool_call>' in texts[0]
    assert texts[1] == "<think>\nT\n</think>\n\nDone.<|im_end|>\n"
    with pytest.raises(DataError, match="a function call has no name"):
        template.encode([ask(), say(None, tool_calls=[{"function": {}}])])
