"""What a decoder is: everything that shapes its computation, nothing about where its weights come from."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv:2104.09864) and how its frequencies are stretched for long contexts."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_length: int = 0  # positions the unstretched model was trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the borders of its ramp
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. Field names are Hugging Face's where it has one name for the thing.

    >>> DecoderConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    ...               num_attention_heads=4, num_key_value_heads=2, head_dim=16).windows
    (None, None)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    family: str = "llama"  # whose tensor names a checkpoint has (see names.py)
    hidden_act: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope: Rope = Rope()
    windows: tuple[int | None, ...] = ()  # of each layer: how many tokens it sees, itself included; None: all
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head's queries and keys
    norm_offset: bool = False  # norms multiply by 1 + scale, in float32
    sandwich_norms: bool = False  # a norm after attention and after the MLP too
    scale_embeddings: bool = False  # by sqrt(hidden_size)
    attention_scale: float | None = None  # default: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # cap * tanh(scores / cap)
    logit_softcap: float | None = None
    num_experts: int = 0  # 0: a dense MLP
    num_experts_per_tok: int = 0

    def __post_init__(self):
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_hidden_layers)
        if len(self.windows) != self.num_hidden_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_hidden_layers} layers")
