"""Answers to encoded examples: all of them, with figures, for `predict_with_generate`; a few to look at, for
`eval_samples`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jtune.config import GeneratingArguments
from jtune.data import Encoded
from jtune.data.encode.encoded import IGNORED
from jtune.errors import DataError
from jtune.evaluation.text_metrics import similarity
from jtune.generation import Sampling, generate
from jtune.generation.decode import BUCKET
from jtune.generation.settings import most_tokens
from jtune.models import CausalLM


class Predicted(NamedTuple):
    """One example in tokens: what was asked, what was answered, and what was expected."""

    prompt: list[int]
    answer: list[int]
    label: list[int]  # empty where the row has no answer


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """What ends a predicted answer, as in LLaMA-Factory: eos, and the special tokens that have no part of their own,
    among which are the stop words of the template.
    """
    return (tokenizer.eos_token_id, *tokenizer.extra_special_tokens_ids)


def prompt_and_answer(row: Mapping[str, np.ndarray]) -> tuple[list[int], list[int]]:
    """The last answer of an encoded example, and what comes before it, in tokens.

    Of a text that is learned from its beginning on, the second half is what is to be continued. A row without an answer
    has no labels.

    >>> prompt_and_answer({"input_ids": np.arange(6), "labels": np.array([-100, 1, -100, -100, 4, 5])})
    ([0, 1, 2, 3], [4, 5])
    """
    ids, given = row["input_ids"], np.flatnonzero(row["labels"] == IGNORED)
    start = int(given[-1]) + 1 if len(given) else max(1, len(ids) // 2)
    return ids[:start].tolist(), ids[start:].tolist()


def predict(
    model: CausalLM,
    params: Any,
    examples: Sequence[Mapping[str, np.ndarray]],
    sampling: Sampling,
    args: GeneratingArguments,
    *,
    seed: int,
    batch_size: int,
) -> list[Predicted]:
    """The model's answer to every example, in their order.

    Args:
      examples: encoded: `input_ids` and `labels` each.

    Raises:
      DataError: a prompt is so long that there is no room for an answer.
    """
    positions = model.config.learned_positions
    pairs = [prompt_and_answer(row) for row in examples]
    prompts = [prompt for prompt, _ in pairs]
    longest = max(map(len, prompts))
    most = [most_tokens(args, sampling, len(prompt), positions) for prompt in prompts]
    if min(most) < 1:
        raise DataError(
            f"a prompt of {longest} tokens leaves no room for an answer: make cutoff_len smaller, or max_length larger"
        )
    room = min(max(most), positions - longest) if positions else max(most)
    asked = replace(sampling, max_new_tokens=room)
    answers = generate(model, params, prompts, asked, seed=seed, batch_size=batch_size)
    return [Predicted(prompt, ids[:n], label) for (prompt, label), ids, n in zip(pairs, answers, most)]


def lines(tokenizer: Any, predicted: Sequence[Predicted], *, skip_special_tokens: bool) -> list[dict[str, str]]:
    """As text, under LLaMA-Factory's names. Special tokens are never left out of prompts."""
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    return [{"prompt": tokenizer.decode(p), "predict": decode(a), "label": decode(e)} for p, a, e in predicted]


def figures(
    tokenizer: Any, predicted: Sequence[Predicted], *, prefix: str, seconds: float, batches: int
) -> dict[str, float]:
    """How near the answers are to those expected, and how long they took, under `prefix`, with Trainer's names.

    Rows without an answer are compared with nothing: if all are such, there are only the times.
    """
    text = lines(tokenizer, [one for one in predicted if one.label], skip_special_tokens=True)
    found = similarity([line["predict"] for line in text], [line["label"] for line in text]) if text else {}
    found |= {
        "runtime": round(seconds, 4),
        "samples_per_second": round(len(predicted) / seconds, 3),
        "steps_per_second": round(batches / seconds, 3),
    }
    return {f"{prefix}_{name}": value for name, value in found.items()}


def joined(losses: dict[str, float], answers: dict[str, float]) -> dict[str, float]:
    """The figures of losses and of answers, which took the time of both.

    >>> joined({"eval_loss": 1.0, "eval_runtime": 1.0, "eval_samples_per_second": 8.0, "eval_steps_per_second": 2.0},
    ...        {"eval_runtime": 3.0, "eval_samples_per_second": 8.0, "eval_steps_per_second": 1.0})
    {'eval_loss': 1.0, 'eval_runtime': 4.0, 'eval_samples_per_second': 6.0, 'eval_steps_per_second': 0.75}
    """
    found = losses | answers
    for key in (key for key in losses if key.endswith("_runtime")):
        prefix = key.removesuffix("runtime")
        found[key] = round(losses[key] + answers[key], 4)
        for rate in ("samples_per_second", "steps_per_second"):
            found[prefix + rate] = round(answers[prefix + rate] * answers[key] / found[key], 3)
    return found


def make_prediction(
    model: CausalLM,
    sets: Mapping[str, Encoded],
    tokenizer: Any,
    sampling: Sampling,
    args: GeneratingArguments,
    *,
    seed: int,
    batch_size: int,
) -> Callable[[Any, str], tuple[list[Predicted], dict[str, float]]]:
    """`ask(params, "eval")`: the answers to the examples of all evaluation sets, and the figures of each set under
    `eval_` or `eval_<name>_`.
    """

    def ask(params: Any, prefix: str) -> tuple[list[Predicted], dict[str, float]]:
        every: list[Predicted] = []
        found: dict[str, float] = {}
        for name, encoded in sets.items():
            began = time.monotonic()
            examples = [encoded[i] for i in range(len(encoded))]
            answers = predict(model, params, examples, sampling, args, seed=seed, batch_size=batch_size)
            seconds, batches = max(1e-9, time.monotonic() - began), -(-len(encoded) // batch_size)
            prefixed = f"{prefix}_{name}".rstrip("_")
            found |= figures(tokenizer, answers, prefix=prefixed, seconds=seconds, batches=batches)
            every += answers
        return every, found

    return ask


def make_samples(
    model: CausalLM, encoded: Encoded, count: int, tokenizer: Any, args: GeneratingArguments
) -> Callable[[Any], list[dict[str, str]]]:
    """`samples(params)`: the likeliest answers to the first `count` examples, as `lines`.

    An answer is cut where it is longer than all that are expected, in steps of `BUCKET` tokens.
    """
    examples = [encoded[i] for i in range(min(count, len(encoded)))]
    expected = max(len(prompt_and_answer(row)[1]) for row in examples)
    room = -(-max(1, expected) // BUCKET) * BUCKET
    most = min(room, args.max_new_tokens) if args.max_new_tokens > 0 else room
    greedy = Sampling(max_new_tokens=most, eos_ids=stop_ids(tokenizer))

    def samples(params: Any) -> list[dict[str, str]]:
        answers = predict(model, params, examples, greedy, args, seed=0, batch_size=len(examples))
        return lines(tokenizer, answers, skip_special_tokens=args.skip_special_tokens)

    return samples
