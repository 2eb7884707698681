"""Beam search, as transformers does it.

Shape suffixes: B prompts, K beams, C candidates of a prompt, N new tokens, V vocab.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtune.generation.forward import read_prompt, read_token
from jtune.generation.sampling import Sampling, penalised, seen_in
from jtune.models import CausalLM
from jtune.models.decoder import Cache

NEVER = -1e9  # the score of a beam that there is not


class Beams(NamedTuple):
    """Those that go on, best first, and those that have ended."""

    cache: Cache  # rows [B * K]
    logits: jax.Array  # [B * K, V], of the next token
    position: jax.Array  # [B * K]
    seen: jax.Array  # bool [B, K, V or 0]
    tokens: jax.Array  # [B, K, N]
    scores: jax.Array  # [B, K]: sums of log-probabilities
    ended: jax.Array  # [B, K, N]
    ended_scores: jax.Array  # [B, K], divided by length; NEVER: not ended
    improvable: jax.Array  # bool [B]
    count: jax.Array


def beam_search(model: CausalLM, s: Sampling, params: Any, input_ids_BT, mask_BT) -> jax.Array:
    """The best answer to each prompt, int32 `[B, max_new_tokens]`, -1 after its end.

    A prompt is done when the best beam that goes on could not beat the worst of those that have ended, if it ended now.
    """
    K, N = s.num_beams, s.max_new_tokens
    B, V = input_ids_BT.shape[0], model.config.vocab_size
    eos = jnp.asarray(s.eos_ids, jnp.int32)
    candidates = min(max(2, 1 + len(s.eos_ids)) * K, K * V)  # so that K of them have not ended
    flat = lambda x: x.reshape(B * K, *x.shape[2:])
    take = lambda x, index: jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)

    def turn(state: Beams) -> Beams:
        log_BKV = jax.nn.log_softmax(state.logits, axis=-1).reshape(B, K, V)
        log_BKV = penalised(log_BKV, state.seen, s.repetition_penalty) + state.scores[..., None]
        score_BC, index_BC = jax.lax.top_k(log_BKV.reshape(B, -1), candidates)
        beam_BC, token_BC = index_BC // V, (index_BC % V).astype(jnp.int32)
        tokens_BCN = take(state.tokens, beam_BC).at[:, :, state.count].set(token_BC)
        at_end_BC = jnp.isin(token_BC, eos) | (state.count + 1 == N)

        # The best that have not ended go on.
        going_BK = jax.lax.top_k(jnp.where(at_end_BC, score_BC + NEVER, score_BC), K)[1]
        beam_BK, token_BK = take(beam_BC, going_BK), take(token_BC, going_BK)
        tokens_BKN = take(tokens_BCN, going_BK)
        scores_BK = jnp.where(take(at_end_BC, going_BK), NEVER, take(score_BC, going_BK))

        # Of the K best candidates, those that have ended compete with those that ended before.
        length = (state.count + 1).astype(jnp.float32)
        just_BC = at_end_BC & (jnp.arange(candidates) < K) & state.improvable[:, None]
        now_BC = jnp.where(just_BC, score_BC / length**s.length_penalty, NEVER)
        all_BX = jnp.concatenate([state.ended_scores, now_BC], axis=1)
        ended_scores_BK, best_BK = jax.lax.top_k(all_BX, K)
        ended_BKN = take(jnp.concatenate([state.ended, tokens_BCN], axis=1), best_BK)
        worst_B = jnp.where((ended_scores_BK > NEVER).any(1), ended_scores_BK.min(1), NEVER)
        improvable_B = state.improvable & (scores_BK[:, 0] / length**s.length_penalty > worst_B)

        row_X = flat(beam_BK + K * jnp.arange(B)[:, None])
        cache = jax.tree.map(lambda x: x[:, row_X], state.cache)
        seen = take(state.seen, beam_BK)
        if s.repetition_penalty != 1.0:
            seen |= jax.nn.one_hot(token_BK, V, dtype=bool)
        cache, logits = read_token(model, params, flat(token_BK), state.position, cache)
        return Beams(
            cache, logits, state.position + 1, seen, tokens_BKN, scores_BK, ended_BKN, ended_scores_BK, improvable_B,
            state.count + 1,
        )  # fmt: skip

    cache, logits, position = read_prompt(model, params, input_ids_BT, mask_BT, N)
    seen = seen_in(input_ids_BT, mask_BT, V, s)
    times = lambda x, axis=0: jnp.repeat(x, K, axis=axis)
    tokens_BKN = jnp.full((B, K, N), -1, jnp.int32)
    # All beams of a prompt are the same at first: one of them is enough.
    scores_BK = jnp.where(jnp.arange(K) == 0, 0.0, NEVER) * jnp.ones((B, 1))
    start = Beams(
        jax.tree.map(lambda x: times(x, 1), cache), times(logits), times(position), times(seen[:, None], 1), tokens_BKN,
        scores_BK, tokens_BKN, jnp.full((B, K), NEVER), jnp.ones(B, bool), jnp.int32(0),
    )  # fmt: skip
    unfinished = lambda state: (state.count < N) & state.improvable.any()
    best_BN = jax.lax.while_loop(unfinished, turn, start).ended[:, 0]
    is_end_BN = jnp.isin(best_BN, eos)
    return jnp.where(jnp.cumsum(is_end_BN, axis=1) > 0, -1, best_BN)
