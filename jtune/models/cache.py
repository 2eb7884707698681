"""The cache of decoding: for each layer the keys and values of earlier tokens, or their latent vectors, or a state.

The slot of a token is `position mod slots`, with the position in its own sequence. So padding takes no slot, left or
right, and a layer with a window needs no more slots than the window is long.

Shape suffixes: R layers of a stack that are alike, B batch, T new tokens, S slots.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtune.errors import ConfigError
from jtune.models.config import DecoderConfig, Layer

Entry = dict[str, jax.Array]  # [R, B, S, ...] each; of a layer without attention [R, B, ...]


class LayerCache(NamedTuple):
    """The cache of a stack of layers, and the index of this layer in it."""

    entry: Entry
    index: jax.Array


def layer_cache(config: DecoderConfig, layer: Layer, repeats: int, batch: int, slots: int, dtype: Any) -> Entry:
    """An empty cache of `repeats` layers of one kind."""
    if layer.linear:
        assert config.delta is not None
        d = config.delta
        channels = 2 * d.key_heads * d.key_dim + d.value_heads * d.value_dim
        return {
            "inputs": jnp.zeros((repeats, batch, d.taps - 1, channels), dtype),  # of the convolution
            # The state sums over all tokens, so it is float32.
            "state": jnp.zeros((repeats, batch, d.value_heads, d.key_dim, d.value_dim), jnp.float32),
        }
    if layer.keys_values == "reused":
        return {}
    if layer.conv:
        assert config.short_conv is not None
        return {"inputs": jnp.zeros((repeats, batch, config.short_conv.taps - 1, config.hidden_size), dtype)}
    if layer.window is not None:
        slots = min(slots, layer.window)
    empty = lambda *shape: jnp.zeros((repeats, batch, slots, *shape), dtype)
    if config.latent is not None:
        check_length(slots, config)
        return {"latent": empty(config.latent.kv_rank), "rope_key": empty(config.latent.rope_dim)}
    shape = config.heads_of(layer)
    return {"k": empty(*shape), "v": empty(*shape)}


def check_length(tokens: int, config: DecoderConfig) -> None:
    """Raise a ConfigError for rows in which a model chooses the tokens that a token sees (`Indexer`)."""
    indexer = None if config.latent is None else config.latent.indexer
    if indexer is not None and tokens > indexer.top:
        raise ConfigError(
            f"rows of {tokens} tokens: above {indexer.top} (index_topk) a token of {config.family} sees a choice of "
            f"earlier tokens, which jtune does not compute: set cutoff_len, or the length of answers, to {indexer.top}"
        )


def write(entry: Entry, index: Any, new: Entry, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> Entry:
    """The cache with the `new` entries of layer `index`, `[B, T, ...]` each; tokens of segment 0 are padding."""
    slots = next(iter(entry.values())).shape[2]
    real_BT = segment_ids_BT > 0
    last_B1 = jnp.max(jnp.where(real_BT, positions_BT, -1), axis=1, keepdims=True)
    # Of tokens that share a slot, only the last is written.
    kept_BT = real_BT & (positions_BT > last_B1 - slots)
    slot_BT = jnp.where(kept_BT, positions_BT % slots, slots)  # out of bounds: not written
    row_BT = jnp.broadcast_to(jnp.arange(positions_BT.shape[0])[:, None], slot_BT.shape)
    return {name: x.at[index, row_BT, slot_BT].set(new[name].astype(x.dtype), mode="drop") for name, x in entry.items()}


def read_state(layer_cache: LayerCache | None, tokens: int) -> Entry:
    """What a layer without attention keeps, `[B, ...]` each; empty before a prompt, which has several `tokens`."""
    if layer_cache is None or tokens > 1:
        return {}
    return {name: x[layer_cache.index] for name, x in layer_cache.entry.items()}


def write_state(layer_cache: LayerCache | None, new: Entry) -> Entry | None:
    """The cache of a layer without attention after new tokens; None if there is no cache."""
    if layer_cache is None:
        return None
    return {name: x.at[layer_cache.index].set(new[name].astype(x.dtype)) for name, x in layer_cache.entry.items()}


def key_positions(slots: int, positions_BT: jax.Array) -> jax.Array:
    """The position in each slot after the token at `positions` `[B, 1]` is written: int32 `[B, S]`; negative: empty."""
    return positions_BT - (positions_BT - jnp.arange(slots)[None, :]) % slots
