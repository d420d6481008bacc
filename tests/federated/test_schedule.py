"""The local learning rate falls from round to round, by the number of the round alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federation import Federation, RoundsConfig
from capsfl.federated.hospitals import stack_hospitals
from capsfl.federated.local import LocalConfig
from capsfl.learning.tasks import make_task
from capsfl.privacy.plan import PrivacyConfig

ROUNDS = 4


@pytest.fixture(scope="module")
def federation():
    """Two hospitals under a loss linear in the weights: at learning rate 1 a round adds the mean record, one."""

    class Line(nnx.Module):
        def __init__(self) -> None:
            self.weights = nnx.Param(jnp.zeros(3))

    task = make_task("line", Line(), lambda model, batch: -jnp.mean(batch @ model.weights[...]))
    local = LocalConfig(optimizer="sgd", learning_rate=1.0, batch_size=4, schedule="cosine")
    return Federation(
        task,
        stack_hospitals({name: np.ones((4, 3), np.float32) for name in ("a", "b")}),
        config=RoundsConfig(rounds=ROUNDS, local=local, scaffold=True),
        privacy=PrivacyConfig(clip_norm=1e6),
        devices=DevicesConfig(chunk=1),
    )


def weights_of(state):
    return np.asarray(jax.tree.leaves(state.parameters)[0])


def test_steps_follow_half_a_cosine_and_a_resumed_run_goes_on_where_it_was(federation):
    states = [federation.init()]
    for _ in range(ROUNDS):
        states.append(federation.step(states[-1])[0])
    steps = np.diff([weights_of(state)[0] for state in states])
    np.testing.assert_allclose(steps, [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5], rtol=1e-5)
    again, _ = federation.step(states[2])
    np.testing.assert_array_equal(weights_of(again), weights_of(states[3]))


def test_control_variates_are_gradients_whatever_the_learning_rate(federation):
    """SCAFFOLD divides an update by the rate that made it: every gradient is minus one, in each round."""
    state = federation.init()
    for _ in range(ROUNDS):
        state, _ = federation.step(state)
        np.testing.assert_allclose(jax.tree.leaves(state.controls.server)[0], -np.ones(3), rtol=1e-5)
