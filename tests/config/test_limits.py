"""A case of a few lines neither fills memory nor takes for ever to read: it is refused, with its line."""

import random
from contextlib import suppress

import pytest

from jtune.config import load_config
from jtune.errors import ConfigError

CASE = "model_name_or_path: m\ndataset: a\ndo_train: true\n"


def refused(folder, text, *words, name="case.yaml"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        load_config([str(folder / name), *words])
    return str(error.value).replace(f"{folder}/", "")


def chain(text, count, key="x"):
    return "".join(f"{key}{i}: {text.replace('@', f'{key}{i - 1}')}\n" for i in range(1, count))


@pytest.mark.parametrize(
    "text",
    [
        "x0: aaaa\n" + chain("${@}${@}${@}", 40),
        "x0: aaaa\n" + chain('["${@}", "${@}", "${@}"]', 15),
        chain("${@}${@}", 40) + "x0: aaaa\n" + "run_name: ${x39}\n",
        "x:\n  y0: aaaa\n" + "".join(f"  y{i}: ${{.y{i - 1}}}${{x.y{i - 1}}}\n" for i in range(1, 30)),
        "x0: aaaa\n" + chain("${oc.select:@}${oc.select:@,1}", 40),
        "x0: aaaa\n" + chain("${@}", 3000),
    ],
)
def test_interpolations_that_multiply_are_refused_at_once(text, tmp_path):
    said = refused(tmp_path, CASE + text)
    assert said == "case.yaml: its interpolations (${...}) expand to more than 1000000 characters"


def test_interpolations_over_many_steps_are_refused(tmp_path):
    lines = chain("${@}", 100).splitlines()
    assert "interpolations (${...}) in more than 20 steps" in refused(
        tmp_path, CASE + "\n".join(lines[::-1]) + "\nx0: a"
    )
    assert "more than 50 interpolations (${...}) in one value" in refused(
        tmp_path, CASE + "run_name: " + "${" * 500 + "a" + "}" * 500
    )


def test_a_circle_is_named_as_one(tmp_path):
    assert "Recursive interpolation" in refused(tmp_path, CASE + "run_name: ${logging_dir}\nlogging_dir: ${run_name}\n")


def test_what_people_write_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("WORK", "/w")
    names = ("output_dir", "logging_dir", "cache_dir", "export_dir", "tokenized_path")
    places = "".join(f"{name}: ${{oc.env:WORK}}/${{oc.env:WORK}}/${{run_name}}/{name}\n" for name in names)
    (tmp_path / "case.yaml").write_text(CASE + "run_name: ${model_name_or_path}-${dataset}\n" + places)
    assert load_config([str(tmp_path / "case.yaml")]).training.output_dir == "/w//w/m-a/output_dir"


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("optim_args: " + "[" * 400 + "]" * 400, (), "case.yaml:4: nested too deeply: more than 20 lists or mappings"),
        ("x:\n" + "".join(" " * (i + 1) + "a:\n" for i in range(100)), (), "nested too deeply"),
        ("max_steps: " + "9" * 5000, (), f"case.yaml:4: a number of 5000 digits: {'9' * 40}..."),
        ("max_steps: 0x" + "f" * 6000, (), "case.yaml:4: a number of 6002 digits"),
        ("max_steps: " + "9" * 30, (), f"case.yaml:4: max_steps: a whole number is below 2**63, not {'9' * 30}"),
        ("", ("max_steps=" + "9" * 5000,), f"command line: max_steps: {'9' * 40}... cannot be read"),
        ("", ("optim_args=" + "[" * 5000 + "]" * 5000,), "command line: optim_args:"),
        ('output_dir: "a\\0b"', (), "case.yaml:4: output_dir: it holds a NUL character"),
        ('dataset_dir: {a: {file_name: "a\\0b"}}', (), "case.yaml:4: dataset_dir: it holds a NUL character"),
        ("", ("cache_dir=a\0b",), "command line: cache_dir: it holds a NUL character"),
    ],
)
def test_depth_digits_and_nul_are_refused_with_their_place(text, words, said, tmp_path):
    assert said in refused(tmp_path, CASE + text, *words)


def test_json_has_the_same_limits(tmp_path):
    assert refused(tmp_path, '{"a":' + "[" * 30_000, name="case.json") == "case.json: nested too deeply"
    assert "this is not JSON" in refused(tmp_path, '{"max_steps":' + "9" * 5000 + "}", name="case.json")
    assert "a number of 400 digits" in refused(tmp_path, '{"max_steps":' + "9" * 400 + "}", name="case.json")


WORDS = ["${", "}", "a", "x0", ": ", "\n", "[", "]", "{", "}", "&b ", "*b", "!!int ", "!!binary ", "0x", "1e5"]
WORDS += ["9" * 20, "- ", "| ", '"', "'", "\\", "\0", "\t", "# ", "oc.env:", "???", "<<: ", "~", "é", "!!bool "]
WORDS += ["run_name: ", "max_steps: ", "!!timestamp ", "!!float ", "? ", "@", "%", "---\n"]


def test_whatever_is_written_is_read_or_refused(tmp_path):
    """Words that mean something in YAML, in any order: a message, never another error."""
    random.seed(0)
    path, read = tmp_path / "case.yaml", 0
    for _ in range(400):
        path.write_text(CASE + "".join(random.choices(WORDS, k=random.randint(1, 12))), encoding="utf-8")
        with suppress(ConfigError):
            load_config([str(path)])
            read += 1
    assert 0 < read < 400
