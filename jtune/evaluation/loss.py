"""Evaluation: the loss of every example, and the figures made of them.

The jitted part gives sums per example; how they are averaged is decided on the host, where it can be read.
Shape suffixes as in `jtune.losses.chunked`; E example slots of a batch.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jtune.config import Config
from jtune.config.stages import rules_of
from jtune.data import Encoded, EvalBatch, EvalPlan, eval_batches, length_seed, packing_windows, rows_are_packed
from jtune.losses.batch import Batch
from jtune.losses.chunked import chunk_elements, chunk_positions, cut, sum_labelled
from jtune.losses.token import TokenLoss, token_nll
from jtune.models import CausalLM
from jtune.models.decoder import hidden_states
from jtune.sharding import arrays, batch_sharding, batch_shards, check_row_length, replicated
from jtune.sharding.compiler import compiler_options
from jtune.tuning import prepared_axes

AHEAD = 8  # steps that are dispatched and not read


class ExampleSums(NamedTuple):
    """Float32 `[examples]`, sums over tokens."""

    nll: Any  # negative log-likelihood
    tokens: Any  # that count
    correct: Any  # whose first choice is right
    loss: Any  # that is reported


def make_eval_step(
    model: CausalLM, *, label_capacity: int, batch_shards: int, slots: int, token_loss: TokenLoss = token_nll
):
    """`eval_step(params, batch, example) -> ExampleSums` of `[slots]`, to be jitted.

    Args:
      slots: how many examples a batch may hold, and one more for padding; `example`, int32 `[batch, seq]`, says whose
        token it is.
    """

    def sums(head_params, hidden_SKD, pairs_SK2, weights_SK) -> ExampleSums:
        def body(_, xs):
            x, pairs, w = xs
            logits: Any = model.apply({"params": head_params}, x, method="head")
            target = pairs[..., 0]
            right = jnp.argmax(logits, -1) == target
            return None, (token_nll(logits, target) * w, right * w, token_loss(logits, target) * w)

        chunk = chunk_positions(hidden_SKD.shape[1], model.config.vocab_size, chunk_elements(model.mesh))
        chunks = cut(chunk, hidden_SKD, pairs_SK2, weights_SK)
        _, (nll, correct, loss) = jax.lax.scan(body, None, chunks)
        _, pairs, weights = chunks
        owner = jnp.where(weights > 0, pairs[..., 1], slots - 1)
        per_example = lambda x: jax.ops.segment_sum(x.ravel(), owner.ravel(), slots)
        return ExampleSums(per_example(nll), per_example(weights), per_example(correct), per_example(loss))

    def eval_step(params, batch: Batch, example_BT) -> ExampleSums:
        hidden = hidden_states(model, params, batch["input_ids"], batch["positions"], batch["segment_ids"]).x
        head_params = {key: params[key] for key in model.head_keys}
        return sum_labelled(
            sums,
            head_params,
            hidden,
            jnp.stack([batch["targets"], example_BT], -1),  # both integers of a position: its target and its owner
            batch["loss_weights"],
            capacity=label_capacity,
            shards=batch_shards,
            axes=prepared_axes(head_params, model.config),
            mesh=model.mesh,
        )

    return eval_step


def example_sums(eval_step: Callable[[EvalBatch], Any], plan: EvalPlan) -> Any:
    """What a step gives of each example slot of a batch, a tree of arrays `[slots, ...]`, for all examples of a set:
    the same tree, float64 `[n, ...]` on the host.

    A few steps run ahead of what is read: their batches are on the devices.
    """
    totals: Any = None
    running: deque[tuple[np.ndarray, Any]] = deque()

    def read_oldest() -> None:
        nonlocal totals
        indices, sums = running.popleft()
        sums = jax.device_get(sums)
        if totals is None:
            totals = jax.tree.map(lambda x: np.zeros((len(plan.encoded), *x.shape[1:])), sums)
        for total, part in zip(jax.tree.leaves(totals), jax.tree.leaves(sums), strict=True):
            total[indices] = part[: len(indices)]

    for batch in plan:
        running.append((batch.indices, eval_step(batch)))
        if len(running) > AHEAD:
            read_oldest()
    while running:
        read_oldest()
    return totals


def evaluate(
    eval_step: Callable[[EvalBatch], ExampleSums], plan: EvalPlan, *, prefix: str, accuracy: bool
) -> dict[str, float]:
    """Metrics of one evaluation set under `prefix` (`eval` or `eval_<name>`), with Trainer's timing figures.

    `loss` is averaged as Trainer averages it (`EvalPlan.mean_loss`), and so is the likelihood that `perplexity` is made
    of, whatever the loss is. `accuracy` is the mean over examples of the share of their tokens predicted right, as
    LLaMA-Factory has it; `exact_match` the share of examples with all tokens right, which are those that greedy
    decoding reproduces. Examples without a target are in no mean; if all are such, there are only the times.
    """
    began = time.monotonic()
    count = len(plan.encoded)
    nll, tokens, correct, loss = example_sums(eval_step, plan)
    seconds = max(1e-9, time.monotonic() - began)
    surprise, some = plan.mean_loss(nll, tokens), tokens > 0  # the others were not predicted, rightly or wrongly
    found: dict[str, float] = {}
    if some.any():
        found = {"loss": plan.mean_loss(loss, tokens), "perplexity": _exp(surprise)}
    if accuracy and some.any():
        found["accuracy"] = float(np.mean(correct[some] / tokens[some]))
        found["exact_match"] = float(np.mean(correct[some] == tokens[some]))
    found |= {
        "runtime": round(seconds, 4),
        "samples_per_second": round(count / seconds, 3),
        "steps_per_second": round(len(plan) / seconds, 3),
    }
    return {f"{prefix}_{key}": value for key, value in found.items()}


def _exp(surprise: float) -> float:
    return math.inf if surprise >= 700 else math.exp(surprise)


def make_loss(
    module: CausalLM, sets: Mapping[str, Encoded], mesh: Mesh, config: Config, token_loss: TokenLoss
) -> Callable[[Any], dict[str, float]]:
    """`loss(params)`: the metrics of every evaluation set, under `eval_` or `eval_<name>_`."""
    stage, accuracy = rules_of(config.finetuning.stage), config.finetuning.compute_accuracy
    prepared = {
        name: prepare_evaluation(
            module,
            encoded,
            mesh,
            stage=stage,
            per_device_batch_size=config.training.per_device_eval_batch_size,
            packing=rows_are_packed(config),
            token_loss=token_loss,
            cutoff_len=config.data.cutoff_len,
            windows=packing_windows(encoded, config.data, stage),
            length_seed=length_seed(config),
        )
        for name, encoded in sets.items()
    }

    def loss(params: Any) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, (plan, step) in prepared.items():
            metrics |= evaluate(partial(step, params), plan, prefix=f"eval_{name}".rstrip("_"), accuracy=accuracy)
        return metrics

    return loss


def prepare_evaluation(
    module: CausalLM,
    encoded: Encoded,
    mesh: Mesh,
    *,
    per_device_batch_size: int,
    token_loss: TokenLoss = token_nll,
    **how: Any,
) -> tuple[EvalPlan, Callable[[Any, EvalBatch], ExampleSums]]:
    """The batches of an evaluation over `encoded`, and `step(params, batch)`: the sums of the examples in one of them.

    Args:
      how: as of `jtune.data.eval_batches`.
    """
    shards = batch_shards(mesh)
    rows, everywhere = batch_sharding(mesh, accumulated=False), replicated(mesh)
    plan = eval_batches(encoded, per_device_batch_size=per_device_batch_size, batch_shards=shards, **how)
    check_row_length(mesh, plan.shape[1])
    sums = make_eval_step(
        module, label_capacity=plan.label_capacity, batch_shards=shards, slots=plan.slots, token_loss=token_loss
    )
    compiled = jax.jit(sums, out_shardings=everywhere, compiler_options=compiler_options(mesh))

    def step(params: Any, batch: EvalBatch) -> ExampleSums:
        return compiled(params, *jax.tree.map(lambda x: arrays.put(x, rows), (batch.arrays, batch.example)))

    return plan, step
