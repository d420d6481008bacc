"""One small regression problem, shared by the federated tests; hospitals of unequal size."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsfl.learning.tasks import Task, make_task


class Net(nnx.Module):
    """Two dense layers; any NNX model would do."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.second = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(features)))[:, 0]


def squared_error(model: Net, batch: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


@pytest.fixture(scope="session")
def records() -> dict[str, dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    weights = generator.normal(size=4)

    def draw(count: int) -> dict[str, np.ndarray]:
        x = generator.normal(size=(count, 4)).astype(np.float32)
        return {"x": x, "y": np.tanh(x @ weights).astype(np.float32)}

    return {name: draw(count) for name, count in zip("ABCDE", (17, 40, 9, 24, 31), strict=True)}


@pytest.fixture(scope="session")
def net() -> Net:
    return Net(nnx.Rngs(0))


@pytest.fixture(scope="session")
def task(net: Net) -> Task:
    def scores(model: Net, batch: Mapping[str, jax.Array], weight: jax.Array) -> dict:
        return {"error": (jnp.sum(weight * (model(batch["x"]) - batch["y"]) ** 2), jnp.sum(weight))}

    return make_task("regression", net, squared_error, scores)
