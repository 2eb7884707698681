"""The train step: what it computes does not depend on how its tokens are laid out, and it computes nothing in vain."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import (
    CONFIG,
    ONE_EACH,
    PACKED,
    RATE,
    adamw,
    examples,
    lay_out,
    prepared,
    program_of,
    run,
    same,
    step_for,
    weights,
)

from jtune import tuning
from jtune.data import Sizes
from jtune.loading.model import abstract_like, placement, with_remat
from jtune.losses.batch import make_loss_sum
from jtune.losses.token import token_nll
from jtune.models import CausalLM, abstract_params
from jtune.sharding import batch_sharding, make_mesh, replicated
from jtune.train.program import compile_steps
from jtune.train.state import LossScale, abstract_state, init_state, shardings_of
from jtune.train.timing import Timing
from jtune.tuning.freeze import cut_layers
from jtune.tuning.unstack import restacked_shapes, unstack_layers


@cache
def unpacked(method, accum=1):
    """(loss, gradient norm) of two updates, an example a row."""
    return run(ONE_EACH, 16, method=method, accum=accum)[0]


def test_the_loss_is_the_mean_over_all_tokens_that_count():
    batch = lay_out(ONE_EACH, 16)
    params, mask = prepared()
    state, frozen, step = step_for(params, mask, batch)
    _, metrics = jax.jit(step)(state, frozen, batch, RATE)
    logits = jax.jit(CausalLM(CONFIG).apply)({"params": params}, batch["input_ids"][0])
    total, count = 0.0, 0
    for row, (ids, labels) in enumerate(examples()):
        kept = labels[1:] != -100
        total += float(jnp.sum(token_nll(logits[row, : len(ids) - 1], jnp.asarray(ids[1:]))[kept]))
        count += int(kept.sum())
    same(float(metrics.loss), total / count)
    assert float(metrics.tokens) == count


@pytest.mark.parametrize("method", ["full", "lora", "freeze"])
def test_packed_equals_unpacked(method):
    same(unpacked(method), run(PACKED, 32, method=method)[0])


@pytest.mark.parametrize("method", ["full", "lora", "freeze"])
@pytest.mark.parametrize("accum", [2, 4])
def test_accumulated_equals_one_batch_with_uneven_masks(accum, method):
    same(unpacked(method), unpacked(method, accum))


def test_empty_microbatches_at_the_end_change_nothing():
    padded = [*ONE_EACH, [], [], [], []]
    same(run(ONE_EACH, 16, accum=2)[0], run(padded, 16, accum=3)[0])


def test_clipping_scales_the_whole_gradient():
    free, clipped = run(ONE_EACH, 16, updates=1, clip=0.0)[1], run(ONE_EACH, 16, updates=1, clip=1e-3)[1]
    moments = lambda state: state.opt_state[0].mu["norm"]["scale"]
    norm = run(ONE_EACH, 16, updates=1)[0][0][1]
    same(moments(clipped), moments(free) * (1e-3 / (norm + 1e-6)), rtol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "method"),
    [({"fsdp": 8}, "full"), ({"data": 2, "fsdp": 2, "tensor": 2}, "lora"), ({"data": 8, "fsdp": 1}, "freeze")],
)
def test_eight_devices_equal_one(sizes, method):  # more of them in test_sharding.py
    alone = unpacked(method, 2 if sizes.get("tensor") else 1)
    mesh = make_mesh(**sizes)
    shards = sizes.get("data", 1) * sizes.get("fsdp", 1)
    accum = len(ONE_EACH) // shards
    batch = lay_out(ONE_EACH, 16, accum)
    params, mask = prepared(method)
    params = jax.device_put(params, placement(params, CONFIG, mesh))
    rows = lambda x: jax.sharding.NamedSharding(mesh, jax.P(None, ("data", "fsdp")) if x.ndim else jax.P())
    batch = {key: jax.device_put(x, rows(x)) for key, x in batch.items()}
    state, frozen, step = step_for(params, mask, batch, shards=shards)
    like = abstract_state(state.trainable, adamw(state.trainable), mesh, float16=False)
    where = shardings_of(like)
    step = jax.jit(
        step,
        in_shardings=(where, shardings_of(frozen), shardings_of(batch), replicated(mesh)),
        out_shardings=(where, replicated(mesh)),
    )
    state, losses = jax.device_put(state, where), []
    for _ in range(2):
        state, metrics = step(state, frozen, batch, jnp.float32(RATE))
        losses.append((float(metrics.loss), float(metrics.grad_norm)))
    same(losses, alone, rtol=5e-5)
    if method == "full" and sizes.get("fsdp", 1) > 1:
        kernel = state.trainable["layers"]["mlp"]["up_proj"]["kernel"]
        assert kernel.addressable_shards[0].data.size < kernel.size


@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_a_frozen_leaf_has_no_gradient_and_no_state_and_is_not_an_output(method):
    batch = lay_out(ONE_EACH, 16)
    params, mask = prepared(method)
    state, frozen, step = step_for(params, mask, batch)
    trained = sum(jax.tree.leaves(jax.tree.map(lambda x, m: x.size if m else 0, params, mask)))
    assert sum(x.size for x in jax.tree.leaves(state.trainable)) == trained
    moments = state.opt_state[0]
    assert sum(x.size for x in jax.tree.leaves((moments.mu, moments.nu))) == 2 * trained
    out, _ = jax.eval_shape(step, state, frozen, batch, RATE)
    assert jax.tree.structure(out.trainable) == jax.tree.structure(state.trainable)
    before = jax.tree.map(np.asarray, frozen)
    jax.jit(step, donate_argnums=0)(state, frozen, batch, RATE)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == np.asarray(b)).all()), before, frozen)))


def flops(method, layers):
    """Of loss and gradients. Each layer is a stack of its own: what a scan runs is counted once, however often."""
    config = replace(CONFIG, hidden_size=128, intermediate_size=512, head_dim=32, num_hidden_layers=layers, layers=())
    adapted = lambda x: tuning.lora.add(x, ("all",), rank=1) if method == "lora" else x
    params = jax.eval_shape(lambda x: adapted(cut_layers(x, range(layers))), abstract_params(config))
    trainable, frozen = tuning.partition(params, tuning.trainable_mask(params))
    batch = {k: x[0] for k, x in lay_out([[e] for e in examples([16] * 64)], 16).items() if x.ndim}
    loss_sum = make_loss_sum(CausalLM(config), label_capacity=64 * 16, batch_shards=1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (trainable, frozen))
    gradient = jax.jit(jax.grad(lambda t, f: loss_sum(t, f, batch, None)))
    return gradient.lower(*shapes).compile().cost_analysis()["flops"]


def test_lora_forms_no_gradient_of_a_frozen_kernel():
    """A token costs a layer of N parameters 2N forward, 2N back to its input, 2N for its kernels: LoRA saves these."""
    config = replace(CONFIG, hidden_size=128, intermediate_size=512, head_dim=32, num_hidden_layers=1, layers=())
    N = sum(x.size for x in jax.tree.leaves(abstract_params(config)["layers"]) if x.ndim == 3)
    of_a_layer = lambda method: (flops(method, 2) - flops(method, 1)) / (N * 64 * 16)
    assert of_a_layer("full") == pytest.approx(6, abs=0.5)
    assert of_a_layer("lora") == pytest.approx(4, abs=0.5)


def test_a_second_step_of_a_shape_compiles_nothing_and_the_state_is_donated():
    mesh = make_mesh(devices=jax.devices()[:1])
    params, mask = prepared("lora")
    params = jax.device_put(params, placement(params, CONFIG, mesh))
    trainable, frozen = tuning.partition(params, mask)
    tx = adamw(trainable)
    state_like = abstract_state(trainable, tx, mesh, float16=False)
    plan = type("Plan", (), {"sizes": staticmethod(lambda shape, other: Sizes(128))})
    program = program_of(CausalLM(CONFIG), tx, state_like, frozen, mesh=mesh)
    update = compile_steps(program, plan, Timing())
    state = jax.device_put(init_state(trainable, tx), shardings_of(state_like))
    batch = jax.device_put(lay_out(ONE_EACH, 16), replicated(mesh))
    state, _ = update(state, batch, RATE)
    pointers = lambda s: {x.unsafe_buffer_pointer() for x in jax.tree.leaves((s.trainable, s.opt_state)) if x.ndim > 1}
    before, old = pointers(state), state
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    state, _ = update(state, batch, RATE)
    jax.block_until_ready(state)
    assert compiled == []
    assert all(x.is_deleted() for x in jax.tree.leaves(old.trainable))
    assert pointers(state) == before


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one", "eight"])
def test_unrolled_layers_take_their_kernels_from_lists_and_the_stacks_are_gone(sizes):
    mesh = make_mesh(devices=None if sizes else jax.devices()[:1], **sizes)
    params, mask = prepared("lora")
    params = jax.tree.map(jnp.copy, params)
    params = jax.device_put(params, placement(params, CONFIG, mesh))
    trainable, frozen = tuning.partition(params, mask)
    module = with_remat(CausalLM(CONFIG, mesh=mesh), "none", "cpu")
    held, planned = unstack_layers(frozen, module), unstack_layers(abstract_like(frozen), module)
    assert abstract_like(held) == planned
    stacks = [x for x in jax.tree.leaves(frozen["layers"]) if x.ndim == 3]
    assert stacks
    assert all(x.is_deleted() for x in stacks)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(restacked_shapes(held)) == shapes(abstract_like(frozen))

    tx, plan = adamw(trainable), type("Plan", (), {"sizes": staticmethod(lambda shape, other: Sizes(128))})
    like = abstract_state(trainable, tx, mesh, float16=False)
    accum = 2 if sizes else 1
    batch = lay_out(ONE_EACH, 16, accum)
    rows = lambda x: batch_sharding(mesh, accumulated=True) if x.ndim else replicated(mesh)
    batch = {name: jax.device_put(x, rows(x)) for name, x in batch.items()}
    update = compile_steps(program_of(module, tx, like, held), plan, Timing())
    state, losses = jax.device_put(init_state(trainable, tx), shardings_of(like)), []
    for _ in range(2):
        state, metrics = update(state, batch, RATE)
        losses.append((float(metrics.loss), float(metrics.grad_norm)))
    same(losses, unpacked("lora", accum), rtol=5e-5)
    whole = tuning.combine(state.trainable, held)  # what is evaluated
    logits = lambda params: CausalLM(CONFIG).apply({"params": params}, batch["input_ids"][0])
    again = tuning.combine(jax.device_get(state.trainable), tuning.partition(*prepared("lora"))[1])
    np.testing.assert_allclose(jax.jit(logits)(whole), jax.jit(logits)(again), atol=1e-5)


def test_dropout_follows_from_the_key_and_the_step():
    params = tuning.lora.add(weights(CONFIG), ("q_proj",), rank=4, dropout=0.5)
    mask = tuning.trainable_mask(params)
    params = jax.tree.map(
        lambda x, trains: jax.random.normal(jax.random.key(1), x.shape) if trains else x, params, mask
    )
    batch = lay_out(ONE_EACH, 16)

    def two_steps(seed):
        state, frozen, step = step_for(params, mask, batch, dropout_key=jax.random.key(seed))
        step = jax.jit(step)

        def losses():
            first, one = step(state, frozen, batch, 0.0)
            return [float(one.loss), float(step(first, frozen, batch, 0.0)[1].loss)]

        return losses

    losses, others = two_steps(0), two_steps(1)
    assert losses() == losses()
    assert losses()[0] != losses()[1]
    assert losses() != others()


def test_bfloat16_keeps_float32_weights_and_comes_close():
    batch = lay_out(ONE_EACH, 16)
    params, mask = prepared()
    state, frozen, step = step_for(params, mask, batch, dtype=jnp.bfloat16)
    state, metrics = jax.jit(step)(state, frozen, batch, RATE)
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.float32)}
    same(float(metrics.loss), run(ONE_EACH, 16, updates=1)[0][0][0], rtol=1e-2)


def test_float16_overflow_skips_the_update_and_halves_the_scale():
    batch = lay_out(ONE_EACH, 16)
    params, mask = prepared()
    state, frozen, step = step_for(params, mask, batch, dtype=jnp.float16, float16=True)
    good, metrics = jax.jit(step)(state, frozen, batch, RATE)
    assert bool(metrics.finite)
    same(float(metrics.grad_norm), run(ONE_EACH, 16, updates=1)[0][0][1], rtol=5e-2)
    wild = state._replace(loss_scale=LossScale(jnp.float32(2.0**40), jnp.int32(5)))
    after, metrics = jax.jit(step)(wild, frozen, batch, RATE)
    assert not bool(metrics.finite)
    assert (bool(jnp.isfinite(metrics.loss)), float(metrics.loss_scale)) == (True, 2.0**40)
    assert float(after.loss_scale.scale) == 2.0**39
    assert int(after.loss_scale.good_steps) == 0
    unchanged = jax.tree.map(lambda a, b: bool((a == b).all()), wild.trainable, after.trainable)
    assert all(jax.tree.leaves(unchanged))
    assert int(good.loss_scale.good_steps) == 1


def test_a_step_with_nothing_finite_changes_nothing():
    batch = lay_out(ONE_EACH, 16)
    params, mask = prepared()
    params["norm"] = {"scale": params["norm"]["scale"].at[0].set(jnp.nan)}
    state, frozen, step = step_for(params, mask, batch)
    after, metrics = jax.jit(step)(state, frozen, batch, RATE)
    assert not bool(metrics.finite)
    kernel = lambda s: s.trainable["lm_head"]["kernel"]
    assert bool((kernel(after) == kernel(state)).all())
