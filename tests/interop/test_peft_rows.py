"""A resized vocabulary in adapters: PEFT's act the same here, and ours act the same in PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ids, logits_of, make_model

from jtune.errors import DataError
from jtune.interop.peft import load_adapter, save_adapter
from jtune.loading.inference import load_model
from jtune.loading.vocabulary import stored_rows, vocabulary_of
from jtune.tuning import adapter_mask, is_node, lora, select
from jtune.tuning.expand import on_layers
from jtune.tuning.prepare import whole_modules
from jtune.tuning.vocabulary import Change, resize

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = 192  # the tiny models have 128
IDS = np.concatenate([ids(), ids(seed=3) % 64 + 128], axis=1)  # old tokens and new ones


def resized(family, rows=ROWS, **changes):
    model = make_model(family, **changes)
    model.resize_token_embeddings(rows)
    return model


def logits(model, params, ids=IDS):
    return np.asarray(model.apply({"params": params}, ids))


def moved(params, mask, scale=0.05):
    rng = np.random.default_rng(6)
    move = lambda x, trains: x + scale * jnp.asarray(rng.standard_normal(x.shape), x.dtype) if trains else x
    return jax.tree.map(move, params, mask)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])  # two tables; one; two and a bias
@pytest.mark.parametrize("kept", [["embed_tokens", "lm_head"], ["embed_tokens"]], ids=len)
def test_our_resized_adapter_acts_the_same_in_peft(family, kept, checkpoint, tmp_path):
    _, base = load_model(str(checkpoint(family)))
    model, _ = load_model(str(checkpoint(family)))
    config, wide = as_adapter_of(model.config, base)
    model = model.clone(config=config)
    params = lora.add(wide, ["q_proj", "v_proj"], rank=4)
    names = kept[:1] if config.tie_word_embeddings else kept
    mask = whole_modules(params, adapter_mask(params), names)
    params = moved(params, mask)
    save_adapter(params, mask, config, tmp_path, base=str(checkpoint(family)), resized=True)
    assert stored_rows(tmp_path, config) == ROWS
    base_there = resized(family)
    if family == "phi":  # PEFT keeps no bias of a head that does not train
        base_there.lm_head.bias.data = torch.from_numpy(np.array(wide["lm_head"]["bias"]))
    found = logits_of(peft.PeftModel.from_pretrained(base_there, tmp_path).eval(), IDS)
    np.testing.assert_allclose(found, logits(model, params), atol=1e-4)
    loaded, again = load_model(str(checkpoint(family)), adapter=str(tmp_path))
    assert loaded.config.vocab_size == ROWS
    np.testing.assert_allclose(logits(loaded, again), logits(model, params), atol=1e-5)


def as_adapter_of(config, base):
    wide = resize(base, Change(128, ROWS), jax.random.key(1))
    return type(config)(**{**vars(config), "vocab_size": ROWS}), wide


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"save_embedding_layers": True},  # neither trains
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [3, 130, 150], "save_embedding_layers": True},
        {"trainable_token_indices": {"embed_tokens": [7, 140]}, "save_embedding_layers": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_pefts_resized_adapter_acts_the_same_here(family, options, checkpoint, tmp_path):
    if family == "qwen2" and "lm_head" in options.get("target_modules", ()):
        pytest.skip("a head that is the embedding has no adapter here")
    options = dict(options)
    if family == "qwen2" and "modules_to_save" in options:
        options["modules_to_save"] = ["embed_tokens"]
        options["ensure_weight_tying"] = True
    save = options.pop("save_embedding_layers", "auto")
    expected = theirs(tmp_path, resized(family), save, **options)
    model, params = load_model(str(checkpoint(family)), adapter=str(tmp_path))
    np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)


def theirs(folder, model, save, **options):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options},
                             task_type="CAUSAL_LM")  # fmt: skip
    model = peft.get_peft_model(model, config).eval()
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for p in (p for _, p in sorted(model.named_parameters()) if p.requires_grad):
            p.add_(0.1 * torch.from_numpy(rng.standard_normal(p.shape, dtype=np.float32)))
    model.save_pretrained(folder, save_embedding_layers=save)
    return logits_of(model, IDS)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_our_adapter_of_some_layers_acts_the_same_in_peft(family, checkpoint, tmp_path):
    model, base = load_model(str(checkpoint(family)))
    targets = ["q_proj", "down_proj"] + (["gate", "gate_proj", "up_proj"] if family == "mixtral" else [])
    paths = select(base, targets)
    add = lambda tree, names, first: lora.add(tree, names, rank=4, key=jax.random.key(first))
    params = on_layers(base, [1, 3], paths, add)
    params = moved(params, adapter_mask(params))
    save_adapter(params, adapter_mask(params), model.config, tmp_path, base=str(checkpoint(family)))
    found = peft.PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    np.testing.assert_allclose(logits_of(found, ids()), logits(model, params, ids()), atol=1e-4)
    adapted = {name.split(".layers.")[1][0] for name, _ in found.named_parameters() if "lora_A" in name}
    assert adapted == {"1", "3"}
    again, _ = load_adapter(base, model.config, str(tmp_path))
    assert [is_node(stack["self_attn"]["q_proj"]["kernel"]) for stack in again["layers"]] == [
        False,
        True,
        False,
        True,
    ]
    np.testing.assert_allclose(logits(model, again, ids()), logits(model, params, ids()), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": 3},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.2.mlp.up_proj", "v_proj"]},
        {"target_modules": r".*\.[23]\.mlp\.(up|down)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]},
    ],
    ids=str,
)
def test_pefts_adapter_of_some_layers_acts_the_same_here(options, checkpoint, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    there = peft.get_peft_model(make_model("llama"), config).eval()
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for p in (p for _, p in sorted(there.named_parameters()) if p.requires_grad):
            p.add_(0.1 * torch.from_numpy(rng.standard_normal(p.shape, dtype=np.float32)))
    there.save_pretrained(tmp_path / "theirs")
    model, params = load_model(str(checkpoint("llama")), adapter=str(tmp_path / "theirs"))
    np.testing.assert_allclose(logits(model, params, ids()), logits_of(there, ids()), atol=1e-4)
    save_adapter(params, adapter_mask(params), model.config, tmp_path / "ours", base=str(checkpoint("llama")))
    again = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path / "ours").eval()
    np.testing.assert_allclose(logits_of(again, ids()), logits_of(there, ids()), atol=1e-4)


def test_an_adapter_of_another_vocabulary_is_refused_with_what_to_do(checkpoint, tmp_path):
    model, base = load_model(str(checkpoint("llama")))
    config, wide = as_adapter_of(model.config, base)
    params = lora.add(wide, ["q_proj"], rank=4)
    save_adapter(params, adapter_mask(params), config, tmp_path, base="base", resized=True)
    with pytest.raises(DataError, match=r"\[192, 32\], this model's is \[128, 32\].*set resize_vocab"):
        load_adapter(base, model.config, str(tmp_path))
    half = dict(params)
    save_adapter(half, whole_modules(half, adapter_mask(half), ["embed_tokens"]), config, tmp_path, base="base")
    with pytest.raises(DataError, match=r"lm_head: none.*new rows are lost"):
        load_model(str(checkpoint("llama")), adapter=str(tmp_path))
    assert vocabulary_of(model.config, checkpoint("llama"), [tmp_path / "none"]) == (model.config, None)
