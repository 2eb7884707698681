"""Kimi Linear: the delta rule with a decay for each channel, and latent attention without positions between; experts
as in DeepSeek-V3."""

from jtune.errors import DataError
from jtune.models.config import Delta, Latent, Layer
from jtune.models.families import deepseek_v3
from jtune.models.families.base import Asked, Family, Fields, Names, common

# The config's names of what DeepSeek-V3's has as well.
KEYS = {
    "n_group": "num_expert_group",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "norm_topk_prob": "moe_renormalize",
    "max_position_embeddings": "model_max_length",
}
PATTERNS = (
    (r"\.mlp\.(gate|experts|shared_experts|e_score_correction_bias)\b", r".block_sparse_moe.\1"),
    (r"\.e_score_correction_bias$", ".gate.e_score_correction_bias"),
    (r"(\.experts\.\d+)\.gate_proj\.", r"\1.w1."),
    (r"(\.experts\.\d+)\.down_proj\.", r"\1.w2."),
    (r"(\.experts\.\d+)\.up_proj\.", r"\1.w3."),
)
# transformers writes its dense layers, too, under the name of those with experts.
ALSO_READ = ((r"\.block_sparse_moe\.((gate|up|down)_proj)\.", r".mlp.\1."),)
WORDS = {"linear_attn": "self_attn"}
GATED = {name: f"forget_gate.{name}" for name in ("f_a_proj", "f_b_proj")}  # in transformers' model


def read(c: Asked) -> Fields:
    # No layer has positions. What reads a rotation gets the usual one.
    full = c.also(**{ours: c[key] for ours, key in KEYS.items()}, rope_parameters={"rope_theta": 1e4})
    latent = Latent(c["kv_lora_rank"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], c["q_lora_rank"])
    heads, width = c["linear_num_heads"], c["linear_head_dim"]
    c.get("qk_head_dim")  # the sum of two others
    return {
        **common(full),
        "head_dim": latent.nope_dim + latent.rope_dim,
        "ropes": (),
        "latent": latent,
        "qkv_bias": bool(c["attention_bias"]),
        "o_bias": bool(c["attention_bias"]),
        "delta": Delta(heads, heads, width, width, c["linear_conv_kernel_dim"], joined=False, channels=True),
        "experts": deepseek_v3.grouped_experts(full),
        "layers": _layers(c),
    }


def _layers(c: Asked) -> tuple[Layer, ...]:
    layers = []
    for kind, mlp in zip(c["layer_types"], c["mlp_layer_types"], strict=True):
        if kind not in ("full_attention", "linear_attention") or mlp not in ("dense", "sparse"):
            raise DataError(f"config.json: layer_types: {kind!r} with {mlp!r} is not supported")
        layers.append(Layer(rope=None, linear=kind == "linear_attention", sparse=mlp == "sparse"))
    return tuple(layers)


FAMILY = Family(
    read,
    lambda config: Names(words=WORDS, patterns=PATTERNS, also_read=ALSO_READ),
    modules=lambda config: Names(words=WORDS | GATED),
)
