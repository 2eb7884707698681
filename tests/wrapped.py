"""Tiny image-text models, written by transformers itself. Needs torch."""

from pathlib import Path

import numpy as np
from tiny import BASE, DELTA, FAMILIES, QWEN_EXPERTS

TOWER = {  # a vision tower's own names of things differ: each takes those that it knows
    "depth": 1,
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "embed_dim": 32,
    "out_hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_attention_heads": 2,
    "attention_heads": 2,
    "spatial_merge_size": 2,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "num_position_embeddings": 16,
    "init_pos_emb_height": 4,
    "init_pos_emb_width": 4,
}
IMAGE = {"image_size": 16, "patch_size": 4}


def mrope(*sections, **fields):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "mrope_section": list(sections), **fields}}


QWEN3_VL = {"head_dim": 16, **mrope(4, 2, 2, mrope_interleaved=True)}
# model_type -> (model_type of its text stack, what that needs besides the usual fields)
WRAPPED = {
    "exaone4_5": ("exaone4", FAMILIES["exaone4"]),
    "gemma3": ("gemma3_text", FAMILIES["gemma3_text"]),
    "gemma4": ("gemma4_text", FAMILIES["gemma4_text"]),
    "gemma4_unified": (
        "gemma4_unified_text",
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 8,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "glm46v": ("glm4v_text", mrope(1, 1, 0, partial_rotary_factor=0.5)),
    "glm4v": ("glm4v_text", mrope(1, 1, 0, partial_rotary_factor=0.5)),
    "glm4v_moe": (
        "glm4v_moe_text",
        {key: value for key, value in FAMILIES["glm4_moe"].items() if key != "use_qk_norm"}
        | mrope(2, 1, 1, partial_rotary_factor=0.5),
    ),
    "glm_ocr": ("glm_ocr_text", {"head_dim": 16, **mrope(2, 1, 1, partial_rotary_factor=0.5)}),
    "idefics3": ("llama", {}),
    "internvl": ("qwen2", {}),
    "lfm2_vl": ("lfm2", FAMILIES["lfm2"]),
    "llama4": ("llama4_text", FAMILIES["llama4_text"]),
    "llava": ("llama", {}),
    "llava_next": ("llama", {}),
    "llava_onevision": ("qwen2", {}),
    "mistral3": ("mistral", {"head_dim": 16}),
    "qwen2_5_vl": ("qwen2_5_vl_text", mrope(1, 1, 2)),
    "qwen2_vl": ("qwen2_vl_text", mrope(1, 1, 2)),
    "qwen3_5": ("qwen3_5_text", DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", DELTA | QWEN_EXPERTS),
    "qwen3_vl": ("qwen3_vl_text", QWEN3_VL),
    "qwen3_vl_moe": (
        "qwen3_vl_moe_text",
        {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, **QWEN3_VL},
    ),
    "smolvlm": ("llama", {}),
}


def make_wrapped(kind: str, seed: int = 0, **changes):
    """A torch model whose weights are all off their usual start, so that each of them matters."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    text, options = WRAPPED[kind]
    tower = CONFIG_MAPPING[kind](vision_config={}).vision_config.to_dict()
    vision = {key: value for key, value in TOWER.items() if key in tower} | {"model_type": tower["model_type"]}
    for key, value in IMAGE.items():
        if key in tower:
            vision[key] = [value, value] if isinstance(tower[key], list) else value
    ids = {"image_token_id": 5, "image_token_index": 5, "video_token_id": 6}
    config = CONFIG_MAPPING[kind](
        text_config={**BASE, **options, "model_type": text}, vision_config=vision, **ids, **changes
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            x = torch.from_numpy(rng.standard_normal(p.shape, dtype=np.float32))
            p.add_(0.1 * x) if p.ndim == 1 else p.copy_(x / np.sqrt(p.shape[-1]))
            if name.endswith("A_log"):
                p.copy_(0.5 * x - 2)
    return model


def read_back(folder: Path):
    """A checkpoint in transformers' own class."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()
