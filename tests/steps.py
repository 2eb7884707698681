"""A small model, rows of known lengths, and train steps on them: for tests of the step and of losses."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from jtune import tuning
from jtune.config import FinetuningArguments, TrainingArguments
from jtune.losses.batch import make_loss_sum, token_losses
from jtune.losses.objective import PLAIN
from jtune.models import CausalLM, DecoderConfig, init_params
from jtune.train.optimizer import optimizer_of
from jtune.train.program import Program
from jtune.train.state import init_state
from jtune.train.step import make_train_step

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
LENGTHS = [5, 9, 3, 12, 7, 8, 2, 16]
RATE = 1e-2


def examples(lengths=LENGTHS, seed=0):
    """(ids, labels) of each example; about half of the labels count."""
    rng = np.random.default_rng(seed)
    made = []
    for n in lengths:
        ids = rng.integers(1, CONFIG.vocab_size, n)
        made.append((ids, np.where(rng.random(n) < 0.5, ids, -100)))
    return made


def lay_out(rows, seq, accum=1):
    """A batch of rows, each a list of examples that are laid out one after the other."""
    shape = (len(rows), seq)
    batch = {name: np.zeros(shape, np.int32) for name in ("input_ids", "targets", "positions", "segment_ids")}
    batch["loss_weights"] = np.zeros(shape, np.float32)
    for row, members in enumerate(rows):
        column = 0
        for segment, (ids, labels) in enumerate(members, 1):
            for t in range(len(ids)):
                at = row, column + t
                batch["input_ids"][at], batch["positions"][at], batch["segment_ids"][at] = ids[t], t, segment
                if t + 1 < len(ids) and labels[t + 1] != -100:
                    batch["targets"][at], batch["loss_weights"][at] = labels[t + 1], 1
            column += len(ids)
    divisor = np.float32(batch["loss_weights"].sum())
    return {k: jnp.asarray(x.reshape(accum, -1, seq)) for k, x in batch.items()} | {"divisor": jnp.asarray(divisor)}


@cache
def weights(config):
    return jax.jit(lambda: init_params(config, jax.random.key(0)))()


def prepared(method="full", config=CONFIG):
    params = dict(weights(config))
    if method == "lora":
        params = tuning.lora.add(params, ("q_proj", "v_proj", "down_proj"), rank=4)
        return params, tuning.trainable_mask(params)
    if method == "freeze":
        return tuning.freeze(params, 2, ("all",), ())
    return params, tuning.full_mask(params)


def adamw(trainable, config=CONFIG):
    """The optimizer of a run that asks for no other."""
    return optimizer_of(TrainingArguments(), FinetuningArguments(), trainable, config)


def step_for(params, mask, batch, *, shards=1, clip=1.0, dtype=jnp.float32, float16=False, dropout_key=None):
    """(state, frozen, step) for batches of this shape."""
    trainable, frozen = tuning.partition(params, mask)
    tx = adamw(trainable)
    capacity = batch["input_ids"].shape[1] // shards * batch["input_ids"].shape[2]
    loss_sum = make_loss_sum(CausalLM(CONFIG, dtype=dtype), label_capacity=capacity, batch_shards=shards)
    step = make_train_step(token_losses(loss_sum), tx, max_grad_norm=clip, dropout_key=dropout_key)
    return init_state(trainable, tx, float16=float16), frozen, step


def run(rows, seq, *, method="full", accum=1, updates=2, **options):
    batch = lay_out(rows, seq, accum)
    params, mask = prepared(method)
    state, frozen, step = step_for(params, mask, batch, **options)
    step = jax.jit(step)
    losses = []
    for _ in range(updates):
        state, metrics = step(state, frozen, batch, RATE)
        losses.append((float(metrics.loss), float(metrics.grad_norm)))
    return losses, state


def same(a, b, rtol=2e-5):
    np.testing.assert_allclose(a, b, rtol=rtol)


ONE_EACH = [[example] for example in examples()]
PACKED = [[e for i in group for e in [examples()[i]]] for group in ([7, 6, 4], [3, 1, 2], [5, 0])]


def program_of(module, tx, state, constants, **changes):
    """The program of a step, put together from its parts."""
    whole = Program(module, PLAIN, tx, params=None, mask=None, state=state, constants=constants, mesh=module.mesh)
    return whole._replace(**changes)
