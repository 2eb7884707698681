"""The configuration of a decoder: everything about its computation, nothing about the source of its weights."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv:2104.09864), and how its frequencies are scaled for long contexts."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"] = "default"
    dim: int | None = None  # how many of a head's first dimensions rotate; None: all
    interleaved: bool = False  # dimensions 2i and 2i + 1 rotate together, not i and i + dim / 2
    turning: int | None = None  # proportional: how many of the frequencies are not zero
    clockwise: bool = False
    factor: float = 1.0
    original_length: int = 0  # positions that the model was trained on before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the bounds of its ramp
    short_factor: tuple[float, ...] = ()  # longrope: for each frequency, in segments up to original_length
    long_factor: tuple[float, ...] = ()  # longrope: in longer segments
    attention_factor: float = 1.0  # yarn, longrope: factor of cos and sin


@dataclass(frozen=True)
class QueryScale:
    """Queries that grow with their position, so that attention stays sharp over many keys (arXiv:2501.19399).

    The factor is `1 + beta * log(1 + floor((position + offset) / length))`.
    """

    beta: float
    length: int
    offset: int = 0


@dataclass(frozen=True)
class Layer:
    """Options of one layer of a decoder."""

    window: int | None = None  # how many tokens a token sees, itself included; None: all
    rope: int | None = 0  # which of DecoderConfig.ropes rotates its queries and keys; None: none
    sparse: bool = False  # a mixture of experts instead of the MLP
    linear: bool = False  # the gated delta rule instead of attention
    conv: bool = False  # a short convolution instead of attention
    chunked: bool = False  # the window does not slide: a token sees back to the last multiple of its length
    query_scale: QueryScale | None = None  # of its queries; None: they do not grow
    head_dim: int | None = None  # of its heads; None: the model's
    num_key_value_heads: int | None = None  # None: the model's
    intermediate_size: int | None = None  # of its MLP; None: the model's
    value_is_key: bool = False  # one kernel gives both; what makes them differ comes after it
    # Of later layers with a window, or of those without one, some may take the keys and values of the last that has
    # its own: "stored" there, "reused" here.
    keys_values: Literal["own", "stored", "reused"] = "own"


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1).

    Queries and keys have a part without positions and a part that rotates. Keys and values come from one short vector
    per token, and a cache holds only these vectors.
    """

    kv_rank: int
    nope_dim: int  # of a query or key, without positions
    rope_dim: int  # of a query or key, the rotated part; one such key serves all heads
    value_dim: int
    q_rank: int | None = None  # None: queries come directly from the hidden state
    indexer: "Indexer | None" = None


@dataclass(frozen=True)
class Indexer:
    """What chooses the tokens that a token sees, if there are more than `top` (arXiv:2512.02556, section 2.1).

    jtune computes no choice: rows are at most `top` tokens long, in which a token sees all earlier ones.
    """

    heads: int
    head_dim: int
    top: int


@dataclass(frozen=True)
class Delta:
    """The gated delta rule (arXiv:2412.06464) of layers without attention."""

    key_heads: int  # of queries too; each serves value_heads / key_heads value heads
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int  # tokens that the convolution sees, the current one included
    joined: bool  # two kernels, by key head: queries, keys, values and gates; betas and decays. False: four kernels
    channels: bool = False  # a decay for each channel of a key, and Kimi's kernels (`jtune.models.kimi_delta`)


@dataclass(frozen=True)
class ShortConv:
    """The gated convolution of layers without attention (LFM2)."""

    taps: int  # tokens that it sees, the current one included
    bias: bool = False  # of the convolution and of both products


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: how many experts there are, and how the router chooses those of a token."""

    count: int
    per_token: int
    intermediate_size: int
    scoring: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    margin: float = 0.0  # sparsemixer: the share of its score by which an expert near to the best is worse at most
    renormalise: bool = True  # the weights of a token's experts sum to 1
    scale: float = 1.0  # factor of the weights
    sum_eps: float = 1e-20  # added to the sum that weights are divided by
    correction_bias: bool = False  # added to the scores for the choice, not for the weights (arXiv:2408.15664)
    correction_row: bool = False  # that bias is [1, experts] in files, not [experts]
    groups: int = 1  # number of groups of experts; the router chooses from the best `top_groups`
    top_groups: int = 1
    best_of_group: int = 2  # how many of its experts, the best, give the score of a group
    router_float32: bool = False  # its product is in float32 whatever the activations are; a sigmoid's always is
    router_bias: bool = False
    bias: bool = False  # of the experts' products
    shared_size: int = 0  # width of an additional MLP for all tokens
    shared_gate: bool = False  # a sigmoid per token weights the output of that MLP
    beside: bool = False  # of an MLP, each with norms of its own; and the router has a norm and scales (gemma 4)
    joined: bool = False  # one kernel of the experts for gate and up, also where the MLP has two
    scale_input: bool = False  # the weights are factors of the input of the experts, not of their output
    aux_coef: float = 0.0  # of the load-balancing loss, if a config asks for it


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. Field names are Hugging Face's, if it has one name for the thing.

    >>> DecoderConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    ...               num_attention_heads=4, num_key_value_heads=2, head_dim=16).layers == (Layer(), Layer())
    True
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    family: str = "llama"  # gives the tensor names of a checkpoint (see names.py)
    wrapper: str | None = None  # the image-text model that this is the text stack of, by its model_type
    layers: tuple[Layer, ...] = ()  # default: all alike, sparse if there are experts
    # Norms
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_scale: bool = True
    norm_bias: bool = False
    norm_offset: bool = False  # multiply by 1 + scale, in float32
    # Where the norms of a layer's two halves are: before each; before and after; only after. Parallel halves: with one
    # norm, or with two.
    block: Literal["before", "around", "after", "parallel", "parallel_two"] = "before"
    residual_multiplier: float = 1.0
    layer_scalar: bool = False  # a number for each layer multiplies its output; it never trains
    # Embeddings and head
    tie_word_embeddings: bool = False
    embedding_multiplier: float = 1.0
    embedding_norm: bool = False
    head_bias: bool = False
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    # Positions
    ropes: tuple[Rope, ...] = (Rope(),)
    per_layer_inputs: int = 0  # numbers that a second table adds to each token in each layer; 0: none (gemma 3n)
    per_layer_vocab_size: int = 0  # rows of that table
    learned_positions: int = 0  # rows of a table that is added to the embeddings; 0: no table
    alibi: float | None = None  # arXiv:2108.12409; factor of the slopes
    alibi_dtype: Literal["float32", "bfloat16"] = "float32"  # its biases are rounded to this dtype
    # Attention
    qkv: Literal["separate", "joined", "grouped"] = "separate"  # one kernel; one, by key head
    qkv_bias: bool = False
    o_bias: bool = False
    # One scale for all heads; one each; one norm over all; no scale, after the rotation, in layers that rotate.
    qk_norm: Literal["head", "heads", "all", "rotated"] | None = None
    qk_norm_after_rope: bool = False
    value_norm: bool = False  # RMS norm of each head's values, without a scale
    clip_qkv: float | None = None
    attention_scale: float | None = None  # default: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # cap * tanh(scores / cap)
    sinks: bool = False  # a learned score per head, which takes weight and has no value
    attention_gate: bool = False  # a sigmoid gates the output; the kernel of queries gives it too
    attention_gate_proj: bool = False  # the same, from a kernel of its own
    latent: Latent | None = None
    delta: Delta | None = None  # of linear layers
    short_conv: ShortConv | None = None  # of layers with a convolution
    # MLP
    mlp: Literal["gated", "joined", "interleaved", "plain"] = "gated"  # gate and up: two kernels, one; plain: no gate
    mlp_bias: bool = False
    hidden_act: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "xielu", "clamped"] = "silu"
    clamp: tuple[float, float] = (7.0, 1.702)  # of "clamped" (gpt-oss): limit, slope of the sigmoid
    experts: Experts | None = None

    def __post_init__(self):
        if not self.layers:
            layer = Layer(sparse=self.experts is not None)
            object.__setattr__(self, "layers", (layer,) * self.num_hidden_layers)
        if len(self.layers) != self.num_hidden_layers:
            raise ValueError(f"layers has {len(self.layers)} entries, num_hidden_layers is {self.num_hidden_layers}")

    @property
    def num_experts(self) -> int:
        """0: no experts."""
        return 0 if self.experts is None else self.experts.count

    def heads_of(self, layer: Layer) -> tuple[int, int]:
        """The number of key heads of a layer, and the dimensions of its heads."""
        return layer.num_key_value_heads or self.num_key_value_heads, layer.head_dim or self.head_dim

    @property
    def widest_head(self) -> int:
        """Dimensions of the widest heads of all layers."""
        return max(self.qk_dim, self.value_dim, *(layer.head_dim or 0 for layer in self.layers))

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
        """Dimensions that may rotate; `Rope.dim` may leave out some of them."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def active_intermediate_size(self) -> int:
        """Width of the MLP that a token passes through in the widest kind of layer: its experts and the shared MLP."""
        if self.experts is None:
            return self.intermediate_size
        sparse = self.experts.per_token * self.experts.intermediate_size + self.experts.shared_size
        return sparse if all(layer.sparse for layer in self.layers) else max(sparse, self.intermediate_size)
