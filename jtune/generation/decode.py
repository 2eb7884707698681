"""Answers to prompts, token by token, in one jitted loop with static shapes.

Shape suffixes: B batch, T tokens of the longest prompt, N new tokens, V vocab.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtune.generation.beam import beam_search
from jtune.generation.forward import read_prompt, read_token
from jtune.generation.sampling import Sampling, penalised, pick, seen_in
from jtune.models import CausalLM
from jtune.models.decoder import Cache
from jtune.sharding import arrays, batch_shards

BUCKET = 64  # prompts and answers are given room in steps of it, so that few shapes are compiled


class Decoding(NamedTuple):
    """What goes from one token to the next."""

    cache: Cache
    logits: jax.Array  # float32 [B, V], of the next token
    position: jax.Array  # int32 [B], of the next token
    seen: jax.Array  # bool [B, V]: tokens that were there before; [B, 0] if nobody asks
    keys: jax.Array  # of each row
    done: jax.Array  # bool [B]
    tokens: jax.Array  # int32 [B, N], those so far; -1 after the end of an answer
    count: jax.Array  # int32: how many columns of `tokens` are written


def generate(
    model: CausalLM,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    batch_size: int = 8,
) -> list[list[int]]:
    """The answer to each prompt, in tokens, without the one that ended it.

    >>> model, params = jtune.load_model("path/to/model")                                      # doctest: +SKIP
    >>> generate(model, params, [tokenizer.encode("Hello")], Sampling(max_new_tokens=20))      # doctest: +SKIP

    What a prompt is answered with does not depend on the others, nor on how they are put into batches.

    Args:
      prompts: token ids; each at least one.
      sampling: default: the likeliest token each time.
      seed: of drawing. A prompt that comes several times is answered differently each time.
      batch_size: prompts that are answered together.

    Raises:
      ValueError: a prompt is empty, or prompt and answer are longer than a model with learned positions can see.
    """
    s = sampling or Sampling()
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty: expected at least one token")
    check_length(model, max(map(len, prompts), default=0) + s.max_new_tokens)
    keys = row_keys(prompts, seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike with alike: less padding
    batch_size = divisible(model, min(batch_size, len(order)))
    answers: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # The last batch is filled up with its first prompt, so that it has the shape of the others.
        filled = rows + rows[:1] * (batch_size - len(rows))
        input_ids, mask = pad([prompts[i] for i in filled])
        found = np.asarray(arrays.whole(answer(model, s, params, input_ids, mask, keys[np.asarray(filled)])))
        answers |= {i: [int(t) for t in row if t >= 0] for i, row in zip(rows, found)}
    return [answers[i] for i in range(len(prompts))]


def stream(
    model: CausalLM, params: Any, prompt: Sequence[int], sampling: Sampling | None = None, *, seed: int = 0
) -> Iterator[int]:
    """The tokens of one answer as they come, without the one that ends it. See `generate`."""
    s = sampling or Sampling()
    check_length(model, len(prompt) + s.max_new_tokens)
    if s.num_beams > 1:  # it knows no token before it knows them all
        yield from generate(model, params, [prompt], s, seed=seed)[0]
        return
    # Twice as much room each time: a conversation that grows is compiled a few times, not with every turn.
    rows = [prompt] * divisible(model, 1)
    input_ids, mask = pad(rows, BUCKET << ((len(prompt) - 1) // BUCKET).bit_length())
    state = first(model, s, params, input_ids, mask, row_keys(rows, seed))
    for i in range(s.max_new_tokens):
        state = following(model, s, params, state)
        token = int(state.tokens[0, i])
        if token < 0:
            return
        yield token


def divisible(model: CausalLM, rows: int) -> int:
    """The number of rows, made larger so that the devices of the model's mesh can each take as many."""
    shards = batch_shards(model.mesh) if model.mesh is not None else 1
    return -(-rows // shards) * shards


def pad(prompts: Sequence[Sequence[int]], width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Prompts in one array, filled up on the right to `width` (default: a multiple of `BUCKET`), and where they are;
    int32 `[B, T]`."""
    width = width or -(-max(map(len, prompts)) // BUCKET) * BUCKET
    input_ids, mask = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        input_ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    return input_ids, mask


def row_keys(prompts: Sequence[Sequence[int]], seed: int) -> jax.Array:
    """A key for each prompt: it follows from what the prompt is, and how often it came before."""
    times: Counter[bytes] = Counter()
    folded = []
    for prompt in prompts:
        content = np.asarray(prompt, np.int32).tobytes()
        folded.append((zlib.crc32(content), times[content]))
        times[content] += 1
    fold = lambda pair: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), pair[0]), pair[1])
    return jax.vmap(fold)(jnp.asarray(folded, jnp.uint32).reshape(-1, 2))


def check_length(model: CausalLM, length: int) -> None:
    """Raise a ValueError if a sequence of `length` has positions that the model has no embedding for."""
    if 0 < model.config.learned_positions < length:
        raise ValueError(
            f"prompt and answer may be {length} tokens long, but this model has {model.config.learned_positions} "
            "positions: make max_new_tokens smaller, or the prompt shorter"
        )


@partial(jax.jit, static_argnums=(0, 1))
def answer(model: CausalLM, s: Sampling, params: Any, input_ids_BT, mask_BT, keys_B) -> jax.Array:
    """Answers to padded prompts, int32 `[batch, max_new_tokens]`, -1 after the end of each.

    Args:
      mask: int32; 0 is padding, on the left or on the right.
    """
    if s.num_beams > 1:
        return beam_search(model, s, params, input_ids_BT, mask_BT)
    unfinished = lambda state: (state.count < s.max_new_tokens) & ~state.done.all()
    state = first(model, s, params, input_ids_BT, mask_BT, keys_B)
    return jax.lax.while_loop(unfinished, lambda state: following(model, s, params, state), state).tokens


@partial(jax.jit, static_argnums=(0, 1))
def first(model: CausalLM, s: Sampling, params: Any, input_ids_BT, mask_BT, keys_B) -> Decoding:
    """The state after the prompt."""
    cache, logits_BV, position_B = read_prompt(model, params, input_ids_BT, mask_BT, s.max_new_tokens)
    B, V = logits_BV.shape
    seen_BV = seen_in(input_ids_BT, mask_BT, V, s)
    tokens_BN = jnp.full((B, s.max_new_tokens), -1, jnp.int32)
    return Decoding(cache, logits_BV, position_B, seen_BV, keys_B, jnp.zeros(B, bool), tokens_BN, jnp.int32(0))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def following(model: CausalLM, s: Sampling, params: Any, state: Decoding) -> Decoding:
    """The state with one token more in each row that has not ended."""
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.count)
    token_B = pick(penalised(state.logits, state.seen, s.repetition_penalty), keys_B, s)
    done_B = state.done | jnp.isin(token_B, jnp.asarray(s.eos_ids, jnp.int32))
    tokens = jax.lax.dynamic_update_slice(
        state.tokens, jnp.where(done_B, -1, token_B)[:, None], (jnp.int32(0), state.count)
    )
    seen = state.seen
    if s.repetition_penalty != 1.0:
        seen = seen.at[jnp.arange(len(token_B)), token_B].set(True)
    cache, logits_BV = read_token(model, params, token_B, state.position, state.cache)
    return Decoding(cache, logits_BV, state.position + 1, seen, state.keys, done_B, tokens, state.count + 1)
