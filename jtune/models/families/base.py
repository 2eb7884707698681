"""Shared parts of the family files: read a Hugging Face config, and name the tensors of a family."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jtune.errors import DataError
from jtune.models.config import DecoderConfig, Delta, Experts, Layer, Rope

Fields = dict[str, Any]  # of DecoderConfig

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
}
KINDS_OF_LAYER = ("full_attention", "sliding_attention")
KINDS_OF_ROPE = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")


class Asked(Mapping[str, Any]):
    """A config that records the keys that were read. A key that is not read is not honoured."""

    def __init__(self, content: Mapping[str, Any]):
        self._content = content
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return self._content[key]

    def also(self, **values: Any) -> "Asked":
        """The config with these values in the place of its own; what is read of it counts as read here."""
        other = Asked({**self._content, **values})
        other.read = self.read
        return other

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


@dataclass(frozen=True)
class Names:
    """The names that a family's files give to the tensors of jtune's tree, where they differ."""

    prefix: str = "model"
    words: Mapping[str, str] = field(default_factory=dict)  # jtune's name of a module -> the family's
    patterns: tuple[tuple[str, str], ...] = ()  # (regular expression, replacement), for the whole name of a tensor
    also_read: tuple[tuple[str, str], ...] = ()  # (regular expression, replacement), for names that some files have
    stacked_experts: bool = False  # one tensor holds all experts of a layer
    swapped_experts: bool = False  # PEFT takes their tensors, which are [in, out], for [out, in]
    per_head: frozenset[str] = frozenset()  # modules of jtune that the files split into one for each head
    as_is: frozenset[str] = frozenset()  # modules, or ends of their names, whose kernels the files store as [in, out]


class Family(NamedTuple):
    """A family: the meaning of its config.json, and the names in its files."""

    read: Callable[[Asked], Fields]
    names: Callable[[DecoderConfig], Names] = lambda config: Names()
    modules: Callable[[DecoderConfig], Names] | None = None  # in the model of transformers; default: as in the files
    config_of: str | None = None  # the model_type whose class reads the config if transformers has none for this one
    defaults: Mapping[str, Any] = {}  # of its config.json, where they are not those of that class


def common(c: Asked) -> Fields:
    """The fields that nearly every config has under the same names."""
    heads = c["num_attention_heads"]
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    fields = {
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "intermediate_size": c.get("intermediate_size") or 0,  # a model may have nothing but experts
        "num_hidden_layers": c["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": c.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "tie_word_embeddings": bool(c["tie_word_embeddings"]),
        "ropes": ropes(c, head_dim),
    }
    if "rms_norm_eps" in c:
        fields["norm_eps"] = c["rms_norm_eps"]
    if "hidden_act" in c:
        fields["hidden_act"] = activation(c)
    return fields


def layer_norm(eps: float, *, scale: bool = True, bias: bool = True) -> Fields:
    """LayerNorm instead of RMSNorm."""
    return {"norm": "layer", "norm_eps": eps, "norm_scale": scale, "norm_bias": bias}


def biases(c: Asked, *, key: str = "attention_bias") -> Fields:
    """A bias on all four products of attention, if the config says so."""
    return {"qkv_bias": bool(c.get(key)), "o_bias": bool(c.get(key))}


def activation(c: Asked, key: str = "hidden_act") -> str:
    """jtune's name of an activation; refuses unknown ones."""
    if c[key] not in ACTIVATIONS:
        raise DataError(f"config.json: {key} {c[key]!r} is not supported; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[c[key]]


def ropes(c: Asked, head_dim: int, **fields: Any) -> tuple[Rope, ...]:
    """The rotations of a model: one, or one for each of `KINDS_OF_LAYER` (see `sliding`)."""
    parameters = c["rope_parameters"]
    if not _by_kind(parameters):
        return (rope(parameters, c["max_position_embeddings"], head_dim, **fields),)
    present = next(parameters[kind] for kind in KINDS_OF_LAYER if parameters.get(kind))
    each = (parameters.get(kind) or present for kind in KINDS_OF_LAYER)  # any value serves for a kind without layers
    return tuple(rope(of_kind, c["max_position_embeddings"], head_dim, **fields) for of_kind in each)


def _by_kind(parameters: Mapping[str, Any]) -> bool:
    return any(kind in parameters for kind in KINDS_OF_LAYER)


def windows(c: Asked) -> list[int | None]:
    """The window of each layer, from `sliding_window`, `use_sliding_window` and `layer_types`."""
    count = c["num_hidden_layers"]
    window = c.get("sliding_window")
    kinds = c.get("layer_types") or ["sliding_attention"] * count
    for kind in kinds:
        if kind not in KINDS_OF_LAYER:
            raise DataError(f"config.json: layer_types: {kind!r} is not supported")
    if not window or c.get("use_sliding_window") is False:
        return [None] * count
    return [window if kind == "sliding_attention" else None for kind in kinds]


def delta(c: Asked, *, joined: bool) -> Fields:
    """Layers of the gated delta rule between those of full attention, whose output is gated."""
    for kind in c["layer_types"]:
        if kind not in ("full_attention", "linear_attention"):
            raise DataError(f"config.json: layer_types: {kind!r} is not supported")
    key_heads, value_heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
    if value_heads % key_heads:
        raise DataError(
            f"config.json: linear_num_value_heads {value_heads} is not a multiple of the {key_heads} key heads"
        )
    dims = c["linear_key_head_dim"], c["linear_value_head_dim"]
    return {
        "delta": Delta(key_heads, value_heads, *dims, c["linear_conv_kernel_dim"], joined),
        "layers": tuple(Layer(linear=kind == "linear_attention") for kind in c["layer_types"]),
        "attention_gate": True,
    }


def sliding(c: Asked) -> Fields:
    """Layers with different windows, and with different rotations if each kind of layer has its own."""
    if not _by_kind(c["rope_parameters"]):
        return {"layers": tuple(Layer(window=window) for window in windows(c))}
    kinds = map(KINDS_OF_LAYER.index, c["layer_types"])
    return {"layers": tuple(Layer(window, kind) for window, kind in zip(windows(c), kinds, strict=True))}


def experts(
    c: Mapping[str, Any],
    width: str = "moe_intermediate_size",
    *,
    count: str | None = None,
    per_token: str = "num_experts_per_tok",
    **fields: Any,
) -> Experts:
    """A mixture of experts, with the load-balancing loss that the config asks for.

    Args:
      width: the key of the experts' width.
      count: the key of their number; default: one of the usual ones.
      per_token: the key of how many a token has.
    """
    count = count or next(key for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in c)
    coefficient = c.get("router_aux_loss_coef") or 0.0
    aux = float(coefficient) if c.get("output_router_logits") else 0.0
    return Experts(c[count], c[per_token], c[width], aux_coef=aux, **fields)


def sparse_layers(c: Asked, layers: list[Layer]) -> tuple[Layer, ...]:
    """Mark the layers with experts: every `decoder_sparse_step`th, except `mlp_only_layers`."""
    step, dense = c["decoder_sparse_step"], c["mlp_only_layers"] or ()
    is_sparse = lambda i: i not in dense and (i + 1) % step == 0
    return tuple(replace(layer, sparse=is_sparse(i)) for i, layer in enumerate(layers))


def listed_sparse(c: Asked, layers: tuple[Layer, ...] = ()) -> tuple[Layer, ...]:
    """Mark the layers with experts, as `mlp_layer_types` says; default: layers that are alike otherwise."""
    kinds = c["mlp_layer_types"]
    for kind in kinds:
        if kind not in ("dense", "sparse"):
            raise DataError(f"config.json: mlp_layer_types: {kind!r} is not supported; there are dense, sparse")
    layers = layers or (Layer(),) * len(kinds)
    return tuple(replace(layer, sparse=kind == "sparse") for layer, kind in zip(layers, kinds, strict=True))


def rope(parameters: Mapping[str, Any], max_positions: int, head_dim: int, **fields: Any) -> Rope:
    """Rotary frequencies; refuses unsupported kinds by name.

    Args:
      head_dim: dimensions that may rotate; `partial_rotary_factor` leaves out some of them.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in KINDS_OF_ROPE:
        raise DataError(f"config.json: rope_type {kind!r} is not supported; there are {', '.join(KINDS_OF_ROPE)}")
    share = parameters.get("partial_rotary_factor") or 1.0
    if share != 1.0 and kind != "proportional":
        fields["dim"] = int(head_dim * share)
    factor = parameters.get("factor") or 1.0
    original = parameters.get("original_max_position_embeddings") or max_positions
    if kind == "dynamic":
        original = max_positions
    elif kind == "llama3":
        fields |= {key: parameters[key] for key in ("low_freq_factor", "high_freq_factor")}
    elif kind == "yarn":
        fields |= {
            "beta_fast": parameters.get("beta_fast") or 32.0,
            "beta_slow": parameters.get("beta_slow") or 1.0,
            "truncate": parameters.get("truncate", True),
            "attention_factor": _yarn_attention_factor(parameters, factor),
        }
    elif kind == "longrope":
        factor = parameters.get("factor") or max_positions / original
        given = parameters.get("attention_factor")
        grown = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        fields |= {
            "short_factor": tuple(parameters["short_factor"]),
            "long_factor": tuple(parameters["long_factor"]),
            "attention_factor": grown if given is None else given,
        }
    return Rope(parameters["rope_theta"], kind, factor=factor, original_length=original, **fields)


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """Equation 22 of arXiv:2309.00071, and the variant with `mscale`."""
    if parameters.get("attention_factor") is not None:
        return parameters["attention_factor"]
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return yarn_scale(factor, parameters["mscale"]) / yarn_scale(factor, parameters["mscale_all_dim"])
    return yarn_scale(factor, 1.0)


def yarn_scale(factor: float, m: float) -> float:
    """The factor by which attention gets sharper when positions are stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
