"""What a decoder is: everything that shapes its computation, nothing about where its weights come from."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv:2104.09864) and how its frequencies are stretched for long contexts."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    dim: int | None = None  # how many of a head's first dimensions turn; None: all
    interleaved: bool = False  # dimensions 2i and 2i + 1 turn together, not i and i + dim / 2
    factor: float = 1.0
    original_length: int = 0  # positions the unstretched model was trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the borders of its ramp
    short_factor: tuple[float, ...] = ()  # longrope: of each frequency, in segments up to original_length
    long_factor: tuple[float, ...] = ()  # longrope: in longer ones
    attention_factor: float = 1.0  # yarn, longrope: cos and sin are multiplied by it


@dataclass(frozen=True)
class Layer:
    """What is special about one layer of a decoder."""

    window: int | None = None  # how many tokens a token sees, itself included; None: all
    rope: int | None = 0  # which of DecoderConfig.ropes turns its queries and keys; None: none
    sparse: bool = False  # a mixture of experts in the place of the MLP
    linear: bool = False  # the gated delta rule in the place of attention


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1): queries and keys have a part without positions and a
    part that turns; keys and values come from one short vector for each token, which is all that a cache holds."""

    kv_rank: int
    nope_dim: int  # of a query or key, without positions
    rope_dim: int  # of a query or key, that turns; one such key serves all heads
    value_dim: int
    q_rank: int | None = None  # None: queries come straight from the hidden state


@dataclass(frozen=True)
class Delta:
    """The gated delta rule (arXiv:2412.06464) of the layers that have no attention."""

    key_heads: int  # of queries as well; each serves as many value heads as there are more of these
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int  # how many tokens the convolution sees, the last one included
    joined: bool  # one kernel for queries, keys, values and gates, by key head, and one for betas and decays; or four


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: how many there are, and how each token's are chosen."""

    count: int
    per_token: int
    intermediate_size: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True  # the weights of a token's experts add up to 1
    scale: float = 1.0  # the weights are multiplied by it
    correction_bias: bool = False  # added to the scores for the choice, not for the weights (arXiv:2408.15664)
    groups: int = 1  # experts are chosen from the best `top_groups` of so many groups
    top_groups: int = 1
    router_bias: bool = False
    bias: bool = False  # of the experts' products
    shared_size: int = 0  # width of the MLP that all tokens go through besides
    shared_gate: bool = False  # whose output is weighted, for each token, by a sigmoid
    aux_coef: float = 0.0  # of the load-balancing loss, where a config asks for it


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. Field names are Hugging Face's where it has one name for the thing.

    >>> DecoderConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    ...               num_attention_heads=4, num_key_value_heads=2, head_dim=16).layers
    (Layer(window=None, rope=0, sparse=False, linear=False), Layer(window=None, rope=0, sparse=False, linear=False))
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    family: str = "llama"  # whose tensor names a checkpoint has (see names.py)
    layers: tuple[Layer, ...] = ()  # default: all alike, with experts if there are any
    # Norms
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_scale: bool = True
    norm_bias: bool = False
    norm_offset: bool = False  # multiply by 1 + scale, in float32
    # How a layer's two halves meet the residual: each normed before; before and after; after only; side by side from
    # one norm; or side by side from two.
    block: Literal["before", "around", "after", "parallel", "parallel_two"] = "before"
    residual_multiplier: float = 1.0
    # Embeddings and head
    tie_word_embeddings: bool = False
    embedding_multiplier: float = 1.0
    embedding_norm: bool = False
    head_bias: bool = False
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    # Positions
    ropes: tuple[Rope, ...] = (Rope(),)
    learned_positions: int = 0  # rows of a table that is added to the embeddings; 0: there is none
    alibi: float | None = None  # arXiv:2108.12409; the slopes are multiplied by it
    alibi_dtype: Literal["float32", "bfloat16"] = "float32"  # that its biases are rounded to
    # Attention
    qkv: Literal["separate", "joined", "grouped"] = "separate"  # one kernel: q, k, v; or so for each key head
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "heads", "all"] | None = None  # one scale for all heads, one each, or over all at once
    qk_norm_after_rope: bool = False
    clip_qkv: float | None = None
    attention_scale: float | None = None  # default: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # cap * tanh(scores / cap)
    sinks: bool = False  # a learned score for each head that takes weight and gives nothing
    attention_gate: bool = False  # what attention gives is weighted by a sigmoid, which queries' kernel has besides
    latent: Latent | None = None
    delta: Delta | None = None  # of the layers that are linear
    # MLP
    mlp: Literal["gated", "joined", "interleaved", "plain"] = "gated"  # gate and up: two kernels, one; or no gate
    mlp_bias: bool = False
    hidden_act: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped"] = "silu"
    clamp: tuple[float, float] = (7.0, 1.702)  # of "clamped" (gpt-oss): limit, slope of the sigmoid
    experts: Experts | None = None

    def __post_init__(self):
        if not self.layers:
            layer = Layer(sparse=self.experts is not None)
            object.__setattr__(self, "layers", (layer,) * self.num_hidden_layers)
        if len(self.layers) != self.num_hidden_layers:
            raise ValueError(f"{len(self.layers)} layers are described, num_hidden_layers is {self.num_hidden_layers}")

    @property
    def num_experts(self) -> int:
        """0: there are none."""
        return 0 if self.experts is None else self.experts.count

    @property
    def qk_dim(self) -> int:
        """Dimensions of a head's queries and keys."""
        return self.head_dim if self.latent is None else self.latent.nope_dim + self.latent.rope_dim

    @property
    def value_dim(self) -> int:
        """Dimensions of a head's values."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def rope_dim(self) -> int:
        """Dimensions that may turn; `Rope.dim` may leave some of them."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def active_intermediate_size(self) -> int:
        """Width of what a token goes through in the widest kind of layer's MLP: its experts, and those it shares."""
        if self.experts is None:
            return self.intermediate_size
        sparse = self.experts.per_token * self.experts.intermediate_size + self.experts.shared_size
        return sparse if all(layer.sparse for layer in self.layers) else max(sparse, self.intermediate_size)
