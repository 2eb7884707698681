"""From logits to the next token.

Shape suffixes: B batch, V vocab.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jtune.models.attention.reference import MASKED


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; names and meaning as in Hugging Face's generation_config.json.

    Attributes:
      max_new_tokens: at most so many are generated.
      do_sample: draw from the distribution; False: take the most likely token, whatever the next four say.
      temperature: logits are divided by it.
      top_k: only the so many most likely tokens may be drawn; 0: all.
      top_p: only the most likely tokens that together have this probability (arXiv:1904.09751).
      min_p: only tokens at least so likely in proportion to the likeliest (arXiv:2407.01082).
      repetition_penalty: logits of tokens that were there before are divided by it, or multiplied if negative
        (arXiv:1909.05858).
      eos_ids: tokens that end an answer.
      num_beams: beam search over so many if more than 1; needs do_sample to be False.
      length_penalty: of beam search: scores are divided by length to this power.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_ids: tuple[int, ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self):
        wrong = [
            f"{name}={getattr(self, name)}: expected {what}"
            for name, what, right in (
                ("max_new_tokens", "at least 1", self.max_new_tokens >= 1),
                ("temperature", "a number above 0 (do_sample: false takes the likeliest)", self.temperature > 0),
                ("top_k", "0 (all) or more", self.top_k >= 0),
                ("top_p", "above 0, at most 1", 0 < self.top_p <= 1),
                ("min_p", "0 to 1", 0 <= self.min_p <= 1),
                ("repetition_penalty", "a number above 0", self.repetition_penalty > 0),
                ("num_beams", "at least 1", self.num_beams >= 1),
            )
            if not right
        ]
        if self.num_beams > 1 and self.do_sample:
            wrong.append(f"num_beams={self.num_beams} with do_sample=True: set do_sample to false, or num_beams to 1")
        if wrong:
            raise ValueError("; ".join(wrong))


def seen_in(input_ids_BT: jax.Array, mask_BT: jax.Array, vocab: int, s: Sampling) -> jax.Array:
    """Which tokens the prompts hold, padding not counted: bool `[batch, vocab]`; `[batch, 0]` if nobody asks."""
    B = input_ids_BT.shape[0]
    if s.repetition_penalty == 1.0:
        return jnp.zeros((B, 0), bool)
    row_BT = jnp.broadcast_to(jnp.arange(B)[:, None], input_ids_BT.shape)
    real_BT = jnp.where(mask_BT > 0, input_ids_BT, vocab)  # what is out of bounds is not set
    return jnp.zeros((B, vocab), bool).at[row_BT, real_BT].set(True, mode="drop")


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Logits with those of tokens that were there before made less likely."""
    if penalty == 1.0:
        return logits_BV
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def allowed(logits_BV: jax.Array, s: Sampling) -> jax.Array:
    """Logits at `temperature`, of the tokens that top-k, top-p and min-p leave; `MASKED` for the others."""
    logits_BV = logits_BV / s.temperature
    if s.top_k and s.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, s.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, MASKED, logits_BV)
    if s.top_p < 1.0:
        sorted_BV = jnp.sort(logits_BV, axis=-1)[:, ::-1]
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV, axis=-1)
        # The least likely token whose more likely ones do not reach top_p by themselves; the first is always kept.
        least_B1 = jnp.min(jnp.where(before_BV < s.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, MASKED, logits_BV)
    if s.min_p > 0.0:
        probability_BV = jax.nn.softmax(logits_BV, axis=-1)
        logits_BV = jnp.where(probability_BV < s.min_p * probability_BV.max(-1, keepdims=True), MASKED, logits_BV)
    return logits_BV


def pick(logits_BV: jax.Array, keys_B: jax.Array, s: Sampling) -> jax.Array:
    """The next token of each row, int32 `[batch]`; each row draws with a key of its own."""
    if not s.do_sample:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, allowed(logits_BV, s)).astype(jnp.int32)
