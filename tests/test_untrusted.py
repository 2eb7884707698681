"""What a model or a data set from others cannot do: run code, ask questions, send a run to the internet."""

import ast
import io
import json
import shutil
import socket
import sys
from pathlib import Path

import click
import pytest
from small import case, write_data, write_model

import jtune
from jtune.cli.commands import program
from jtune.cli.main import main
from jtune.data import load_tokenizer
from jtune.data.formats.messages import FaultyRow
from jtune.data.templates.chat_template import rendered
from jtune.errors import DataError
from jtune.models.families import decoder_config

CODE = "from pathlib import Path\nPath({ran!r}).touch()\nfrom transformers import PreTrainedTokenizerFast as Own\n"


def change(path, **values):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return write_model(folder / "model"), write_data(folder / "data")


@pytest.fixture
def with_code(parts, tmp_path):
    """A model whose tokenizer has no tokenizer.json, but code; and the file that the code would make."""
    model = shutil.copytree(parts[0], tmp_path / "model")
    (model / "tokenizer.json").unlink()
    (model / "tokenization_own.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    names = {"AutoTokenizer": [None, "tokenization_own.Own"]}
    change(model / "tokenizer_config.json", auto_map=names, tokenizer_class="Own")
    return model, tmp_path / "ran"


def refusal(model, file="tokenization_own.py"):
    return (
        f"the tokenizer of {str(model)!r} can only be had by running code of its repository ({file}), which jtune "
        "never does (trust_remote_code has no effect). A folder with a tokenizer.json needs no such code: look for a "
        "release of the model that has one"
    )


@pytest.mark.parametrize("command", ["train", "data", "export"])
def test_a_repositorys_code_does_not_run_whatever_stdin_says(command, with_code, parts, tmp_path, monkeypatch, capsys):
    model, ran = with_code
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    changes = {"export_dir": str(tmp_path / "to")} if command == "export" else {}
    config = case(tmp_path, model, parts[1], mesh_fsdp=-1, **changes)
    assert main([command, str(config)]) == 3
    assert refusal(model) in capsys.readouterr().err
    assert not ran.exists()


@pytest.mark.parametrize("form", ["list", "config", "elsewhere"])
def test_every_way_to_name_code_is_refused_by_name(form, with_code):
    model, ran = with_code
    named, file = "tokenization_own.Own", "tokenization_own.py"
    if form == "list":
        change(model / "tokenizer_config.json", auto_map=[named, None])
    elif form == "config":
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({"bos_token": settings.get("bos_token")}))
        change(model / "config.json", auto_map={"AutoTokenizer": named})
    else:
        file = "a/b/tokenization_own.py"
        change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [f"a/b--{named}", None]})
    with pytest.raises(DataError) as found:
        load_tokenizer(str(model))
    assert str(found.value) == refusal(model, file)
    assert not ran.exists()


def test_a_model_that_needs_code_is_refused_by_name():
    config = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}
    with pytest.raises(DataError, match=r"'own' is not supported\. Only code of its repository .*trust_remote_code"):
        decoder_config(config)


def test_code_that_is_not_needed_does_not_run(with_code, parts):
    model, ran = with_code
    shutil.copy(parts[0] / "tokenizer.json", model)
    assert load_tokenizer(str(model)).encode("a date") == load_tokenizer(str(parts[0])).encode("a date")
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "T5Tokenizer", "GPT2Tokenizer"])
def test_a_tokenizer_whose_files_are_missing_is_refused(kind, parts, tmp_path):
    model = shutil.copytree(parts[0], tmp_path / "model")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(DataError, match=f": {kind} has no vocabulary: its files are missing"):
        load_tokenizer(str(model))


def test_a_tokenizer_that_cannot_encode_is_refused(parts, tmp_path):
    model = shutil.copytree(parts[0], tmp_path / "model")
    change(model / "tokenizer_config.json", model_max_length="long")
    with pytest.raises(DataError, match="cannot read the tokenizer of"):
        load_tokenizer(str(model))


def test_commands_read_no_stdin(monkeypatch):
    own = io.StringIO("y\n")
    monkeypatch.setattr("sys.stdin", own)
    heard = []
    ask = click.Command("ask", callback=lambda: heard.append(sys.stdin.read()))
    for command in ("train", "plan", "data", "inspect", "export", "eval"):
        monkeypatch.setitem(program.commands, command, ask)
        assert main([command]) == 0
    assert heard == [""] * 6
    assert sys.stdin is own
    monkeypatch.setitem(program.commands, "chat", ask)
    main(["chat"])
    assert heard[-1] == "y\n"


def test_chat_says_that_stdin_is_closed(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert main(["chat", str(case(tmp_path, *parts))]) == 2
    assert "jtune chat: stdin is closed: questions come from the terminal or through a pipe" in capsys.readouterr().err
    monkeypatch.setitem(program.commands, "data", click.Command("data", callback=lambda: len(sys.stdin.read())))
    assert main(["data"]) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
        ("{{ lipsum.__globals__['os'] }}", "access to attribute '__globals__' of 'function' object is unsafe."),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big. The sandbox blocks ranges larger than"),
        ("{% include '/etc/hosts' %}", "no loader for this environment specified"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ 'a' * 10**15 }}", "MemoryError"),
    ],
)
def test_a_chat_template_has_no_way_out_of_its_sandbox(text, said, parts):
    tokenizer = load_tokenizer(str(parts[0]))
    with pytest.raises(FaultyRow) as found:
        rendered(tokenizer, [{"role": "user", "content": "a"}], text, open_answer=True)
    assert str(found.value).startswith(f"the chat template refuses it: {said}")


def test_every_call_that_could_run_others_code_says_that_it_may_not():
    """`datasets` has no such argument any more: it runs no scripts."""
    said, home = 0, Path(jtune.__file__).parent
    for path in sorted(home.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            where = f"{path.relative_to(home)}:{node.lineno}"
            if call.endswith(("from_pretrained", "from_config")):
                said += 1
                assert words.get("trust_remote_code") == "False", where
            assert call not in ("np.load", "numpy.load") or words.get("allow_pickle") == "False", where
            assert call not in ("yaml.load", "torch.load", "pickle.load", "pickle.loads", "eval", "exec"), where
        text = "".join(path.read_text().split())
        assert text.count("M.from_pretrained(") <= text.count("trust_remote_code=False"), path
    assert said


def test_a_run_on_local_files_asks_nothing_of_the_internet(parts, tmp_path, monkeypatch):
    import datasets
    import huggingface_hub.constants
    import transformers.utils.hub

    for module in (datasets.config, huggingface_hub.constants, transformers.utils.hub):
        for name in ("HF_HUB_OFFLINE", "_is_offline_mode"):
            monkeypatch.setattr(module, name, False, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asked = []

    def refuse(*args, **options):
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    assert main(["data", str(case(tmp_path, *parts)), "overwrite_cache=true"]) == 0
    assert asked == []
