"""The memory of a train step by arithmetic."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jtune.data import Sizes
from jtune.losses.chunked import chunk_elements
from jtune.models import DecoderConfig
from jtune.models.config import Delta
from jtune.models.delta import CHUNK, delta_config
from jtune.models.value_head import VALUE_HEAD
from jtune.planning.shapes import batch_shapes, bytes_by_kind
from jtune.sharding.mesh import BATCH_AXES
from jtune.sharding.rules import ZERO_AXES
from jtune.train.program import Program
from jtune.tuning.quantize import Quantized

# The share of memory that a setting may take by estimate to count as fitting.
MARGIN = 0.95
# The most that a program's temporaries exceed their estimate by (8B on GPUs: 0.78 to 1.15 times the estimate; tiny
# models exceed it by more).
MOST_OFF = 1.5


class Rows(NamedTuple):
    """The rows of an update in one shard of the batch."""

    accum: int
    per_shard: int  # rows of a microbatch on a shard of the batch
    seq: int
    label_share: float  # of its tokens that may carry a label
    sizes: Sizes = Sizes(0)


# ---------------------------------------------------------------------- estimates


def batch_of(rows: Rows, program: Program) -> Mapping[str, Any]:
    """The batch of an update, as shapes."""
    shards = math.prod(program.mesh.shape[axis] for axis in BATCH_AXES)
    return batch_shapes((rows.accum, rows.per_shard * shards, rows.seq), rows.sizes, program.mesh)


def saved_activations(
    decoder: DecoderConfig,
    remat: str,
    tokens: int,
    seq: int,
    itemsize: int,
    *,
    attention: str = "splash",
    split: int = 1,
) -> int:
    """Bytes that the forward pass keeps for the backward pass, for `tokens` in rows of `seq` on one device.

    Args:
      attention: the backend (`jtune.models.attention.choose.choose`).
      split: devices that share a matrix product (`mesh_tensor`).
    """
    linear, convolved = (sum(getattr(layer, kind) for layer in decoder.layers) for kind in ("linear", "conv"))
    d, f = decoder.hidden_size, decoder.active_intermediate_size
    q = decoder.num_attention_heads * decoder.qk_dim
    qkv = q + decoder.num_key_value_heads * (decoder.qk_dim + decoder.value_dim)
    weights = decoder.num_attention_heads * seq * 2 if attention == "xla" else 0  # only plain attention keeps them
    values = {
        "offload": 0,
        "full": d,
        "attention": d + q / split,
        "dots": 3 * d + (qkv + 2 * f) / split,  # what the products with parameters gave
        # Inputs of all products and norms, what attention took and gave, and three stages of the activation.
        "none": 4 * d + (qkv + 2 * q + 3 * f + weights) / split,
    }[remat]
    kept = int(values * tokens * itemsize) * (decoder.num_hidden_layers - linear - convolved)
    if convolved:
        values = {
            "offload": 0,
            "full": d,
            "attention": d,
            "dots": 3 * d + (3 * d + 2 * f) / split,
            # What the convolution takes, and gives in float32.
            "none": 4 * d + (5 * d + 3 * f + d * 4 / itemsize) / split,
        }[remat]
        kept += int(values * tokens * itemsize) * convolved
    if linear:
        rule = delta_config(decoder)
        keys, wide = 2 * rule.key_heads * rule.key_dim, rule.value_heads * rule.value_dim
        values = {
            "offload": 0,
            "full": d,
            "attention": d,  # the rule is computed again
            "dots": 3 * d + (keys + 2 * wide + 2 * f) / split,
            # The rule in float32 besides, as far as its backward pass takes it.
            "none": 4 * d + (2 * (keys + 2 * wide) + 3 * f + rule_floats(rule) * 4 / itemsize) / split,
        }[remat]
        kept += int(values * tokens * itemsize) * linear
    return kept


def rule_floats(rule: Delta) -> int:
    """Float32 of a token that the gated delta rule has at once: of each head queries, keys and values, what is made
    from them, rows of the matrices of a chunk, and its share of the chunk's state."""
    states = rule.key_dim * rule.value_dim // CHUNK
    decays = 16 * rule.key_dim if rule.channels else 0  # of channels: halves of a chunk, decayed for each other
    return rule.value_heads * (8 * rule.key_dim + decays + 6 * rule.value_dim + 6 * CHUNK + states)


def estimate(program: Program, rows: Rows) -> dict[str, int]:
    """Bytes of one device: `arguments`, `temporaries`, `peak`, and `floor`, the lower bound: state and layer inputs."""
    decoder, module, mesh = program.module.config, program.module, program.mesh
    split, size = mesh.shape["tensor"], module.dtype.itemsize
    kept = sum(bytes_by_kind(program, batch_of(rows, program)).values())
    tokens = rows.per_shard * rows.seq // mesh.shape["context"]

    saved = saved_activations(decoder, module.remat, tokens, rows.seq, size, attention=module.attention, split=split)
    # Gradients and their sum over microbatches, float32, lie where the parameters lie.
    trained = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(program.state.trainable))
    gradients = 4 * trained * (1 if rows.accum == 1 else 2)
    # One layer at work. Scores: float32, their softmax and its gradient, and weights in the compute dtype.
    d, f = decoder.hidden_size, decoder.active_intermediate_size
    keys = {"xla": rows.seq, "blocks": rows.seq // 8}.get(module.attention, 0)  # whose scores exist at a time
    scores = tokens * decoder.num_attention_heads * keys * (8 + size) // split
    inside = tokens * (6 * d + 5 * f // split) * size
    if decoder.delta is not None:  # what it has and the gradients of that
        scores = max(scores, 2 * 4 * tokens * rule_floats(decoder.delta) // split)
    # Gathered weights: of two layers, as the next one is fetched while one is at work; and of the head, with its
    # gradient in float32.
    gathered = 0
    vocab = 0 if VALUE_HEAD in program.params else decoder.vocab_size  # scores need no logits
    if any(mesh.shape[axis] > 1 for axis in ZERO_AXES):
        layer = travelling(program.params["layers"], size) // decoder.num_hidden_layers
        head = size + (4 if any(jax.tree.leaves(program.mask.get("lm_head", program.mask["embed_tokens"]))) else 0)
        gathered = (2 * layer + vocab * d * head) // split
    # Kernels that are kept in few bits are computed for the layer at work.
    is_quantized = lambda x: isinstance(x, Quantized)
    computed = [x.size for x in jax.tree.leaves(program.params["layers"], is_leaf=is_quantized) if is_quantized(x)]
    kernels = sum(computed) // decoder.num_hidden_layers * size // split
    chunk = min(chunk_elements(module.mesh), int(tokens * rows.label_share) * vocab) * (8 + size) // split
    temporaries = saved + gradients + max(scores, inside, chunk) + gathered + kernels + of_second(program, tokens)
    return {
        "arguments": kept,
        "temporaries": temporaries,
        "peak": kept + temporaries,
        "floor": kept + saved_activations(decoder, "full", tokens, rows.seq, size),
    }


def of_second(program: Program, tokens: int) -> int:
    """Bytes that the forward pass of a second model takes, for `tokens` on one device: the hidden states that its head
    is to have, one layer at work, and gathered weights, as in `estimate`."""
    module, mesh = program.second, program.mesh
    if module is None:
        return 0
    decoder, size, split = module.config, module.dtype.itemsize, mesh.shape["tensor"]
    d, f = decoder.hidden_size, decoder.active_intermediate_size
    inside = tokens * (4 * d + 3 * f // split) * size
    gathered = 0
    if any(mesh.shape[axis] > 1 for axis in ZERO_AXES):
        layer = travelling(program.constants.second["layers"], size) // decoder.num_hidden_layers
        gathered = (2 * layer + decoder.vocab_size * d * size) // split
    return tokens * d * size + inside + gathered


def travelling(params: Any, itemsize: int) -> int:
    """Bytes of parameters in an all-gather: in the compute dtype, or in the stored dtype where that is smaller."""
    return sum(x.size * min(x.dtype.itemsize, itemsize) for x in jax.tree.leaves(params))


def largest(program: Program, sizes: Mapping[tuple[int, int, int], Sizes]) -> tuple[tuple[int, int, int], Rows]:
    """The shape of batch that needs most memory, and its rows in one shard.

    Args:
      sizes: by the shape `[accum, batch, seq]` of a batch.
    """
    shards = math.prod(program.mesh.shape[axis] for axis in BATCH_AXES)

    def seen(shape: tuple[int, int, int]) -> Rows:
        accum, batch, seq = shape
        return Rows(accum, batch // shards, seq, sizes[shape].labelled / (batch // shards * seq), sizes[shape])

    shape = max(sizes, key=lambda shape: estimate(program, seen(shape))["peak"])
    return shape, seen(shape)
