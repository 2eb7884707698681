"""NaN and infinity in weights: refused while they are read, and not written, by name."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jtune.errors import DataError, NonFiniteError
from jtune.interop import hf
from jtune.interop.weights import is_finite
from jtune.models import abstract_params, logical_axes
from jtune.models.families import decoder_config
from jtune.sharding import make_mesh, tree_shardings
from jtune.tuning.quantize import form_of

NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_number_among_many_is_found(dtype, value):
    x = np.full((3, 70_000), jnp.finfo(dtype).max, dtype)
    x[1] = -x[1]
    assert all(map(is_finite, (x, x[:, ::2], x[:0])))
    x[2, 68_888] = value
    assert not any(map(is_finite, (x, x.T)))


def changed(checkpoint, folder, change, family="llama"):
    shutil.copytree(checkpoint(family), folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    return folder, decoder_config(hf.read_config(folder))


def with_nan(tensors):
    tensors[NAME][3, 5] = np.nan


@pytest.mark.parametrize("how", ["plain", "split", "bfloat16", "quantised"])
def test_weights_that_are_not_finite_are_refused_while_reading(how, checkpoint, tmp_path):
    folder, config = changed(checkpoint, tmp_path / "nan", with_nan)
    options = {"bfloat16": {"dtype": jnp.bfloat16}, "quantised": {"form": form_of(4, "nf4", False)}}.get(how, {})
    if how == "split":
        options["shardings"] = tree_shardings(logical_axes(config), abstract_params(config), make_mesh(fsdp=8))
    with pytest.raises(DataError, match=rf"not finite \(NaN or infinity\): {NAME}$"):
        hf.load_params(folder, config, **options)


def test_a_scale_that_is_not_finite_is_refused(checkpoint, tmp_path):
    def change(tensors):
        tensors[NAME] = tensors[NAME].astype(jnp.float8_e4m3fn)
        tensors[f"{NAME}_scale_inv"] = np.full((1, 1), np.inf, np.float32)

    folder, config = changed(checkpoint, tmp_path / "nan", change)
    with pytest.raises(DataError, match=rf"not finite \(NaN or infinity\): {NAME}$"):
        hf.load_params(folder, config)


def test_weights_that_are_not_finite_are_not_written(checkpoint, tmp_path):
    source = hf.read_config(checkpoint("llama"))
    config = decoder_config(source)
    params = hf.load_params(checkpoint("llama"), config)
    params["norm"]["scale"] = params["norm"]["scale"] * np.nan
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight is not written: not finite"):
        hf.save_model(params, config, source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_head_that_is_not_the_embedding_of_a_tied_model_is_refused(checkpoint, tmp_path):
    def change(tensors, by=1.0):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(by)

    folder, config = changed(checkpoint, tmp_path / "same", lambda tensors: change(tensors, 0), "qwen2")
    hf.load_params(folder, config)
    folder, config = changed(checkpoint, tmp_path / "other", change, "qwen2")
    with pytest.raises(DataError, match=r"lm_head\.weight is not the embedding, as tie_word_embeddings says"):
        hf.load_params(folder, config)
