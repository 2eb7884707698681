"""What an adapter says is honoured or refused by name; what is written, PEFT reads."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import ids, logits_of, make_model

from jtune.errors import ConfigError, DataError, NonFiniteError
from jtune.interop.peft import check_writable, load_adapter, save_adapter
from jtune.interop.peft_options import OPTIONS
from jtune.loading.inference import load_model
from jtune.tuning import adapter_mask, lora
from jtune.tuning.nodes import Node
from jtune.tuning.prepare import whole_modules

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def theirs(folder, family="llama", **options):
    """A PEFT adapter that has moved from its start, saved; and its logits."""
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options}, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(make_model(family), config).eval()
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for p in (p for _, p in sorted(model.named_parameters()) if p.requires_grad):
            p.add_(0.1 * torch.from_numpy(rng.standard_normal(p.shape, dtype=np.float32)))
    model.save_pretrained(folder)
    return logits_of(model, ids())


def in_peft(adapter, family="llama"):
    return logits_of(peft.PeftModel.from_pretrained(make_model(family), adapter).eval(), ids())


def logits(model, params):
    return np.asarray(model.apply({"params": params}, ids()))


def moved(params, mask):
    rng = np.random.default_rng(6)
    move = lambda x, trains: x + 0.05 * jnp.asarray(rng.standard_normal(x.shape), x.dtype) if trains else x
    return jax.tree.map(move, params, mask)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    theirs(folder)
    return folder


def test_every_option_of_peft_is_in_the_table():
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= OPTIONS.keys()


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa", "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "lora_alpha": 3},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "olora", "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "use_rslora": True},
    ],
    ids=str,
)
def test_an_adapter_whose_start_came_out_of_the_base_acts_as_in_peft_and_when_written_again(
    options, checkpoint, tmp_path
):
    expected = theirs(tmp_path / "theirs", **options)
    model, params = load_model(str(checkpoint("llama")), adapter=str(tmp_path / "theirs"))
    close = {"atol": 1e-3 if options["init_lora_weights"] == "pissa" else 1e-4}  # singular values lie close together
    np.testing.assert_allclose(logits(model, params), expected, **close)
    np.testing.assert_allclose(logits(model, lora.merge(params)), expected, **close)
    save_adapter(params, adapter_mask(params), model.config, tmp_path / "again", base="base")
    np.testing.assert_allclose(in_peft(tmp_path / "again"), expected, **close)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "milora"])
def test_a_start_that_does_not_follow_from_the_files_is_refused_by_name(init, checkpoint, plain, tmp_path):
    refused(checkpoint, plain, tmp_path, f"init_lora_weights='{init}'.*path_initial_model_for_weight_conversion", {
        "init_lora_weights": init})  # fmt: skip


def refused(checkpoint, plain, folder, message, options=None, tensors=None, base="llama"):
    config = json.loads((plain / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | (options or {})))
    save_file(load_file(plain / "adapter_model.safetensors") | (tensors or {}), folder / "adapter_model.safetensors")
    with pytest.raises(DataError, match=message):
        load_model(str(checkpoint(base)), adapter=str(folder))


NAME = "base_model.model.model.layers.2.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("lora_alpha='16' is not supported; expected a number", {"lora_alpha": "16"}),
        ("r='8' is not supported; expected a whole number above 0", {"r": "8"}),
        (r"rank_pattern={'\(': 2} is not supported; expected regular", {"rank_pattern": {"(": 2}}),
        ("lora_dropout='much' is not", {"lora_dropout": "much"}),
        ("of rank 4, adapter_config.json says 8", {"r": 8}),
        ("bias='all' is not supported; expected 'none'", {"bias": "all"}),
        ("arrow_config={'top_k': 2} is not supported", {"arrow_config": {"top_k": 2}}),
        ("use_newlora=True is an option that jtune does not know", {"use_newlora": True}),
        ("use_dora with init_lora_weights='pissa'", {"use_dora": True, "init_lora_weights": "pissa"}),
        ("needs lora_alpha above 0", {"lora_alpha": -8, "init_lora_weights": "pissa"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_not_honoured_is_refused_by_name(message, options, checkpoint, plain, tmp_path):
    refused(checkpoint, plain, tmp_path, message, options)


def test_tensors_that_are_twice_there_or_not_finite_are_refused_by_name(checkpoint, plain, tmp_path):
    a = np.full((4, 32), np.nan, np.float32)
    refused(checkpoint, plain, tmp_path, r"not finite \(NaN or infinity\): .*2.self_attn.q_proj.lora_A.weight",
            tensors={NAME.format("A"): a})  # fmt: skip
    refused(checkpoint, plain, tmp_path, "is there twice", tensors={NAME.format("A")[len("base_model.model.") :]: a})


def test_what_has_no_effect_is_noted(checkpoint, plain, tmp_path, caplog):
    config = json.loads((plain / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "org/other", "newlora_size": 16, "lora_alpha": 0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(load_file(plain / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    with caplog.at_level(logging.INFO, "jtune"):
        model, params = load_model(str(checkpoint("llama")), adapter=str(tmp_path))
    assert "was trained on org/other; the base given is" in caplog.text
    assert "newlora_size=16 is an option that jtune does not know" in caplog.text
    np.testing.assert_array_equal(logits(model, params), logits(*load_model(str(checkpoint("llama")))))  # alpha is 0


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": {"lm_head": [3, 5]}},
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 6]}},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_an_adapter_that_makes_two_tables_of_a_tied_one_acts_as_in_peft_and_when_written_again(
    options, checkpoint, tmp_path
):
    expected = theirs(tmp_path / "theirs", "qwen2", **options)
    model, params = load_model(str(checkpoint("qwen2")), adapter=str(tmp_path / "theirs"))
    assert not model.config.tie_word_embeddings
    np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)
    if "trainable_token_indices" in options:  # of which whole tables are trained here
        options = {"modules_to_save": ["embed_tokens", "lm_head"]}
    mask = whole_modules(params, adapter_mask(params), options.get("modules_to_save", ()))
    params = moved(params, mask)
    save_adapter(params, mask, model.config, tmp_path / "again", base="base")
    np.testing.assert_allclose(in_peft(tmp_path / "again", "qwen2"), logits(model, params), atol=1e-4)
    again = load_model(str(checkpoint("qwen2")), str(tmp_path / "again"))
    np.testing.assert_allclose(logits(*again), logits(model, params), atol=1e-5)


def test_an_adapter_of_the_embedding_is_refused(checkpoint, tmp_path):
    theirs(tmp_path, "qwen2", target_modules=["embed_tokens"])
    with pytest.raises(DataError, match="jtune has no LoRA on embeddings; merge the adapter with PEFT"):
        load_model(str(checkpoint("qwen2")), adapter=str(tmp_path))


def test_a_head_that_has_not_moved_is_a_table_of_its_own(checkpoint, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    peft.get_peft_model(make_model("qwen2"), config).save_pretrained(tmp_path)
    _, params = load_model(str(checkpoint("qwen2")), str(tmp_path))
    np.testing.assert_array_equal(params["lm_head"]["kernel"], params["embed_tokens"]["embedding"].T)


def test_a_tied_table_that_was_trained_as_one_acts_as_in_peft(checkpoint, tmp_path):
    expected = theirs(tmp_path, "qwen2", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model, base = load_model(str(checkpoint("qwen2")))
    params, trained = load_adapter(base, model.config, str(tmp_path))
    np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)
    assert trained == ("embed_tokens",)  # PEFT also says "model.embed_tokens"
    assert whole_modules(params, adapter_mask(params), trained)["embed_tokens"]["embedding"] is True


def test_an_adapter_of_the_head_acts_the_same_in_peft_and_when_read_again(checkpoint, tmp_path):
    model, base = load_model(str(checkpoint("llama")))
    patterns = {"rank_pattern": {"lm_head": 2}, "alpha_pattern": {"lm_head": 3}}
    params = lora.add(base, "q_proj,lm_head", rank=4, **patterns)
    params = moved(params, adapter_mask(params))
    check_writable(params, adapter_mask(params), model.config)
    save_adapter(params, adapter_mask(params), model.config, tmp_path, base="base")
    np.testing.assert_allclose(in_peft(tmp_path), logits(model, params), atol=1e-4)
    again, _ = load_adapter(base, model.config, str(tmp_path))
    np.testing.assert_allclose(logits(model, again), logits(model, params), atol=1e-5)
    np.testing.assert_allclose(logits(model, lora.merge(params)), logits(model, params), atol=1e-4)


def test_what_cannot_be_written_is_known_from_shapes(checkpoint):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Strange(lora.LoRA.__mro__[1]):
        base: object
        gain: object
        adapter = ("gain",)
        project = merged = None

    assert issubclass(Strange, Node)
    model, base = load_model(str(checkpoint("llama")))
    params = jax.eval_shape(lambda tree: lora.add(tree, "all", form="pissa"), base)
    check_writable(params, whole_modules(params, adapter_mask(params), ["embed_tokens"]), model.config, resized=True)
    Strange.__abstractmethods__ = frozenset()
    head = Strange(params["lm_head"]["kernel"], params["norm"]["scale"])
    params = params | {"lm_head": {"kernel": head}}
    with pytest.raises(ConfigError, match="lm_head: PEFT has no adapter like Strange"):
        check_writable(params, adapter_mask(params), model.config)


def test_an_adapter_that_is_not_finite_is_not_written(checkpoint, tmp_path):
    model, base = load_model(str(checkpoint("llama")))
    params = lora.add(base, "q_proj", rank=4)
    params = jax.tree.map(lambda x, trains: x + np.inf if trains else x, params, adapter_mask(params))
    with pytest.raises(NonFiniteError, match=r"not finite.*model.layers.\{0-3\}.self_attn.q_proj.lora_A.weight"):
        save_adapter(params, adapter_mask(params), model.config, tmp_path / "out", base="base")
    assert not (tmp_path / "out").exists()
