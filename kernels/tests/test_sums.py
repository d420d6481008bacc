"""Sums in loops: whatever the number of terms, every term counts once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsfl_kernels.sums import sum_leading, sum_mapped


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 17, 21])
def test_every_term_counts_once(count, backend, monkeypatch):
    generator = np.random.default_rng(count)
    matrix, vector = generator.standard_normal((3, count, 2)), generator.standard_normal(count)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def run(matrix, vector):
        along = sum_mapped(lambda row, number: row * number + 1, (1, 0), matrix, vector)
        return along, sum_leading(jnp.square, vector)

    along, squares = jax.jit(run)(jnp.asarray(matrix, jnp.float32), jnp.asarray(vector, jnp.float32))
    np.testing.assert_allclose(along, (matrix * vector[None, :, None]).sum(1) + count, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(squares, np.square(vector).sum(), rtol=1e-5)
