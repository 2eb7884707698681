"""The value head of a reward model: one score for a hidden state, after the final norm.

It is the subtree `v_head` of the parameters, beside those of the decoder, and always float32:
`{"kernel": [embed, 1], "bias": [1]}`. The decoder does not know it; `CausalLM.apply` ignores it.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jtune.models.decoder import CausalLM

VALUE_HEAD = "v_head"
# Logical axes. Each device keeps it whole: it is smaller than a row of the embedding.
AXES: dict[tuple[str, ...], tuple[str | None, ...]] = {
    (VALUE_HEAD, "kernel"): (None, None),
    (VALUE_HEAD, "bias"): (None,),
}


def score_keys(model: CausalLM) -> tuple[str, ...]:
    """The subtrees of the parameters that `score` needs."""
    return ("norm", VALUE_HEAD) if model.config.norm_scale else (VALUE_HEAD,)


def score(model: CausalLM, params: Any, hidden: jax.Array) -> jax.Array:
    """Scores float32 `[...]` of hidden states `[..., embed]`: the final norm, then the value head.

    The product is a sum in float32, exact on every platform: a TPU would round both of its factors to bfloat16.

    Args:
      params: with the subtrees `score_keys(model)`.
      hidden: the output of the last layer, before the final norm (`jtune.models.decoder.hidden_states`).
    """
    x: Any = model.apply({"params": params}, hidden, method=lambda decoder, x: decoder.norm(x))
    head = params[VALUE_HEAD]
    return jnp.sum(x.astype(jnp.float32) * head["kernel"][:, 0], axis=-1) + head["bias"][0]


def split_head(tree: Any) -> tuple[Any, Any]:
    """(the tree of the decoder, that of the value head or None)."""
    return {key: value for key, value in tree.items() if key != VALUE_HEAD}, tree.get(VALUE_HEAD)


def draw_value_head(hidden_size: int, key: jax.Array) -> dict[str, jax.Array]:
    """A value head before training: kernel and bias uniform in +-1/sqrt(embed), as torch draws a linear layer."""
    bound = 1 / math.sqrt(hidden_size)
    of_kernel, of_bias = jax.random.split(jax.random.fold_in(key, zlib.crc32(VALUE_HEAD.encode())))
    return {
        "kernel": jax.random.uniform(of_kernel, (hidden_size, 1), jnp.float32, -bound, bound),
        "bias": jax.random.uniform(of_bias, (1,), jnp.float32, -bound, bound),
    }
