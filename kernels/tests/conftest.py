"""Settings of the kernel tests, and routing written out by hand in float64 NumPy from the papers."""

import contextlib
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

EPS = 1e-7


@contextlib.contextmanager
def _enable_double_precision() -> Iterator[None]:
    """Float64 inside JAX, compiled without most optimisations.

    In float64 the mathematics is in question, to the last digits, and not what XLA makes of it, which would take twice
    as long; programs as they are shipped are compiled by the tests in float32 and bfloat16.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def double_precision() -> Iterator[None]:
    """Float64 inside JAX for the length of a test."""
    with _enable_double_precision():
        yield


@pytest.fixture(scope="session")
def enable_double_precision() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Float64 inside JAX for the length of a block: hypothesis runs a test many times on one fixture."""
    return _enable_double_precision


def _squash(s: np.ndarray) -> np.ndarray:
    squared = float(np.dot(s, s))
    return squared / (1 + squared) * s / np.sqrt(squared + EPS)


def _route(votes: np.ndarray, bias: np.ndarray, num_iters: int, leaky: bool = False) -> np.ndarray:
    """Procedure 1 of Sabour et al. 2017, one vote after the other: votes (I, M, K) to (M, K)."""
    inputs, capsules, dim = votes.shape
    logits = np.zeros((inputs, capsules))
    output = np.zeros((capsules, dim))
    for _ in range(num_iters):
        raised = np.exp(logits)
        coupling = raised / (raised.sum(axis=1, keepdims=True) + (1.0 if leaky else 0.0))
        for j in range(capsules):
            total = bias[j].copy()
            for i in range(inputs):
                total += coupling[i, j] * votes[i, j]
            output[j] = _squash(total)
        for i in range(inputs):
            for j in range(capsules):
                logits[i, j] += votes[i, j] @ output[j]
    return output


@pytest.fixture(scope="session")
def route_by_hand() -> Callable[..., np.ndarray]:
    """`_route`: votes (I, M, K), bias (M, K), iterations, leaky -> (M, K), all float64 NumPy."""
    return _route
