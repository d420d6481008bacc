"""One secure round with drop-outs on one device, by pmap and by shard_map over four; prints whether bits agree.

test_secure runs this in a process of its own, which has four devices.
"""

import json
import os
from functools import partial
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}

import jax
import jax.numpy as jnp
import numpy as np

from capsfl.federated.devices import CohortProgram, DevicesConfig
from capsfl.federated.local import LocalResult
from capsfl.federated.round import CohortRecords, RoundState, Setting
from capsfl.federated.secure import SecureSum
from capsfl.federated.server import ServerConfig, make_server_optimizer
from capsfl.privacy.plan import PrivacyConfig, PrivacyPlan

HOSPITALS, WEIGHTS = 7, 129


def hand_in(parameters, records, count, *, key, learning_rate, drift=None):
    """A hospital whose update is its record."""
    return LocalResult({"w": records[0]}, jnp.float32(0), jnp.int32(1))


def released(layout: str) -> bytes:
    """The weights after a round."""
    plan = PrivacyPlan.build(PrivacyConfig(clip_norm=0.5, noise_multiplier=0.1), num_hospitals=HOSPITALS)
    server = partial(make_server_optimizer, ServerConfig())
    program = CohortProgram(
        hand_in,
        server,
        plan,
        config=DevicesConfig.model_validate({"parallel": layout, "chunk": 1}),
        secure=SecureSum(HOSPITALS, WEIGHTS, neighbours=2),
        dropout=0.4,
    )
    rows = np.random.default_rng(0).normal(size=(program.num_slots, 1, WEIGHTS)).astype(np.float32)
    numbers = np.arange(program.num_slots, dtype=np.int32)
    cohort: Any = (rows, (numbers < HOSPITALS).astype(np.int32), numbers)
    parameters = {"w": jnp.zeros(WEIGHTS)}
    state = program.replicate(RoundState(parameters, server(1.0).init(parameters), jnp.int32(0)))
    setting = Setting(*(jnp.float32(value) for value in (0.5, 0.1, 1.0, 1.0)))
    state, _ = program.dispatch(state, program.place(CohortRecords(*cohort)), setting, jax.random.key(2))
    return np.asarray(state.parameters["w"]).tobytes()


if __name__ == "__main__":
    alone = released("single")
    print(
        json.dumps(
            {
                "devices": jax.device_count(),
                "moved": float(np.abs(np.frombuffer(alone, np.float32)).max()),
                "identical": {layout: released(layout) == alone for layout in ("pmap", "shard_map")},
            }
        )
    )
