"""Distillation: the losses of tokens that pull a student's distribution towards its teacher's.

Pure functions of logits, as in `jtune.losses.token`; the teacher is held fixed. Shape suffix: V the ids that both heads
have.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from jtune.losses.token import token_nll

Divergence = Literal["forward", "reverse", "js"]


def kl(log_p_V: jax.Array, log_q_V: jax.Array) -> jax.Array:
    """KL(p || q) of log-probabilities, in nats: float32 `[..., V]` -> `[...]`."""
    return jnp.sum(jnp.exp(log_p_V) * (log_p_V - log_q_V), axis=-1)


def jensen_shannon(log_t_V: jax.Array, log_s_V: jax.Array, beta: float) -> jax.Array:
    """The generalised Jensen-Shannon divergence of GKD (arXiv:2306.13649, eq. 1), `0 < beta < 1`:
    `beta * KL(t || m) + (1 - beta) * KL(s || m)` with `m = beta * t + (1 - beta) * s`.

    Divided by `beta` it tends to KL(t || s) for small `beta`, divided by `1 - beta` to KL(s || t) for `beta` near 1.
    """
    log_m_V = jnp.logaddexp(math.log(beta) + log_t_V, math.log1p(-beta) + log_s_V)
    return beta * kl(log_t_V, log_m_V) + (1 - beta) * kl(log_s_V, log_m_V)


def distilled(
    logits_V: jax.Array,
    targets: jax.Array,
    teacher_V: jax.Array,
    *,
    divergence: Divergence,
    beta: float,
    temperature: float,
    weight: float,
) -> jax.Array:
    """`weight * temperature**2 * D + (1 - weight) * nll`, float32 `[...]`: D compares both softmaxes at `temperature`.

    The factor is that of arXiv:1503.02531 (section 2): gradients of D shrink with the square of the temperature, and so
    the mixture means the same at each. (Hugging Face's GKDTrainer has no such factor.) The cross-entropy is at
    temperature 1. A head may have more rows than the other, which pad it: D compares the ids that both have.

    Args:
      logits_V, teacher_V: `[..., vocab]` of the student and of the teacher, each of its own head.
      targets: int32 `[...]`.
      divergence: forward: KL(teacher || student); reverse: KL(student || teacher); js: `jensen_shannon` with `beta`.
    """
    common = min(logits_V.shape[-1], teacher_V.shape[-1])
    cooled = lambda x: jax.nn.log_softmax(x[..., :common].astype(jnp.float32) / temperature, axis=-1)
    log_s_V, log_t_V = cooled(logits_V), jax.lax.stop_gradient(cooled(teacher_V))
    if divergence == "js":
        value = jensen_shannon(log_t_V, log_s_V, beta)
    else:
        value = kl(log_t_V, log_s_V) if divergence == "forward" else kl(log_s_V, log_t_V)
    value = temperature**2 * value
    return value if weight == 1 else weight * value + (1 - weight) * token_nll(logits_V, targets)
