"""What a mesh changes: where arrays lie, and nothing that is computed."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import adamw, program_of

from jtune import tuning
from jtune.data import Sizes
from jtune.errors import ConfigError
from jtune.evaluation.loss import make_eval_step
from jtune.loading.model import abstract_like, placement
from jtune.losses.batch import make_loss_sum, token_losses
from jtune.models import CausalLM, DecoderConfig, init_params
from jtune.models.config import Delta, Experts, Latent, Layer, QueryScale, ShortConv
from jtune.sharding import (
    batch_sharding,
    batch_shards,
    check_experts,
    check_row_length,
    describe_unsplit,
    make_mesh,
    replicated,
    unsplit,
)
from jtune.train.program import lower_step
from jtune.train.state import abstract_state, init_state, shardings_of
from jtune.train.step import make_train_step

RATE = 1e-2
ROWS, SEQ = 8, 32
QUICKLY = {"xla_backend_optimization_level": 0}  # what is compiled runs twice
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
        DENSE, layers=(Layer(11), Layer()), attention_softcap=5.0, logit_softcap=3.0, block="around", norm_offset=True,
        tie_word_embeddings=True, embedding_multiplier=32**0.5, hidden_act="gelu_tanh",
    ),
    "mistral": replace(DENSE, layers=(Layer(5), Layer(5)), qkv_bias=True),
    "mixtral": replace(DENSE, layers=(), experts=Experts(4, 2, 64)),
    # All that layers may have in other places than Llama's: a stack without experts before one with them.
    "latent": replace(
        DENSE, num_key_value_heads=4, latent=Latent(16, 8, 4, 6, 12), layers=(Layer(), Layer(sparse=True)),
        experts=Experts(4, 2, 16, "sigmoid", scale=1.5, correction_bias=True, groups=2, shared_size=16, aux_coef=0.1),
    ),
    "sinks": replace(
        DENSE, sinks=True, mlp="interleaved", hidden_act="clamped", qkv_bias=True, o_bias=True,
        layers=(Layer(11, sparse=True), Layer(sparse=True)), experts=Experts(4, 2, 16, router_bias=True, bias=True),
    ),
    # Chunks that end within the parts of a row; experts whose one kernel has gate and up, and whose input is scaled.
    "llama4": replace(
        DENSE, qk_norm="rotated",
        layers=(Layer(5, chunked=True), Layer(rope=None, query_scale=QueryScale(0.5, 6, 1), sparse=True)),
        experts=Experts(4, 2, 16, "sigmoid", renormalise=False, joined=True, scale_input=True, shared_size=16),
    ),
    # Keys and values that a later layer reuses; inputs of each layer alone; experts beside an MLP.
    "gemma4": replace(
        DENSE, qk_norm="head", value_norm=True, block="around", layer_scalar=True, tie_word_embeddings=True,
        per_layer_inputs=8, per_layer_vocab_size=64, num_hidden_layers=3,
        experts=Experts(4, 2, 16, joined=True, beside=True),
        layers=(
            Layer(11, keys_values="stored", sparse=True),
            Layer(head_dim=16, num_key_value_heads=1, value_is_key=True, sparse=True),
            Layer(11, keys_values="reused", intermediate_size=96),
        ),
    ),
    "joined": replace(
        DENSE, qkv="joined", qkv_bias=True, mlp="joined", mlp_bias=True, norm="layer", norm_bias=True, qk_norm="heads",
        block="parallel_two", layers=(Layer(rope=None),) * 2, alibi=0.5, learned_positions=64, embedding_norm=True,
        head_bias=True,
    ),
    # A state that passes along whole rows, four heads.
    "qwen3_5": replace(
        DENSE, layers=(Layer(linear=True), Layer()), attention_gate=True, norm_offset=True,
        delta=Delta(key_heads=2, value_heads=4, key_dim=8, value_dim=8, taps=4, joined=False),
    ),
    # Decays of channels, and attention without positions.
    "kimi": replace(
        DENSE, num_key_value_heads=4, latent=Latent(16, 8, 4, 6), ropes=(),
        layers=(Layer(rope=None, linear=True), Layer(rope=None)),
        delta=Delta(key_heads=4, value_heads=4, key_dim=8, value_dim=8, taps=4, joined=False, channels=True),
    ),
    # A convolution that reaches into the part of the row before.
    "lfm2": replace(DENSE, layers=(Layer(conv=True), Layer()), short_conv=ShortConv(3, bias=True), qk_norm="head"),
    "wide": replace(DENSE, intermediate_size=96),  # no other array has a dimension of 96
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


def lowered(family, method, packed, accum, mesh, remat="none"):
    """(state, frozen, batch, lowered step) on a mesh, placed as a run places them."""
    config = FAMILIES[family]
    params, mask = prepared(family, method)
    params = jax.device_put(params, placement(params, config, mesh))
    trainable, frozen = tuning.partition(params, mask)
    tx = adamw(trainable)
    rows = lambda x: batch_sharding(mesh, accumulated=True) if np.ndim(x) else replicated(mesh)
    batch = {key: jax.device_put(x, rows(x)) for key, x in batch_of(packed, accum).items()}
    like = abstract_state(trainable, tx, mesh, float16=False)
    labelled = int(np.asarray(batch["loss_weights"]).reshape(accum * batch_shards(mesh), -1).sum(1).max())
    program = program_of(CausalLM(config, mesh=mesh, remat=remat), tx, like, abstract_like(frozen))
    step = lower_step(program, abstract_like(batch), Sizes(labelled))
    # The state is donated, and weights are shared between tests: copies of them go in.
    copy = jax.jit(lambda t: init_state(jax.tree.map(jnp.copy, t), tx), out_shardings=shardings_of(like))
    return copy(trainable), frozen, batch, step


def trained(family, method, packed, accum, mesh):
    """Losses and gradient norms of two updates, and the parameters after them."""
    state, frozen, batch, step = lowered(family, method, packed, accum, mesh)
    step, figures = step.compile(QUICKLY), []
    for _ in range(2):
        state, metrics = step(state, frozen, batch, jax.device_put(jnp.float32(RATE), replicated(mesh)))
        figures.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(figures), jax.tree.map(np.asarray, state.trainable)


slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


@cache
def alone(family, method, packed):
    """On one device, without anything that a mesh brings: the plain module under `jax.jit`."""
    params, mask = prepared(family, method)
    trainable, frozen = tuning.partition(params, mask)
    tx = adamw(trainable)
    loss_sum = make_loss_sum(CausalLM(FAMILIES[family]), label_capacity=ROWS * SEQ, batch_shards=1)
    step, state, figures = (
        jax.jit(make_train_step(token_losses(loss_sum), tx, max_grad_norm=1.0)),
        init_state(trainable, tx),
        [],
    )
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
        slow("llama", "lora", False, 4, {"fsdp": 2, "context": 2, "tensor": 2}),
        ("gemma2", "full", True, 2, {"fsdp": 2, "context": 4}),
        slow("gemma2", "lora", False, 1, {"data": 2, "context": 2, "fsdp": 2}),
        ("mistral", "freeze", True, 1, {"data": 2, "fsdp": 1, "context": 4}),
        slow("qwen3_5", "full", True, 2, {"fsdp": 1, "context": 4, "tensor": 2}),
        ("qwen3_5", "lora", True, 1, {"fsdp": 2, "context": 2, "tensor": 2}),
        slow("mixtral", "full", True, 1, {"fsdp": 8}),
        slow("mixtral", "full", False, 2, {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("mixtral", "full", True, 1, {"fsdp": 2, "expert": 4}),
        ("mixtral", "lora", True, 2, {"fsdp": 1, "expert": 4, "tensor": 2}),
        slow("mixtral", "lora", False, 1, {"data": 2, "fsdp": 1, "expert": 2, "context": 2}),
        slow("latent", "full", True, 1, {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("sinks", "full", True, 1, {"fsdp": 2, "expert": 2, "context": 2}),
        slow("gemma4", "full", True, 1, {"fsdp": 2, "expert": 2, "context": 2}),
        slow("gemma4", "lora", True, 2, {"fsdp": 2, "tensor": 2, "context": 2}),
        slow("llama4", "full", True, 1, {"fsdp": 2, "expert": 2, "context": 2}),
        slow("llama4", "lora", True, 1, {"fsdp": 1, "expert": 2, "context": 2, "tensor": 2}),
        ("lfm2", "full", True, 1, {"fsdp": 2, "context": 2, "tensor": 2}),
        slow("kimi", "full", True, 2, {"fsdp": 1, "context": 4, "tensor": 2}),
        slow("joined", "full", True, 1, {"fsdp": 2, "tensor": 2, "context": 2}),
    ],
    ids=str,
)
def test_a_mesh_trains_as_one_device_does(family, method, packed, accum, sizes, monkeypatch):
    monkeypatch.setattr("jtune.tuning.axes.SMALL_ADAPTER", 0)
    figures, params = trained(family, method, packed, accum, make_mesh(**sizes))
    expected, expected_params = alone(family, method, packed)
    np.testing.assert_allclose(figures, expected, rtol=5e-5)
    # AdamW's first steps have the size of the learning rate whatever the gradient's: near zero, its sign decides.
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=RATE / 20)
    jax.tree.map(near, params, expected_params)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_layers_are_gathered_one_at_a_time_and_activations_and_gradients_stay_split(method, monkeypatch):
    monkeypatch.setattr("jtune.tuning.axes.SMALL_ADAPTER", 0)
    mesh = make_mesh(fsdp=4, devices=jax.devices()[:4])
    text = lowered("wide", method, True, 2, mesh, remat="full")[-1].compile(QUICKLY).as_text()
    assert "f32[32,96]" in text  # a layer's kernel, gathered
    # Kernels and adapters of both layers, and what is formed of them: gradients, their sums, moments.
    mine, whole = ("f32[2,8,96]", "f32[2,96,8]"), ("f32[2,32,96]", "f32[2,96,32]")
    if method == "lora":
        mine = (*mine, "f32[2,96,2]", "f32[2,2,96]")
    assert [shape for shape in mine if shape not in text] == []
    assert [shape for shape in whole if shape in text] == []
    # Four rows of a microbatch: hidden states, heads, the MLP's hidden layer.
    whole = ("f32[4,32,32]", "f32[4,32,4,8]", "f32[4,32,96]")
    assert [shape for shape in whole if shape in text] == []


def test_the_head_is_computed_once_and_its_logits_stay_split():
    """With tokens over 4 and vocabulary over 2 devices: of 2 x 4 x 32 tokens a device has a quarter of the labels."""
    mesh = make_mesh(fsdp=1, context=4, tensor=2)
    _, _, batch, step = lowered("llama", "freeze", True, 2, mesh)
    labelled = int(np.asarray(batch["loss_weights"]).reshape(2, -1).sum(1).max())
    text = step.compile(QUICKLY).as_text()
    assert f"f32[1,{-(-labelled // 4)},32]" in text
    assert f"f32[1,{-(-labelled // 4)},64]" not in text  # logits of the whole vocabulary
    assert f"f32[1,{labelled},32]" not in text


@pytest.mark.parametrize(("family", "sizes"), [("gemma2", {"fsdp": 2, "context": 4}), ("mixtral", {"expert": 4})])
def test_an_evaluation_gives_the_same_on_a_mesh(family, sizes):
    mesh, slots = make_mesh(**sizes), 25
    batch = {key: x[0] for key, x in batch_of(True).items() if np.ndim(x)}
    example = np.where(batch["segment_ids"] > 0, np.arange(ROWS)[:, None] * 3 + batch["segment_ids"] - 1, slots - 1)
    sums = {}
    for where in (None, mesh):
        shards = 1 if where is None else batch_shards(where)
        module = CausalLM(FAMILIES[family], mesh=where)
        step = jax.jit(make_eval_step(module, label_capacity=ROWS * SEQ // shards, batch_shards=shards, slots=slots))
        params, arrays = weights(family), (batch, example)
        if where is not None:
            params = jax.device_put(params, placement(params, FAMILIES[family], where))
            arrays = jax.device_put(arrays, batch_sharding(where, accumulated=False))
        sums[where] = jax.tree.map(np.asarray, step(params, *arrays))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), sums[None], sums[mesh])
    assert sums[mesh].tokens.sum() == batch["loss_weights"].sum()


def test_what_the_mesh_does_not_divide_is_kept_whole_and_said():
    mesh = make_mesh(fsdp=2, tensor=4)
    axes = {"odd": ("embed", "vocab"), "even": ("embed", "mlp"), "norm": (None,)}
    shapes = {"odd": (32, 65), "even": (32, 64), "norm": (32,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    (found,) = unsplit(axes, params, mesh)
    # A device holds 16 x 65 of 4 bytes and needs a quarter of them.
    assert found == ("odd", (32, 65), ("tensor",), 16 * 65 * 4 * 3 // 4)
    assert "odd [32, 65] over tensor (0.0 MB)" in describe_unsplit([found])
    assert unsplit(axes, params, make_mesh(fsdp=8)) == []


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: make_mesh(context=3), "mesh_context=3"),
        (lambda: make_mesh(context=-1), "at most one mesh size may be -1, but mesh_fsdp, mesh_context are"),
        (lambda: make_mesh(expert=0), "mesh_expert=0: a mesh size is a number of devices"),
        (lambda: make_mesh(fsdp=16), "needs 16 devices, but there are 8"),
        (lambda: check_experts(make_mesh(expert=8), 4), "mesh_expert=8 does not divide the 4 experts"),
        (lambda: check_experts(make_mesh(expert=8), 0), "this model has no experts"),
        (lambda: check_row_length(make_mesh(context=8), 2050), "cutoff_len to a multiple of it"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(ask, words):
    with pytest.raises(ConfigError, match=words):
        ask()
