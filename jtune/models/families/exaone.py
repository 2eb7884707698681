"""EXAONE 3 and 3.5: Llama with other names."""

from jtune.models.families import llama
from jtune.models.families.base import Family, Names

WORDS = {
    "embed_tokens": "wte",
    "layers": "h",
    "norm": "ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn": "attn.attention",
    "o_proj": "out_proj",
    "gate_proj": "c_fc_0",
    "up_proj": "c_fc_1",
    "down_proj": "c_proj",
}
FAMILY = Family(llama.read, lambda config: Names("transformer", WORDS), modules=lambda config: Names())
