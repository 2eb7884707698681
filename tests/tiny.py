"""Tiny Hugging Face checkpoints of every family, written by transformers itself. Needs torch."""

import re
from pathlib import Path

import numpy as np

BASE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
GEMMA3 = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
LFM2 = ["conv", "conv", "full_attention", "conv"]
MINISTRAL3 = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8,  # queries grow every eight tokens
    "llama_4_scaling_beta": 0.4,
}
OLMO3 = {
    "full_attention": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,  # another than that of keys
}
QWEN_EXPERTS = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
INDEXER = {"index_topk": 64, "index_head_dim": 12, "index_n_heads": 2}
GRANITE_EXPERTS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "residual_multiplier": 0.3,
    "logits_scaling": 4.0,
}
FAMILIES = {
    "llama": {"rope_parameters": LLAMA3},
    "afmoe": {
        "head_dim": 16,
        "sliding_window": 8,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 1,
        "route_scale": 2.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "apertus": {"head_dim": 16},
    "arcee": {"head_dim": 16},
    "bloom": {"n_layer": 4, "n_head": 4},
    "cohere": {"logit_scale": 0.5, "num_key_value_heads": 2},
    "cohere2": {"head_dim": 16, "sliding_window": 8},
    "cwm": {"head_dim": 16, "sliding_window": 8},
    "deepseek_v2": LATENT | {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    "deepseek_v32": LATENT | INDEXER | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    "dots1": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "sliding_window": 8,
        "max_window_layers": 2,
    },
    "ernie4_5": {"head_dim": 8},
    "ernie4_5_moe": {
        "moe_intermediate_size": 24,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_num_shared_experts": 1,
        "tie_word_embeddings": False,
    },
    "exaone": {},
    "exaone_moe": {
        "head_dim": 16,
        "sliding_window": 8,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
    },
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24, "layer_types": GEMMA3},
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 16,
        "num_hidden_layers": 6,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "hidden_size_per_layer_input": 12,
        "vocab_size_per_layer_input": 128,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "first_k_dense_replace": 2,
        "use_qk_norm": True,
    },
    "glm4_moe_lite": LATENT | {"n_group": 4, "topk_group": 2},
    "glm_moe_dsa": LATENT | INDEXER,
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "swiglu_limit": 1.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granite": {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.3,
        "logits_scaling": 4.0,
    },
    "granitemoe": GRANITE_EXPERTS,
    "granitemoeshared": GRANITE_EXPERTS | {"shared_intermediate_size": 40},
    "hunyuan_v1_dense": {"head_dim": 16},
    "kimi_linear": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "linear_head_dim": 16,
        "linear_num_heads": 3,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": {"block_multiple_of": 8, "layer_types": LFM2},
    "lfm2_moe": {
        "layer_types": LFM2,
        "num_dense_layers": 1,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "llama4_text": {
        "head_dim": 16,
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
        "floor_scale": 6,
        "attn_scale": 0.5,
    },
    "ministral": {"sliding_window": 8, "head_dim": 16},
    "ministral3": {"head_dim": 16, "rope_parameters": MINISTRAL3},
    "mellum": {
        "head_dim": 16,
        "sliding_window": 8,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "minimax_m2": {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 3, "rope_parameters": PARTIAL},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "helium": {"head_dim": 8, "num_key_value_heads": 2},
    "hyperclovax": {"residual_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 0.5},
    "hy_v3": {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "internlm3": {"head_dim": 16},
    "iquestcoder": {"head_dim": 16},
    "jais2": {"head_dim": 16},
    "minicpm3": {key: value for key, value in LATENT.items() if "experts" not in key}
    | {"dim_model_base": 16, "scale_emb": 3, "tie_word_embeddings": False},
    "nanochat": {},
    "nemotron": {"head_dim": 16},
    "olmo": {"clip_qkv": 1.0},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 1.0},
    "olmo3": {"sliding_window": 8, "rope_parameters": OLMO3},
    "phi": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.4, "lm_head_bias": True, "attention_bias": True},
    "qwen2_moe": {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "qwen3_next": DELTA | QWEN_EXPERTS,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA | QWEN_EXPERTS,
    "sarvam_mla": LATENT | {"n_group": 4, "topk_group": 2},
    "seed_oss": {"head_dim": 16},
    "smollm3": {},
    "solar_open": {
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
    },
    "stablelm": {},
    "starcoder2": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24},
    "vaultgemma": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24},
    "youtu": {key: value for key, value in LATENT.items() if "experts" not in key} | {"tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
# Those that stand for the others where one of a kind is enough.
CORE = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral")


def make_model(family: str, seed: int = 0, **changes):
    """A torch model whose weights are all off their usual start, so that each of them matters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)  # some families draw what others set to zero
    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES.get(family, {}), **changes})
    # transformers' eager attention adds falcon's alibi twice.
    attention = "sdpa" if family == "falcon" else "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            x = torch.from_numpy(rng.standard_normal(p.shape, dtype=np.float32))
            p.add_(0.1 * x) if p.ndim == 1 else p.copy_(x / np.sqrt(p.shape[-1]))
            if name.endswith("A_log"):  # states that last: one token's query and key alone may be near to orthogonal,
                p.copy_(0.5 * x - 2)  # and what is near to zero has no direction, which is all that a norm leaves
        for name, b in sorted(model.named_buffers()):
            if name.endswith("layer_scalar"):
                b.copy_(torch.from_numpy(1 + 0.3 * rng.standard_normal(b.shape, dtype=np.float32)))
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                b.copy_(torch.from_numpy(0.2 * rng.standard_normal(b.shape, dtype=np.float32)))
    return model


def save(model, folder: Path) -> Path:
    """`save_pretrained`, with the names of the published files where it writes others."""
    from safetensors.numpy import load_file, save_file

    model.save_pretrained(folder)
    if model.config.model_type == "kimi_linear":  # its dense layers, too, get the name of those with experts
        file = folder / "model.safetensors"
        dense = re.compile(r"\.block_sparse_moe\.((gate|up|down)_proj)\.")
        save_file({dense.sub(r".mlp.\1.", name): x for name, x in load_file(file).items()}, file)
    return folder


def write(folder: Path, family: str, **changes) -> Path:
    return save(make_model(family, **changes), folder)


def logits_of(model, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def ids(batch: int = 2, seq: int = 30, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BASE["vocab_size"], (batch, seq)).astype(np.int32)
