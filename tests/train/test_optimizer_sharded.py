"""What optimizers keep lies beside the parameters, is counted, and comes back from checkpoints bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optimizers import DECODER, RATES, arguments, full, gradients

from jtune.loading.model import placement
from jtune.planning.shapes import local_bytes
from jtune.sharding import make_mesh
from jtune.train.checkpoint import Checkpointer
from jtune.train.optimizer import apply_update, optimizer_of
from jtune.train.optimizers.leafwise import whole_matrices
from jtune.train.optimizers.muon import orthogonalized
from jtune.train.restore import restore
from jtune.train.state import abstract_state, init_state, shardings_of

CASES = {
    "adafactor": {"optim": "adafactor"},
    "adamw_8bit": {"optim": "adamw_8bit"},
    "lion": {"optim": "lion_32bit"},
    "muon": {"use_muon": True},
    "galore": {
        "use_galore": True,
        "galore_rank": 4,
        "galore_update_interval": 1,
        "galore_target": ("q_proj", "up_proj"),
    },
    "apollo": {"use_apollo": True, "apollo_rank": 4, "apollo_update_interval": 1},
    "adam_mini": {"use_adam_mini": True},
}


def setting(given, mesh):
    """(state, its shapes and places, gradients of two updates, the update)."""
    start = jax.tree.map(jnp.asarray, full())
    where = placement(start, DECODER, mesh)
    trainable = jax.device_put(start, where)
    tx = optimizer_of(*arguments(weight_decay=0.1, **given), trainable, DECODER)
    like = abstract_state(trainable, tx, mesh, float16=False)
    places = shardings_of(like)
    key = jax.random.key(7)

    def update(state, grads, rate):
        direction, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = apply_update(state.trainable, direction, rate, jax.random.fold_in(key, state.step))
        return state._replace(step=state.step + 1, trainable=trainable, opt_state=opt_state)

    step = jax.jit(update, in_shardings=(places, where, None), out_shardings=places, donate_argnums=0)
    state = jax.jit(lambda t: init_state(t, tx), out_shardings=places)(trainable)
    return state, like, [jax.device_put(g, where) for g in gradients("full")[:2]], step


def run(given, mesh):
    state, like, grads, step = setting(given, mesh)
    for g, rate in zip(grads, RATES):
        state = step(state, g, rate)
    return state, like


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_equal_one_and_each_keeps_its_part(name):
    mesh = make_mesh(fsdp=2, tensor=2, expert=2)
    state, like = run(CASES[name], mesh)
    alone, _ = run(CASES[name], make_mesh(devices=jax.devices()[:1]))
    for path, x in jax.tree_util.tree_leaves_with_path(alone.trainable):
        y = x_at(state.trainable, path)
        scale = np.abs(np.asarray(x) - x_at(full(), path)).max()
        # Codes of 8 bits and signs turn over on the last bit; the root of nearly nothing magnifies it.
        close = np.abs(np.asarray(x) - np.asarray(y)) <= 1e-3 * scale
        assert close.mean() > 0.999, jax.tree_util.keystr(path)
    kept = state.opt_state
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(kept))
    assert here == local_bytes(like.opt_state)
    whole = sum(x.nbytes for x in jax.tree.leaves(kept))
    assert here < whole / 2


def x_at(tree, path):
    return dict(jax.tree_util.tree_leaves_with_path(tree))[path]


@pytest.mark.parametrize("name", ["adafactor", "adamw_8bit", "galore"])
def test_a_resumed_state_goes_on_bit_for_bit(name, tmp_path):
    mesh = make_mesh(fsdp=4, devices=jax.devices()[:4])
    state, like, grads, step = setting(CASES[name], mesh)
    state = step(state, grads[0], RATES[0])
    saver = Checkpointer(tmp_path)
    saver.save(1, state, {}, lambda folder: None)
    saver.close()
    through = step(state, grads[1], RATES[1])
    resumed = step(restore(tmp_path / "checkpoint-1", like), grads[1], RATES[1])
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), through, resumed)
    assert all(jax.tree.leaves(same))


def test_moments_lie_along_what_they_are_means_of():
    mesh = make_mesh(fsdp=2, tensor=2, expert=2)
    _, like, _, _ = setting(CASES["adafactor"], mesh)
    up = (
        like.opt_state[0].moments["layers"]["mlp"]["experts"]["up_proj"]["kernel"].arrays
    )  # [layers, experts, embed, mlp]
    spec = lambda x: tuple(x.sharding.spec)
    assert spec(up["nu_row"]) == (None, "expert", "fsdp")
    assert spec(up["nu_column"]) == (None, "expert", "tensor")
    _, like, _, _ = setting(CASES["galore"], mesh)
    up = like.opt_state[0].moments["layers"]["mlp"]["experts"]["up_proj"]["kernel"].arrays
    assert spec(up["mu"]) == (None, "expert", None, "tensor")
    assert spec(up["projection"]) == (None, "expert", "fsdp", None)
    _, like, _, _ = setting(CASES["adamw_8bit"], mesh)
    up = like.opt_state[0].moments["layers"]["mlp"]["experts"]["up_proj"]["kernel"].arrays
    assert spec(up["mu"]) == (None, "expert", "fsdp", "tensor")
    assert up["mu_scale"].shape == (2, 2, 64, 1)
    assert spec(up["mu_scale"]) == (None, "expert", "fsdp", None)


@pytest.mark.parametrize("layers", [16, 12])
def test_whole_matrices_go_to_devices_of_their_own(layers):
    """Of a stack of split matrices each device makes some orthogonal, and never holds all of it."""
    where = NamedSharding(make_mesh(fsdp=8), P(None, "fsdp", None))
    x = jax.random.normal(jax.random.key(0), (layers, 64, 64))

    def compiled(place):
        f = jax.jit(lambda x: whole_matrices(orthogonalized, x, 1, place), in_shardings=where, out_shardings=where)
        return f.lower(jax.device_put(x, where)).compile()

    ours, plain = compiled(where), compiled(None)
    assert "all-gather" not in ours.as_text()
    assert ours.memory_analysis().temp_size_in_bytes < plain.memory_analysis().temp_size_in_bytes / 3
    split = jax.device_put(x, where)
    np.testing.assert_allclose(ours(split), jax.vmap(orthogonalized)(x), atol=1e-5)


def test_matrices_that_are_many_are_worked_on_some_at_a_time(monkeypatch):
    x = jax.random.normal(jax.random.key(0), (5, 3, 16, 8))
    expected = jax.vmap(jax.vmap(orthogonalized))(x)
    monkeypatch.setattr("jtune.train.optimizers.leafwise.AT_WORK", 4 * 16 * 8)
    work = jax.jit(lambda x: whole_matrices(orthogonalized, x, 2, None))
    np.testing.assert_allclose(work(x), expected, atol=1e-5)
    assert "f32[4,16,8]" in work.lower(x).compile().as_text()
