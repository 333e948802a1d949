"""The product of rows and a matrix: one row of 16-bit floats goes another way on a CPU, and comes to the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rows_matmul


@pytest.mark.parametrize("out", [None, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (1, 1, 40), (3, 40), (2, 3, 40)])
def test_every_shape_is_the_float64_product(shape, dtype, out):
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    matrix = jax.random.normal(jax.random.key(1), (24, 40), dtype)
    wanted = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64).T
    tolerance = {2: 0.05, 4: 1e-4}[jnp.dtype(out or dtype).itemsize]
    for transpose, right in ((True, matrix), (False, matrix.T)):
        found = jax.jit(lambda x, m, transpose=transpose: rows_matmul(x, m, transpose=transpose, dtype=out))(x, right)
        assert found.dtype == (out or dtype)
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=tolerance)


def test_its_gradient_and_its_batch():
    x, matrix = jax.random.normal(jax.random.key(0), (1, 8), jnp.bfloat16), jnp.ones((4, 8), jnp.bfloat16)
    gradient = jax.grad(lambda x: rows_matmul(x, matrix, dtype=jnp.float32).sum())(x)
    np.testing.assert_array_equal(gradient, jnp.full((1, 8), 4.0))
    many = jnp.stack([x, 2 * x, -x])
    found = jax.vmap(lambda x: rows_matmul(x, matrix))(many)
    np.testing.assert_array_equal(found[1], 2 * found[0])
    np.testing.assert_array_equal(found[2], -found[0])


@pytest.mark.parametrize("rows, padded", [(1, True), (2, False)])
def test_only_a_single_row_is_given_company(rows, padded):
    """And on a CPU alone: a TPU's text has the one row."""
    x, matrix = jnp.ones((rows, 8), jnp.bfloat16), jnp.ones((4, 8), jnp.bfloat16)
    traced = jax.jit(rows_matmul).trace(x, matrix)
    for platform, found in (("cpu", padded), ("tpu", False)):
        assert ("tensor<2x8xbf16>" in traced.lower(lowering_platforms=(platform,)).as_text()) == (found or rows == 2)
