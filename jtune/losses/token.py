"""The losses of single tokens: pure functions of their logits, which `jtune.losses.chunked` sums chunk by chunk.

A token loss is `f(logits [..., V], targets int32 [...]) -> float32 [...]`. One that compares with a reference model
takes its logits as a third argument. What only weights a token is held fixed: no gradient passes through it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

TokenLoss = Callable[..., jax.Array]

ENTROPY_TOKENS = 20  # EAFT looks at the likeliest tokens only,
ENTROPY_SCALE = 3.0  # whose entropy, at most ln 20 = 2.996, is brought to about 1


def token_nll(logits_V: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], float32: `[..., vocab]`, int32 `[...]` -> `[...]`."""
    logits_V = logits_V.astype(jnp.float32)
    picked = jnp.take_along_axis(logits_V, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_V, axis=-1) - picked


def smoothed_nll(logits_V: jax.Array, targets: jax.Array, *, factor: float) -> jax.Array:
    """Cross-entropy with a target of probability `1 - factor`, and `factor` spread over the whole vocabulary.

    `(1 - factor) * nll + factor * mean_v(-log softmax(logits)[v])`: label smoothing (arXiv:1512.00567), for each token
    what Hugging Face's `LabelSmoother` has.
    """
    logits_V = logits_V.astype(jnp.float32)
    spread = jax.nn.logsumexp(logits_V, axis=-1) - jnp.mean(logits_V, axis=-1)
    return (1 - factor) * token_nll(logits_V, targets) + factor * spread


def dft(logits_V: jax.Array, targets: jax.Array) -> jax.Array:
    """Dynamic fine-tuning (arXiv:2508.05629): `p * nll`, where the probability `p` of the target is held fixed."""
    nll = token_nll(logits_V, targets)
    return nll * jax.lax.stop_gradient(jnp.exp(-nll))


def eaft(logits_V: jax.Array, targets: jax.Array, *, alpha: float) -> jax.Array:
    """Entropy-adaptive fine-tuning (arXiv:2601.02151): `(H / 3) ** alpha * nll`, where `H` is held fixed.

    `H` is the entropy, in nats, of the 20 likeliest tokens, their probabilities made to add up to 1.
    """
    top = jax.lax.top_k(jax.lax.stop_gradient(logits_V.astype(jnp.float32)), min(ENTROPY_TOKENS, logits_V.shape[-1]))[0]
    log_p = jax.nn.log_softmax(top, axis=-1)
    entropy = jnp.maximum(-jnp.sum(jnp.exp(log_p) * log_p, axis=-1), 0)  # rounding must not make a root of it nan
    return token_nll(logits_V, targets) * (entropy / ENTROPY_SCALE) ** alpha


def asft(logits_V: jax.Array, targets: jax.Array, reference_V: jax.Array, *, alpha: float) -> jax.Array:
    """Anchored fine-tuning (arXiv:2509.23753): DFT, and `alpha * KL(reference || model)` over the whole vocabulary.

    The direction is that of the authors' code, and of LLaMA-Factory's. The reference is held fixed.
    """
    log_q = jax.nn.log_softmax(jax.lax.stop_gradient(reference_V.astype(jnp.float32)), axis=-1)
    log_p = jax.nn.log_softmax(logits_V.astype(jnp.float32), axis=-1)
    return dft(logits_V, targets) + alpha * jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
