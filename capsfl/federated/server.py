"""The server's step: an optax optimizer that reads the noised mean update as a negative gradient."""

from typing import Literal

import jax
import optax
from pydantic import Field

from capsfl.settings import Settings


class ServerConfig(Settings):
    """The server optimizer (Reddi et al., Adaptive Federated Optimization, 2021)."""

    optimizer: Literal["sgd", "momentum", "adam", "yogi", "adagrad"] = "sgd"
    """`sgd` with learning rate 1 is federated averaging."""
    learning_rate: float = Field(default=1.0, gt=0)
    """Step size of the server."""


def make_server_optimizer(
    config: ServerConfig, learning_rate: float | jax.Array | None = None
) -> optax.GradientTransformation:
    """Builds the server optimizer; feed it minus the mean update.

    Args:
        config: which optimizer.
        learning_rate: replaces the configured one, where it is traced (a sweep). The state has the same structure.
    """
    rate = config.learning_rate if learning_rate is None else learning_rate
    if config.optimizer == "momentum":
        return optax.sgd(rate, momentum=0.9)
    if config.optimizer == "adam":
        return optax.adam(rate, b2=0.99, eps=1e-3)
    if config.optimizer == "yogi":
        return optax.yogi(rate, eps=1e-3)
    if config.optimizer == "adagrad":
        return optax.adagrad(rate)
    return optax.sgd(rate)
