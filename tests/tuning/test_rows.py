"""Rows for new tokens: drawn as LLaMA-Factory draws them, the same on every mesh, the others untouched."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtune.config import load_config
from jtune.data.tokens.tokenizer import add_tokens, read_descriptions
from jtune.errors import ConfigError
from jtune.models import DecoderConfig, abstract_params, init_params, logical_axes
from jtune.quickstart.make_model import make_tokenizer
from jtune.sharding import make_mesh, tree_shardings
from jtune.tuning import vocabulary
from jtune.tuning.vocabulary import Change, mean_row, padded, resize

WIDTH = 64
CONFIG = DecoderConfig(
    vocab_size=88,
    hidden_size=WIDTH,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    head_bias=True,
)


def tables(dtype=jnp.float32, config=CONFIG):
    """Rows whose mean is far from zero, so that it shows."""
    params = jax.jit(lambda: init_params(config, jax.random.key(0), dtype))()
    head = params["lm_head"]
    return {
        **params,
        "embed_tokens": {"embedding": params["embed_tokens"]["embedding"] + jnp.arange(WIDTH, dtype=dtype) / 16},
        "lm_head": {"kernel": head["kernel"] - 1, "bias": head["bias"] + jnp.arange(88, dtype=dtype)},
    }


def rows(params):
    return np.asarray(params["embed_tokens"]["embedding"], np.float32), np.asarray(params["lm_head"]["kernel"].T)


def test_rows_are_padded_to_a_multiple_of_64():
    assert [padded(n) for n in (1, 64, 65, 128256, 128258)] == [64, 64, 128, 128256, 128320]


def test_new_rows_are_the_mean_of_the_others_and_noise():
    params = tables()
    grown = resize(params, Change(88, 1088), jax.random.key(3))
    for before, after in zip(rows(params), rows(grown)):
        np.testing.assert_array_equal(after[:88], before)
        noise = (after[88:] - before.mean(axis=0)) * math.sqrt(WIDTH)
        assert abs(noise.mean()) < 0.02
        assert noise.std() == pytest.approx(1, abs=0.02)
        assert np.abs(np.corrcoef(noise)[np.triu_indices(100, 1)]).max() < 0.6  # no row is another's again
    embedding, head = rows(grown)
    assert (
        abs(np.corrcoef(embedding[88:].ravel() - np.tile(embedding[:88].mean(0), 1000), head[88:].ravel())[0, 1]) < 0.02
    )
    np.testing.assert_allclose(grown["lm_head"]["bias"][88:], 43.5)
    for name in ("layers", "norm"):
        assert grown[name] is params[name]


def test_what_a_row_gets_depends_on_its_id_and_the_seed():
    params = tables()
    few, many = (resize(params, Change(88, size), jax.random.key(3)) for size in (128, 192))
    np.testing.assert_array_equal(rows(few)[0], rows(many)[0][:128])
    other = resize(params, Change(88, 128), jax.random.key(4))
    assert np.abs(rows(other)[0][88:] - rows(few)[0][88:]).max() > 0.1


def test_a_token_in_a_row_that_was_there_gets_it_drawn_anew():
    """Some models have more rows than tokens. What was in such a row does not count in the mean either."""
    params = tables()
    params["embed_tokens"] = {"embedding": params["embed_tokens"]["embedding"].at[85].set(1e6)}
    grown = resize(params, Change(88, 88, new=(85, 87)), jax.random.key(3))
    before, after = rows(params)[0], rows(grown)[0]
    kept = np.delete(np.arange(88), [85, 87])
    np.testing.assert_array_equal(after[kept], before[kept])
    np.testing.assert_allclose(after[[85, 87]], np.tile(before[kept].mean(0), (2, 1)), atol=6 / math.sqrt(WIDTH))
    assert resize(params, Change(88, 88), jax.random.key(3)) is params


@pytest.mark.parametrize("noise", ["none", "described", "all"])
def test_a_described_row_is_the_mean_of_its_descriptions_tokens(noise):
    params = tables()
    change = Change(88, 128, described={88: (3, 5, 5), 90: ()}, noise=noise)
    grown, plain = (resize(params, c, jax.random.key(3)) for c in (change, Change(88, 128)))
    for before, after, drawn in zip(rows(params), rows(grown), rows(plain)):
        noises = drawn[88:] - before.mean(axis=0)
        said = rows(params)[0][[3, 5, 5]].mean(axis=0)  # of the input embeddings, for the head too: as in LLaMA-Factory
        np.testing.assert_allclose(after[88], said + noises[0] * (noise != "none"), atol=1e-5)
        # A description without tokens of old: the mean.
        np.testing.assert_allclose(after[90], before.mean(axis=0) + noises[2] * (noise != "none"), atol=1e-5)
        np.testing.assert_allclose(after[89], before.mean(axis=0) + noises[1] * (noise == "all"), atol=1e-5)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tensor": 4, "fsdp": 2}, {"data": 2, "tensor": 2, "fsdp": 2}], ids=str)
def test_rows_are_the_same_on_every_mesh(sizes, monkeypatch):
    monkeypatch.setattr(vocabulary, "PIECE_BYTES", 4 * WIDTH * 20)  # several pieces
    change = Change(88, 128, new=(80,), described={90: (1, 2)})
    params = tables(jnp.bfloat16)
    mesh = make_mesh(**sizes)
    lie = lambda config: tree_shardings(logical_axes(config), abstract_params(config), mesh)
    wide = DecoderConfig(**{**vars(CONFIG), "vocab_size": 128})
    grown = resize(jax.device_put(params, lie(CONFIG)), change, jax.random.key(3), lie(wide))
    single = resize(params, change, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, grown, single)
    assert grown["embed_tokens"]["embedding"].sharding == lie(wide)["embed_tokens"]["embedding"]
    assert grown["lm_head"]["kernel"].dtype == jnp.bfloat16


def test_the_mean_is_summed_in_pieces(monkeypatch):
    x = jnp.arange(88 * WIDTH, dtype=jnp.float32).reshape(88, WIDTH)
    monkeypatch.setattr(vocabulary, "PIECE_BYTES", 4 * WIDTH * 9)
    left = np.delete(np.asarray(x), [0, 30, 87], axis=0).mean(axis=0)
    np.testing.assert_allclose(mean_row(x, 0, (87, 0, 30)), left)
    np.testing.assert_allclose(mean_row(x.T, 1, (87, 0, 30)), left)


# ---------------------------------------------------------------------- tokens and arguments


def test_tokens_are_added_once_and_in_order():
    tokenizer = make_tokenizer(["some words"])
    size = len(tokenizer)
    assert add_tokens(tokenizer, ["plain"], ["<a>", "<|im_end|>"]) == ["plain", "<a>"]
    assert tokenizer.convert_tokens_to_ids(["plain", "<a>"]) == [size, size + 1]
    assert tokenizer("plain<a>", add_special_tokens=False)["input_ids"] == [size, size + 1]
    assert tokenizer.decode([size, size + 1], skip_special_tokens=True) == "plain"
    assert add_tokens(tokenizer, ["plain"], ["<a>"]) == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "cannot be read"), ("- <a>", "token: description"), ("<a>: 1", "is not text"), ("{", "cannot be read")],
)
def test_what_is_no_description_of_tokens_is_refused(content, complaint, tmp_path):
    path = tmp_path / "tokens.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"new_special_tokens_config: .*{complaint}"):
        read_descriptions(str(path))


def complain(*words):
    with pytest.raises(ConfigError) as caught:
        load_config(["model_name_or_path=m", "dataset=d", "do_train=true", *words])
    return str(caught.value)


def test_arguments_that_contradict_each_other_are_refused():
    assert "only valid for finetuning_type: freeze or lora" in complain("use_llama_pro=true", "finetuning_type=full")
    assert "must be above 0 with use_llama_pro" in complain("use_llama_pro=true", "freeze_trainable_layers=-2")
    assert "so all of it trains: leave it out" in complain("resize_vocab=true", "lora_target=lm_head,q_proj")
    case = ["model_name_or_path=m", "init_special_tokens=desc_init", "add_special_tokens=<a>"]
    assert "needs new_special_tokens_config: noise_init is used" in load_config(case, command="chat").notes[0]
    case = [*case[:1], "new_special_tokens_config=t.yaml", "add_special_tokens=<a>"]
    assert "add_special_tokens is ignored" in load_config(case, command="chat").notes[0]
