"""Each family: logits, gradients, answers and files are those of transformers. A new one is a line in tiny.FAMILIES."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import BASE, FAMILIES, GEMMA3, LLAMA3, MINISTRAL3, PARTIAL, ids, logits_of, make_model, save, write
from wrapped import WRAPPED

from jtune.errors import ConfigError, DataError
from jtune.generation import Sampling, decode, generate
from jtune.interop import hf
from jtune.loading.inference import load_model
from jtune.models import CausalLM
from jtune.models.families import FAMILIES as SUPPORTED
from jtune.models.families import decoder_config, full_config, module_names
from jtune.models.moe import balance_loss
from jtune.models.names import located, module_name

torch = pytest.importorskip("torch")

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 3.5],
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
OLD_FALCON = {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}
GEMMA4_EXPERTS = {
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
# family, what is unusual about it, tokens in a row
OPTIONS = [
    ("afmoe", {"mup_enabled": True, "num_dense_layers": 0, "attention_bias": True, "num_shared_experts": 2}, 30),
    ("apertus", {"attention_bias": True, "hidden_act": "relu2", "tie_word_embeddings": True}, 30),
    ("cohere", {"use_qk_norm": True, "attention_bias": True}, 30),
    ("cohere2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}, 30),
    ("cwm", {"mlp_bias": True, "layer_types": ["sliding_attention", "full_attention"] * 2}, 30),
    ("deepseek_v2", {"topk_method": "greedy", "mlp_bias": True, "routed_scaling_factor": 2.0, "n_group": None}, 30),
    ("deepseek_v2", {"q_lora_rank": None, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.6}}, 100),
    (
        "deepseek_v3",
        {"q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False, "attention_bias": True},
        30,
    ),
    ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}, "n_shared_experts": 2}, 100),
    ("deepseek_v32", {"index_topk": 30, "attention_bias": True, "norm_topk_prob": False, "rope_parameters": YARN}, 30),
    ("dots1", {"attention_bias": True, "norm_topk_prob": True, "sliding_window": None, "n_shared_experts": 2}, 30),
    ("ernie4_5", {"use_bias": True, "tie_word_embeddings": True}, 30),
    (
        "ernie4_5_moe",
        {"use_bias": True, "moe_layer_interval": 2, "moe_layer_start_index": 0, "moe_layer_end_index": 2},
        30,
    ),
    ("ernie4_5_moe", {"moe_num_shared_experts": 0, "tie_word_embeddings": True}, 30),
    ("exaone_moe", {"mlp_layer_types": ["sparse", "dense"] * 2, "layer_types": ["full_attention"] * 4}, 30),
    ("falcon", OLD_FALCON, 30),
    ("falcon", OLD_FALCON | {"alibi": True, "parallel_attn": False, "bias": True}, 60),
    ("falcon", OLD_FALCON | {"multi_query": True, "alibi": True, "hidden_size": 48, "num_attention_heads": 6}, 60),
    ("falcon", {"num_ln_in_parallel_attn": 1, "bias": True, "ffn_hidden_size": 56}, 30),
    ("bloom", {"hidden_size": 48, "n_head": 6}, 30),
    ("flex_olmo", {"attention_bias": True, "norm_topk_prob": True, "tie_word_embeddings": True}, 30),
    ("gemma", {"attention_bias": True, "hidden_act": "gelu"}, 30),
    ("gemma3_text", {"final_logit_softcapping": 5.0, "attention_bias": True, "rope_parameters": BY_KIND}, 100),
    ("gemma4_text", GEMMA4_EXPERTS, 30),
    (
        "gemma4_text",
        {"final_logit_softcapping": 5.0, "num_kv_shared_layers": 0, "num_hidden_layers": 2, "layer_types": GEMMA3[1:3]},
        30,
    ),
    ("glm", {"attention_bias": False, "rope_parameters": PARTIAL | {"partial_rotary_factor": 1.0}}, 30),
    ("glm4", {"attention_bias": True, "tie_word_embeddings": True}, 30),
    ("glm4_moe", {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0, "norm_topk_prob": False}, 30),
    ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense"] * 2, "attention_bias": True}, 30),
    ("glm_moe_dsa", {"mlp_layer_types": ["sparse", "dense"] * 2, "attention_bias": True}, 30),
    ("gpt2", {"n_inner": 40, "tie_word_embeddings": False, "scale_attn_weights": False}, 30),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False, "rope_parameters": PARTIAL}, 30),
    ("gpt_oss", {"rope_parameters": YARN | {"truncate": False}, "swiglu_alpha": 1.2, "num_experts_per_tok": 3}, 100),
    ("gpt_oss", {"attention_bias": False, "rope_parameters": PARTIAL | {"partial_rotary_factor": 1.0}}, 30),
    ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, 30),
    ("granitemoe", {"attention_bias": True, "embedding_multiplier": 3.0, "attention_multiplier": 0.3}, 30),
    ("granitemoeshared", {"shared_intermediate_size": 0, "attention_bias": True, "tie_word_embeddings": True}, 30),
    ("hunyuan_v1_dense", {"rope_parameters": DYNAMIC | {"alpha": 100.0}, "attention_bias": True}, 100),
    (
        "hunyuan_v1_moe",
        {"moe_topk": [1] * 4, "rope_parameters": DYNAMIC | {"alpha": 100.0}, "attention_bias": True},
        100,
    ),
    ("helium", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, 30),
    ("hyperclovax", {"use_post_norm": False, "attention_multiplier": 0.2, "attention_bias": True}, 30),
    ("hy_v3", {"mlp_layer_types": ["sparse", "dense"] * 2, "attention_bias": True, "mlp_bias": True}, 30),
    ("internlm3", {"attention_bias": True, "mlp_bias": True, "rope_parameters": DYNAMIC}, 100),
    ("jais2", {"attention_bias": False, "mlp_bias": False, "hidden_act": "gelu"}, 30),
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}, 100),
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}, 30),
    ("llama", {"rope_parameters": LONGROPE}, 100),
    ("llama", {"rope_parameters": LONGROPE}, 30),
    (
        "kimi_linear",
        {
            "q_lora_rank": 24,
            "attention_bias": True,
            "mlp_layer_types": ["sparse", "dense"],
            "linear_conv_kernel_dim": 3,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
        },
        100,
    ),
    ("lfm2", {"conv_bias": True, "conv_L_cache": 4, "block_ffn_dim_multiplier": 1.3}, 30),
    ("lfm2", {"block_auto_adjust_ff_dim": False, "layer_types": None, "full_attn_idxs": [0, 2]}, 30),
    ("lfm2_moe", {"use_expert_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 2.0}, 30),
    (
        "llama4_text",
        {"num_experts_per_tok": 2, "use_qk_norm": False, "moe_layers": [0, 1, 3], "no_rope_layers": [0, 1, 1, 1]},
        30,
    ),
    ("llama4_text", {"attention_chunk_size": None, "attn_temperature_tuning": False, "attention_bias": True}, 30),
    (
        "llama4_text",
        {"layer_types": ["chunked_attention"] * 4, "rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}},
        100,
    ),
    ("mellum", {"mlp_layer_types": ["sparse", "dense"] * 2, "norm_topk_prob": False, "attention_bias": True}, 30),
    ("minicpm3", {"q_lora_rank": None, "attention_bias": True, "mlp_bias": True, "rope_parameters": LONGROPE}, 100),
    ("minimax_m2", {"rope_parameters": YARN, "tie_word_embeddings": True}, 100),
    ("ministral3", {"rope_parameters": MINISTRAL3 | {"llama_4_scaling_beta": 0.0}, "sliding_window": 8}, 30),
    ("mixtral", {"num_experts_per_tok": 1, "tie_word_embeddings": True}, 30),
    ("nanochat", {"attention_bias": True, "tie_word_embeddings": True, "final_logit_softcapping": None}, 30),
    ("nemotron", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, 30),
    ("olmo", {"clip_qkv": None, "attention_bias": True, "tie_word_embeddings": True}, 30),
    ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}, 30),
    ("olmoe", {"clip_qkv": None, "norm_topk_prob": True, "attention_bias": True}, 30),
    (
        "phi3",
        {"rope_parameters": LONGROPE | {"partial_rotary_factor": 1.0}, "original_max_position_embeddings": 64},
        100,
    ),
    ("phi3", {"sliding_window": 8, "rope_parameters": PARTIAL, "hidden_act": "gelu"}, 30),
    (
        "phimoe",
        {"rope_parameters": LONGROPE | {"short_mscale": 1.2, "long_mscale": 1.2}, "sliding_window": 8},
        30,
    ),
    ("qwen2_moe", {"norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": [], "qkv_bias": False}, 30),
    ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1], "attention_bias": True}, 30),
    ("seed_oss", {"attention_out_bias": True, "mlp_bias": True, "attention_bias": False}, 30),
    (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 0, 1, 0], "mlp_bias": True},
        30,
    ),
    ("solar_open", {"attention_bias": True, "norm_topk_prob": False, "rope_parameters": YARN}, 100),
    ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True}, 30),
    ("starcoder2", {"use_bias": False, "sliding_window": 8, "tie_word_embeddings": False}, 30),
    ("youtu", {"rope_interleave": False, "q_lora_rank": None, "tie_word_embeddings": True}, 30),
    ("vaultgemma", {"attention_bias": True, "layer_types": ["full_attention", "sliding_attention"] * 2}, 30),
]


BUFFERS = ("e_score_correction_bias", "expert_bias", "layer_scalar", "act_fn.beta", "act_fn.eps")

# Whose layers and options are those of others: they are tested when there is time.
LIKE_OTHERS = {"afmoe", "cwm", "dots1", "exaone_moe", "flex_olmo", "glm4_moe_lite", "glm_moe_dsa", "granitemoeshared"}
LIKE_OTHERS |= {"helium", "hy_v3", "internlm3", "jais2", "mellum", "minimax_m2", "nemotron", "olmoe", "solar_open"}
LIKE_OTHERS |= {"vaultgemma", "youtu"}


def timed(option):
    return pytest.param(*option, marks=pytest.mark.slow if option[0] in LIKE_OTHERS else ())


# Whose caches differ in kind; the others are answered for when there is time.
CACHES = ("llama", "mistral", "gemma3_text", "deepseek_v3", "gpt_oss", "bloom")


def slow_but(family):
    return pytest.param(family, marks=() if family in CACHES else pytest.mark.slow)


def close(ours, theirs, atol=1e-4):
    assert np.abs(np.asarray(ours) - theirs).max() < atol * theirs.std()


def in_transformers(model, params, theirs):
    """PEFT finds a module by its name in transformers' model."""
    found, their = {name for name, _ in theirs.named_modules()}, module_names(model.config)
    for path, _, layers in located(params):
        for layer in layers or (None,) if path[-1] == "kernel" else ():
            of_experts = path[: path.index("experts")] if "experts" in path else None
            name = module_name(of_experts or path[:-1], their, layer=layer) + ".experts" * bool(of_experts)
            assert name in found


def test_every_family_is_tested():
    # Not in transformers: see their own tests.
    untold = {"aquila", "bailing_moe", "internlm2", "mimo", "minicpm", "orion", "xverse"}
    untold |= {text for text, _ in WRAPPED.values()}  # no causal model of their own: see test_wrapped.py
    assert set(FAMILIES) | untold == set(SUPPORTED)


@pytest.mark.parametrize("family", [timed((family,)) for family in FAMILIES])
def test_a_family_is_what_transformers_has(family, checkpoint, tmp_path, monkeypatch):
    folder = checkpoint(family)
    model, params = load_model(str(folder))
    theirs = make_model(family)
    tokens = ids()

    # Logits, and gradients of all parameters, by what we save them as.
    def loss(params):
        logits = model.apply({"params": params}, tokens)
        return -jnp.mean(jax.nn.log_softmax(logits[:, :-1])[:, :, 5]), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    close(logits, logits_of(theirs, tokens))
    source = hf.read_config(folder)
    hf.save_model(gradients, model.config, source, tmp_path / "gradients")
    (-theirs(torch.tensor(tokens)).logits[:, :-1].log_softmax(-1)[:, :, 5].mean()).backward()
    with torch.no_grad():  # saved by transformers as its parameters are
        for p in theirs.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    save(theirs, tmp_path / "theirs")
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("gradients", "theirs"))
    for name, x in expected.items():
        if not name.endswith(BUFFERS):
            np.testing.assert_allclose(ours[name], x, atol=2e-6 + 1e-4 * np.abs(x).max(), err_msg=name)

    # Names, in adapters and in files; files, to the bit.
    in_transformers(model, params, theirs)
    hf.save_model(params, model.config, source, tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize("family", [slow_but(family) for family in FAMILIES])
def test_answers_are_those_of_transformers(family, checkpoint, monkeypatch):
    """Prompts of several lengths in one batch, past all windows."""
    monkeypatch.setattr(decode, "BUCKET", 16)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 128, n).tolist() for n in (5, 13, 9)]
    theirs = make_model(family)
    theirs.generation_config.eos_token_id = None
    model, params = load_model(str(checkpoint(family)))
    ours = generate(model, params, prompts, Sampling(max_new_tokens=20))
    for prompt, answer in zip(prompts, ours):
        whole = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert answer == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("family", "options", "seq"), [timed(option) for option in OPTIONS])
def test_unusual_settings(family, options, seq, tmp_path):
    model, params = load_model(str(write(tmp_path, family, **options)))
    tokens = ids(2, seq)
    logits = jax.jit(lambda params: model.apply({"params": params}, tokens))(params)
    close(logits, logits_of(make_model(family, **options), tokens))


def test_internlm2_is_llama_with_other_names(checkpoint, tmp_path):
    stored, source = load_file(checkpoint("llama") / "model.safetensors"), hf.read_config(checkpoint("llama"))
    heads, groups, width = 4, 2, 8
    from jtune.models.families.internlm2 import WORDS

    renamed = {}
    for name, x in stored.items():
        parts = [WORDS.get(part, part) for part in name.split(".")]
        renamed[".".join(parts)] = x
    for layer in range(4):
        q, k, v = (stored[f"model.layers.{layer}.self_attn.{x}_proj.weight"] for x in "qkv")
        joined = [q.reshape(groups, heads // groups, width, -1), *(x.reshape(groups, 1, width, -1) for x in (k, v))]
        for x in "qkv":
            del renamed[f"model.layers.{layer}.attention.{x}_proj.weight"]
        renamed[f"model.layers.{layer}.attention.wqkv.weight"] = np.concatenate(joined, 1).reshape(-1, q.shape[1])
    save_file({name: np.ascontiguousarray(x) for name, x in renamed.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(source | {"model_type": "internlm2", "bias": False}))
    model, params = load_model(str(tmp_path))
    close(model.apply({"params": params}, ids()), logits_of(make_model("llama"), ids()))


MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 4.0}
GRANITE = {"attention_multiplier": 8**-0.5, "tie_word_embeddings": True, **MULTIPLIERS}
SARVAM = {
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "rope_parameters": PARTIAL,
}
LING = {**SARVAM, "use_bias": False, "score_function": "sigmoid", "router_dtype": "fp32", "rms_norm_eps": 1e-6}
WHOLE = {"use_qkv_bias": False, "rope_parameters": PARTIAL | {"partial_rotary_factor": 1.0}}


@pytest.mark.parametrize(
    ("name", "family", "options", "own"),
    [
        ("aquila", "llama", {}, {}),
        ("bailing_moe", "sarvam_moe", SARVAM, LING),
        # minicpm's config.json does not say that its head is tied
        ("minicpm", "granite", GRANITE, {"scale_emb": 3.0, "scale_depth": 1.4, "dim_model_base": 8}),
        ("mimo", "qwen2", {}, {"attention_bias": True, "num_nextn_predict_layers": 1, "tie_word_embeddings": True}),
        ("orion", "stablelm", WHOLE, {"rms_norm_eps": 1e-5, "hidden_act": "silu"}),
        ("xverse", "llama", {}, {"max_tokenizer_truncation": 8192}),
    ],
)
def test_what_transformers_has_no_class_for_computes_what_another_family_does(name, family, options, own, tmp_path):
    source = hf.read_config(write(tmp_path, family, **options))
    usual = {"vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rope_parameters"}
    usual |= {"hidden_size", "intermediate_size", "max_position_embeddings", "hidden_act", "rms_norm_eps", "dtype"}
    kept = {key: x for key, x in source.items() if key in usual} | own | {"model_type": name}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    model, params = load_model(str(tmp_path))
    close(model.apply({"params": params}, ids()), logits_of(make_model(family, **options), ids()))
    for key in ("sparse_config", "norm_head"):
        with pytest.raises(DataError, match=key):
            decoder_config(kept | {key: 8})


def test_what_predicts_tokens_after_the_next_is_left_out(checkpoint, tmp_path):
    """Layers after the last, as DeepSeek and GLM publish them, and modules of their own, as Qwen and others do."""
    shutil.copytree(checkpoint("glm4_moe"), tmp_path, dirs_exist_ok=True)
    stored, x = load_file(tmp_path / "model.safetensors"), np.zeros(2, np.float32)
    more = ["model.layers.4.eh_proj.weight", "model.layers.4.mlp.gate.weight", "mtp.fc.weight", "model.mtp_block.0.x"]
    save_file(stored | dict.fromkeys(more, x), tmp_path / "model.safetensors")
    load_model(str(tmp_path))
    save_file(stored | {"model.layers.4.mlp.gate.weight": x}, tmp_path / "model.safetensors")  # no such head
    with pytest.raises(DataError, match=r"model\.layers\.4\.mlp\.gate\.weight has no place"):
        load_model(str(tmp_path))


@pytest.mark.slow
def test_kimi_linear_is_read_as_transformers_writes_it_too(checkpoint, tmp_path):
    make_model("kimi_linear").save_pretrained(tmp_path)
    folders = tmp_path, checkpoint("kimi_linear")
    names, published = (load_file(folder / "model.safetensors").keys() for folder in folders)
    assert names != published
    jax.tree.map(np.testing.assert_array_equal, *(load_model(str(folder))[1] for folder in folders))


def test_rows_in_which_a_token_sees_a_choice_are_refused(checkpoint):
    model, params = load_model(str(checkpoint("deepseek_v32")))
    model.apply({"params": params}, ids(1, 64))
    with pytest.raises(ConfigError, match="rows of 65 tokens: above 64"):
        model.apply({"params": params}, ids(1, 65))
    with pytest.raises(ConfigError, match="index_topk"):
        generate(model, params, [[3, 4, 5]], Sampling(max_new_tokens=100))


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_an_option_that_no_family_honours_is_refused_by_every_one(family):
    inside = dict(WRAPPED.values())  # text models of image-text models
    needed = {"tie_word_embeddings": False, "score_function": "sigmoid"}  # of those without a class of their own
    sizes = {**BASE, **needed, **FAMILIES.get(family, inside.get(family, {}))}
    if "attention_dropout" not in full_config({"model_type": family, **sizes})[1]:
        pytest.skip("its config has no such option")
    with pytest.raises(DataError, match=r"does not support .*attention_dropout=0\.5"):
        decoder_config({"model_type": family, **sizes, "attention_dropout": 0.5})


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC, LLAMA3])
def test_a_segments_frequencies_are_its_own(rope, tmp_path):
    """What a long sequence is packed with does not stretch a short one."""
    folder = write(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=64)
    model, params = load_model(str(folder))
    long, short = ids(1, 80, seed=2), ids(1, 20, seed=3)
    row = np.concatenate([long, short], axis=1)
    positions = np.concatenate([np.arange(80), np.arange(20)])[None]
    segments = np.repeat([1, 2], [80, 20])[None]
    packed = model.apply({"params": params}, row, positions, segments)
    for piece, alone in ((packed[:, :80], long), (packed[:, 80:], short)):
        np.testing.assert_allclose(piece, model.apply({"params": params}, alone), atol=2e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "granitemoe"])
def test_the_balance_loss_is_that_of_transformers(family, checkpoint, tmp_path):
    folder = write(tmp_path, family, output_router_logits=True, router_aux_loss_coef=0.1)
    model, params = load_model(str(folder))
    assert model.config.experts.aux_coef == 0.1
    tokens, real = ids(), np.ones((2, 30), np.int32)
    real[1, 20:] = 0
    hidden = CausalLM(model.config).apply({"params": params}, tokens, None, real, method="hidden")
    theirs = make_model(family, output_router_logits=True, router_aux_loss_coef=0.1)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), attention_mask=torch.tensor(real), output_router_logits=True).aux_loss
    np.testing.assert_allclose(balance_loss(hidden.load), expected, rtol=1e-5)
