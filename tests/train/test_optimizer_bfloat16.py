"""Parameters in bfloat16 do not stall: they are rounded at random, the same way in every run and on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from optimizers import DECODER, arguments

from jtune.sharding import make_mesh
from jtune.train.optimizer import apply_update, init_optimizer, optimizer_of, rounded_at_random

RATE = 1e-3  # of a parameter near 1, whose bfloat16 neighbours are 0.004 and 0.008 away
UPDATES = 400


def descend(dtype, key):
    """(distance from the optimum after each 100 updates) of 256 numbers under a quadratic loss, AdamW."""
    target = jnp.linspace(0.9, 1.1, 256)
    params = {"norm": {"scale": (target + jnp.where(jnp.arange(256) % 2 == 0, 0.2, -0.2)).astype(dtype)}}
    tx = optimizer_of(*arguments(pure_bf16=dtype == jnp.bfloat16), params, DECODER)

    @jax.jit
    def hundred(params, state, start):
        def update(i, carry):
            params, state = carry
            grads = jax.tree.map(lambda p: p.astype(jnp.float32) - target, params)
            direction, state = tx.update(grads, state, params)
            folded = None if key is None else jax.random.fold_in(key, start + i)
            return apply_update(params, direction, RATE, folded), state

        return jax.lax.fori_loop(0, 100, update, (params, state))

    state, distances = init_optimizer(tx, params), []
    for start in range(0, UPDATES, 100):
        params, state = hundred(params, state, start)
        distances.append(float(jnp.mean(jnp.abs(params["norm"]["scale"].astype(jnp.float32) - target))))
    return distances


def test_plain_bfloat16_stalls_and_random_rounding_tracks_float32():
    exact = descend(jnp.float32, None)
    plain = descend(jnp.bfloat16, None)
    ours = descend(jnp.bfloat16, jax.random.key(0))
    assert exact[-1] < 0.001  # it has arrived, 0.2 away from where it began
    assert plain[-1] > 0.15  # most numbers never moved
    assert abs(ours[0] - exact[0]) < 0.005  # on the way
    assert ours[-1] < 0.01  # as near as bfloat16 can say it
    assert descend(jnp.bfloat16, jax.random.key(0)) == ours
    assert descend(jnp.bfloat16, jax.random.key(1)) != ours


def test_random_rounding_is_right_in_the_mean_and_takes_a_neighbour():
    x = jnp.array([1.001, -1.001, 3e-5, 0.0, 1e30, -7.77], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.vmap(lambda key: rounded_at_random(x, key))(keys).astype(jnp.float32))
    near = np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32))
    gap = np.abs(near) * 2**-7
    assert (np.abs(drawn - np.asarray(x)) <= gap).all()
    np.testing.assert_array_less(np.abs(drawn.mean(0) - np.asarray(x)), 0.05 * gap + 1e-12)
    assert {len(set(column)) for column in drawn[:, [0, 1, 2, 5]].T} == {2}
    assert set(drawn[:, 3]) == {0.0}
    assert np.isnan(rounded_at_random(jnp.float32(jnp.nan), keys[0]))
    assert np.isinf(rounded_at_random(jnp.float32(jnp.inf), keys[0]))


def test_random_rounding_is_the_same_on_every_mesh():
    x = jax.random.normal(jax.random.key(1), (64, 32))
    mesh = make_mesh(fsdp=4, tensor=2)
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("fsdp", "tensor")))
    rounded = jax.jit(rounded_at_random)
    np.testing.assert_array_equal(
        np.asarray(rounded(x, jax.random.key(2))), np.asarray(rounded(split, jax.random.key(2)))
    )
