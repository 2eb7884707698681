"""The model on a whole prompt, and on one token more.

Shape suffixes: B batch, T tokens of the longest prompt, D embed, V vocab.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jtune.models import CausalLM
from jtune.models.decoder import Cache, hidden_states, init_cache


def read_prompt(model: CausalLM, params: Any, input_ids_BT, mask_BT, room: int):
    """The cache after the prompts, with room for more tokens; logits float32 `[B, V]` and position of the next one."""
    B, T = input_ids_BT.shape
    positions_BT = jnp.maximum(jnp.cumsum(mask_BT, axis=1) - 1, 0)
    cache = init_cache(model.config, params, B, T + room, model.dtype)
    hidden = hidden_states(model, params, input_ids_BT, positions_BT, mask_BT, cache)
    assert hidden.cache is not None
    last_B = T - 1 - jnp.argmax(mask_BT[:, ::-1], axis=1)
    last_BD = jnp.take_along_axis(hidden.x, last_B[:, None, None], axis=1)[:, 0]
    return hidden.cache, head(model, params, last_BD), positions_BT[jnp.arange(B), last_B] + 1


def read_token(model: CausalLM, params: Any, token_B, position_B, cache: Cache) -> tuple[Cache, jax.Array]:
    """The cache with one token more in each row, and logits float32 `[B, V]` of what follows it."""
    one_B1 = jnp.ones_like(token_B)[:, None]
    hidden = hidden_states(model, params, token_B[:, None], position_B[:, None], one_B1, cache)
    assert hidden.cache is not None
    return hidden.cache, head(model, params, hidden.x[:, 0])


def head(model: CausalLM, params: Any, hidden_BD: jax.Array) -> jax.Array:
    """Logits float32 `[B, V]`."""
    logits: Any = model.apply({"params": {key: params[key] for key in model.head_keys}}, hidden_BD, method="head")
    return logits
