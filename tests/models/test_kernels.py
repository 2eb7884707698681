"""The product that every plain kernel goes through has the gradients of a product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtune.models.kernels import matmul


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5)])
def test_gradients_are_those_of_a_product(shape):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (5, 4))
    dy = jax.random.normal(keys[2], (*shape[:-1], 4))
    ours, pull = jax.vjp(matmul, x, kernel)
    theirs, expected = jax.vjp(jnp.matmul, x, kernel)
    np.testing.assert_array_equal(ours, theirs)
    for a, b in zip(pull(dy), expected(dy)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
