"""The JSON files of a model that someone else has written: read as they are meant, or refused with file and line."""

import json

import jax.numpy as jnp
import pytest
import small

from jtune.data import load_tokenizer
from jtune.errors import DataError
from jtune.files import read_object
from jtune.generation.settings import read_generation_config
from jtune.interop import hf
from jtune.models.families import decoder_config

DEEP = "[" * 5000 + "]" * 5000
BROKEN = [
    (b'{\n"a": tru}', ":2: not JSON: Expecting value"),
    (b"", ":1: not JSON: Expecting value"),
    (b"[]", ": expected a JSON object, found list"),
    (b'"x"', ": expected a JSON object, found str"),
    (b'{"a": "\xe9"}', ": not UTF-8 at byte 7"),
    ('{"a": 1}'.encode("utf-16"), ": not UTF-8 at byte 0"),
    (b'{"a": %s}' % DEEP.encode(), ": nested too deeply"),
    (b'{"a": %s}' % (b"9" * 5000), ": not JSON: Exceeds the limit (4300 digits)"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("content", "said"), BROKEN)
def test_a_broken_file_is_named_with_its_fault(content, said, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for read in (read_object, lambda path: hf.read_config(path.parent)):
        with pytest.raises(DataError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}{said}")
    path.rename(tmp_path / "generation_config.json")
    with pytest.raises(DataError, match=r"generation_config\.json"):
        read_generation_config(tmp_path)


def test_a_byte_order_mark_is_left_out(tmp_path):
    (tmp_path / "generation_config.json").write_bytes(b'\xef\xbb\xbf{"eos_token_id": [1, 2]}')
    assert read_generation_config(tmp_path) == {"eos_token_id": [1, 2]}


@pytest.mark.parametrize("eos", ["x", [1, "x"], 1.5, True, {"a": 1}])
def test_an_end_that_is_no_token_is_refused(eos, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(DataError, match=r"eos_token_id is .* expected a token's number, or a list of them"):
        read_generation_config(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("tokenizer_config.json", "[]"), ("special_tokens_map.json", "{")])
def test_a_broken_file_of_the_tokenizer_is_named(name, content, model, tmp_path):
    load_tokenizer(str(model)).save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        load_tokenizer(str(tmp_path))


# ---------------------------------------------------------------------- values of config.json


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        ({"dtype": "auto"}, "float32"),
        ({"dtype": None, "torch_dtype": "auto"}, "float32"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.float16"}, "float16"),
        ({"dtype": None}, "float32"),
    ],
)
def test_dtypes_that_configs_name_are_read(change, dtype, model):
    config = hf.read_config(model)
    assert decoder_config(config | change) == decoder_config(config)
    assert hf.stored_dtype(config | change) == jnp.dtype(dtype)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, expected 0 to 10000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected 0 to 10000"),
        ({"vocab_size": 10**30}, f"vocab_size is {10**30}, expected 0 to 100000000"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"head_dim": None, "num_key_value_heads": None, "rope_parameters": {"rope_type": 7}}, "config.json"),
        ({"model_type": ["llama"]}, "model_type"),
    ],
)
def test_sizes_that_no_model_has_are_refused_at_once(change, said, model):
    with pytest.raises(DataError) as error:
        decoder_config(hf.read_config(model) | change)
    assert str(error.value).startswith("config.json: ")
    assert said in str(error.value)


def test_a_dtype_that_is_none_is_refused():
    for name in ("float99", 7, "int8"):
        with pytest.raises(DataError, match=r"dtype \(torch_dtype\) is .* expected one of bfloat16"):
            hf.stored_dtype({"torch_dtype": name})
