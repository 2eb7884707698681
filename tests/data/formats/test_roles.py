"""What a role is called: what the entry says, else the names that published data has."""

import pytest

from jtune.config.stages import rules_of
from jtune.data.formats.align import align_row
from jtune.data.formats.messages import FaultyRow
from jtune.data.sources.registry import OPENAI_TAGS, Columns, Entry, Tags

OPENAI = Entry("a", "file", "a", "openai", columns=Columns(messages="messages"), tags=OPENAI_TAGS)
SHAREGPT = Entry("a", "file", "a", "sharegpt", columns=Columns(messages="messages"))
CALL = '[{"name": "now", "arguments": {}}]'


def aligned(entry, *turns):
    tags = entry.tags
    chat = [{tags.role_tag: role, tags.content_tag: text, **more} for role, text, more in turns]
    found = align_row({"messages": chat}, entry, rules_of("sft"))
    return found.system, [(message["role"], message["content"]) for message in found.messages]


def turn(role, text, **more):
    return role, text, more


@pytest.mark.parametrize("entry", [OPENAI, SHAREGPT], ids=["openai", "sharegpt"])
@pytest.mark.parametrize(
    ("system", "user", "assistant"),
    [
        ("system", "user", "assistant"),
        ("system", "human", "gpt"),
        ("developer", "prompter", "model"),  # OpenAI's, OASST's and Gemini's
        ("System", "Human", "ChatGPT"),
        ("SYSTEM", "USER", "CHATBOT"),  # Cohere's
    ],
)
def test_published_names_of_roles_are_known(system, user, assistant, entry):
    chat = turn(system, "S"), turn(user, "q"), turn(assistant, "a")
    assert aligned(entry, *chat) == ("S", [("user", "q"), ("assistant", "a")])


@pytest.mark.parametrize("entry", [OPENAI, SHAREGPT], ids=["openai", "sharegpt"])
@pytest.mark.parametrize("call", ["function_call", "function-call", "tool_call", "function"])
@pytest.mark.parametrize("result", ["observation", "tool", "ipython", "function_response", "tool_result", "function"])
def test_published_names_of_calls_and_results_are_known(call, result, entry):
    chat = turn("user", "q"), turn(call, CALL), turn(result, "9:00"), turn("assistant", "a")
    roles = [role for role, _ in aligned(entry, *chat)[1]]
    assert roles == ["user", "function", "observation", "assistant"]


@pytest.mark.parametrize("entry", [OPENAI, SHAREGPT], ids=["openai", "sharegpt"])
def test_two_calls_in_a_row_are_not_a_call_and_its_result(entry):
    with pytest.raises(FaultyRow, match="role out of turn"):
        aligned(entry, turn("user", "q"), turn("function", CALL), turn("function", CALL), turn("assistant", "a"))


def test_what_the_entry_says_comes_first():
    swapped = Entry("a", "file", "a", "sharegpt", columns=Columns(messages="m"), tags=Tags("r", "c", "gpt", "human"))
    found = align_row({"m": [{"r": "gpt", "c": "q"}, {"r": "human", "c": "a"}]}, swapped)
    assert [message["role"] for message in found.messages] == ["user", "assistant"]


@pytest.mark.parametrize(("role", "nearest"), [("asistant", ", nearest to 'assistant'"), ("narrator", ""), (None, "")])
def test_an_unknown_role_names_the_nearest(role, nearest):
    with pytest.raises(FaultyRow) as error:
        aligned(OPENAI, turn("user", "q"), turn(role, "a"))
    assert str(error.value) == f"unknown role {role!r}{nearest} (known are user, assistant, tool, function, system)"


def test_messages_that_are_none_are_a_fault_of_the_row():
    for held in ({"role": "user", "content": 2.5}, {"role": ["user"], "content": 1}, ["q", "a"], "q", 7):
        with pytest.raises(FaultyRow, match="messages is not a list of messages"):
            align_row({"messages": held}, OPENAI)
