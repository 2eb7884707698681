"""Tiny Hugging Face checkpoints of every family, written by transformers itself. Needs torch."""

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
FAMILIES = {
    "llama": {"rope_parameters": LLAMA3},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def make_model(family: str, seed: int = 0, **changes):
    """A torch model whose weights are all off their usual start, so that each of them matters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            x = torch.from_numpy(rng.standard_normal(p.shape, dtype=np.float32))
            p.add_(0.1 * x) if p.ndim == 1 else p.copy_(x / np.sqrt(p.shape[-1]))
    return model


def write(folder: Path, family: str, **changes) -> Path:
    make_model(family, **changes).save_pretrained(folder)
    return folder


def logits_of(model, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def ids(batch: int = 2, seq: int = 30, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BASE["vocab_size"], (batch, seq)).astype(np.int32)
