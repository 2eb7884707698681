"""What a mesh changes: where arrays lie, and nothing that is computed."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtune import tuning
from jtune.models import CausalLM, DecoderConfig, init_params
from jtune.sharding import batch_sharding, batch_shards, make_mesh, replicated
from jtune.train import build
from jtune.train.optimizer import make_optimizer
from jtune.train.state import init_state
from jtune.train.step import make_loss_sum, make_train_step

RATE = 1e-2
ROWS, SEQ = 8, 32
DENSE = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
FAMILIES = {
    "llama": DENSE,
    # Windows that reach into the part of the row before, on some layers; soft-caps; tied and scaled embeddings.
    "gemma2": replace(
        DENSE, windows=(11, None), attention_softcap=5.0, logit_softcap=3.0, sandwich_norms=True, norm_offset=True,
        tie_word_embeddings=True, scale_embeddings=True, hidden_act="gelu_tanh",
    ),
    "mistral": replace(DENSE, windows=(5, 5), qkv_bias=True),
    "mixtral": replace(DENSE, num_experts=4, num_experts_per_tok=2),
}  # fmt: skip


def batch_of(packed: bool, accum: int = 1, seed: int = 0):
    """Rows with one example each, or with several; of each about half of the labels count, more in the later part."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, SEQ)
    batch = {name: np.zeros(shape, np.int32) for name in ("input_ids", "targets", "positions", "segment_ids")}
    batch["loss_weights"] = np.zeros(shape, np.float32)
    for row in range(ROWS):
        lengths = [13, 4, 12] if packed else [int(rng.integers(2, SEQ + 1))]
        column = 0
        for segment, n in enumerate(lengths, 1):
            here = row, slice(column, column + n)
            batch["input_ids"][here] = rng.integers(1, DENSE.vocab_size, n)
            batch["positions"][here], batch["segment_ids"][here] = np.arange(n), segment
            batch["loss_weights"][here] = rng.random(n) < np.linspace(0.2, 0.8, n)
            batch["loss_weights"][row, column + n - 1] = 0
            batch["targets"][row, column : column + n - 1] = batch["input_ids"][row, column + 1 : column + n]
            column += n
    divisor = np.float32(batch["loss_weights"].sum())
    batch["targets"] *= batch["loss_weights"] > 0
    return {k: x.reshape(accum, -1, SEQ) for k, x in batch.items()} | {"divisor": divisor}


@cache
def weights(family):
    return jax.jit(lambda: init_params(FAMILIES[family], jax.random.key(0)))()


def prepared(family, method):
    params = dict(weights(family))
    if method == "lora":
        targets = ("q_proj", "o_proj", "gate_proj", "down_proj")
        params = tuning.lora.add(params, targets, rank=8)
        b = lambda path, x: jax.random.normal(jax.random.key(1), x.shape) * 0.1 if path[-1] == b_of else x
        b_of = jax.tree_util.GetAttrKey("b")
        params = jax.tree_util.tree_map_with_path(b, params)
        return params, tuning.trainable_mask(params)
    if method == "freeze":
        return tuning.freeze(params, 1, ("all",), ())
    return params, tuning.full_mask(params)


def lowered(family, method, packed, accum, mesh, remat="full"):
    """(state, frozen, batch, lowered step) on a mesh, placed as a run places them."""
    config = FAMILIES[family]
    params, mask = prepared(family, method)
    params = jax.device_put(params, build.placement(params, config, mesh))
    trainable, frozen = tuning.partition(params, mask)
    tx = make_optimizer()
    rows = lambda x: batch_sharding(mesh, accumulated=True) if np.ndim(x) else replicated(mesh)
    batch = {key: jax.device_put(x, rows(x)) for key, x in batch_of(packed, accum).items()}
    like = build.abstract_state(trainable, tx, mesh, float16=False)
    labelled = int(np.asarray(batch["loss_weights"]).reshape(accum * batch_shards(mesh), -1).sum(1).max())
    step = build.lower_step(
        CausalLM(config, mesh=mesh, remat=remat), tx, like, build.like(frozen), build.like(batch), mesh,
        label_capacity=labelled, max_grad_norm=1.0, dropout_key=None,
    )  # fmt: skip
    # The state is donated, and weights are shared between tests: copies of them go in.
    copy = jax.jit(lambda t: init_state(jax.tree.map(jnp.copy, t), tx), out_shardings=build.shardings_of(like))
    return copy(trainable), frozen, batch, step


def trained(family, method, packed, accum, mesh):
    """Losses and gradient norms of two updates, and the parameters after them."""
    state, frozen, batch, step = lowered(family, method, packed, accum, mesh)
    step, figures = step.compile(), []
    for _ in range(2):
        state, metrics = step(state, frozen, batch, jax.device_put(jnp.float32(RATE), replicated(mesh)))
        figures.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(figures), jax.tree.map(np.asarray, state.trainable)


@cache
def alone(family, method, packed):
    """On one device, without anything that a mesh brings: the plain module under `jax.jit`."""
    params, mask = prepared(family, method)
    trainable, frozen = tuning.partition(params, mask)
    tx = make_optimizer()
    loss_sum = make_loss_sum(CausalLM(FAMILIES[family]), label_capacity=ROWS * SEQ, batch_shards=1)
    step, state, figures = jax.jit(make_train_step(loss_sum, tx, max_grad_norm=1.0)), init_state(trainable, tx), []
    for _ in range(2):
        state, metrics = step(state, frozen, batch_of(packed), RATE)
        figures.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(figures), jax.tree.map(np.asarray, state.trainable)


@pytest.mark.parametrize(
    ("family", "method", "packed", "accum", "sizes"),
    [
        ("llama", "full", True, 1, {"fsdp": 8}),
        ("llama", "freeze", False, 1, {"data": 8, "fsdp": 1}),
        ("llama", "full", False, 2, {"fsdp": 2, "tensor": 4}),
        ("llama", "lora", True, 2, {"data": 2, "fsdp": 2, "tensor": 2}),
        ("llama", "full", True, 1, {"fsdp": 1, "context": 8}),
        ("llama", "full", True, 2, {"fsdp": 2, "context": 4}),
        ("llama", "lora", False, 4, {"fsdp": 2, "context": 2, "tensor": 2}),
        ("gemma2", "full", True, 2, {"fsdp": 2, "context": 4}),
        ("gemma2", "lora", False, 1, {"data": 2, "context": 2, "fsdp": 2}),
        ("mistral", "freeze", True, 1, {"data": 2, "fsdp": 1, "context": 4}),
        ("mixtral", "full", True, 1, {"fsdp": 8}),
        ("mixtral", "full", False, 2, {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("mixtral", "full", True, 1, {"fsdp": 2, "expert": 4}),
        ("mixtral", "lora", True, 2, {"fsdp": 1, "expert": 4, "tensor": 2}),
        ("mixtral", "lora", False, 1, {"data": 2, "fsdp": 1, "expert": 2, "context": 2}),
    ],
    ids=str,
)
def test_a_mesh_trains_as_one_device_does(family, method, packed, accum, sizes, monkeypatch):
    monkeypatch.setattr(build, "SMALL_ADAPTER", 0)
    figures, params = trained(family, method, packed, accum, make_mesh(**sizes))
    expected, expected_params = alone(family, method, packed)
    np.testing.assert_allclose(figures, expected, rtol=5e-5)
    # AdamW's first steps have the size of the learning rate whatever the gradient's: near zero, its sign decides.
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=RATE / 20)
    jax.tree.map(near, params, expected_params)
