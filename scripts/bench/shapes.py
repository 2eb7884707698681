"""The models that gpu.py measures, and how many operations a token costs them.

One multiplication and addition are two operations. Only what the method needs is counted: not what is recomputed to
save memory, not the look-up of embeddings; attention is causal and counted segment by segment.
"""

from make import LLAMA_28M

LLAMA3 = {
    **LLAMA_28M,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "dtype": "bfloat16",
}
SHAPES = {
    "Qwen2.5-0.5B": {
        **LLAMA3,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        **LLAMA3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        **LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
TINY = {
    "tiny qwen2": {**SHAPES["Qwen2.5-0.5B"], "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16},
    "tiny llama": {**SHAPES["Llama-3.1-8B"], "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16},
}
for shape in TINY.values():
    shape.update(num_hidden_layers=2, num_key_value_heads=2, intermediate_size=128, vocab_size=4096, dtype="float32")

# Dense bf16 operations a second, from the makers' data sheets; what a name must contain, the first that fits.
PEAK = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def peak_of(device: str) -> float | None:
    return next((peak for name, peak in PEAK.items() if name in device), None)


def operations(config: dict, method: str, *, tokens: int, labelled: int, pairs: int, rank: int) -> float:
    """Model operations of one update, forward and backward.

    Args:
      tokens: real ones.
      labelled: places whose logits are needed.
      pairs: (token, token that it sees), over all segments: n * (n + 1) / 2 for a segment of n.
    """
    D, F, L = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    q, kv = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    layer = D * q + 2 * D * kv + q * D + 3 * D * F
    head = D * config["vocab_size"]
    attention = 3 * 4 * L * q * pairs  # two products forward, four backward
    if method == "full":
        return 6 * (L * layer * tokens + head * labelled) + attention
    # Frozen kernels: no gradient of their own, and below the first adapters none of what goes in.
    adapters = L * rank * ((D + q) + 2 * (D + kv) + (q + D) + 3 * (D + F))
    first = 2 * (D * q + 2 * D * kv)
    return (4 * L * layer - first + 6 * adapters) * tokens + 4 * head * labelled + attention
