"""One round over hospitals that lie in two processes: `jax.distributed`, gloo, two devices each.

    python two_processes.py PORT INDEX

Prints the weights after the round by `shard_map` over all four devices, and after the same round on one device.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from capsfl.federated.local import LocalConfig, make_local_update
from capsfl.federated.round import CohortRecords, RoundState, Setting, make_round
from capsfl.federated.server import ServerConfig, make_server_optimizer
from capsfl.learning.tasks import make_task
from capsfl.privacy.plan import PrivacyConfig, PrivacyPlan

AXIS = "hospitals"
HOSPITALS = 8


def main(port: int, index: int) -> None:
    """Runs the round both ways."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    assert jax.device_count() == 4
    assert jax.local_device_count() == 2

    line = nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(0))
    task = make_task("line", line, lambda model, batch: jnp.mean((model(batch["x"]) - batch["y"]) ** 2))
    server = functools.partial(make_server_optimizer, ServerConfig())
    plan = PrivacyPlan.build(PrivacyConfig(clip_norm=0.5, noise_multiplier=0.3), num_hospitals=HOSPITALS)
    update = make_local_update(task, LocalConfig(optimizer="sgd", learning_rate=0.1, batch_size=2))

    generator = np.random.default_rng(0)
    x = generator.normal(size=(HOSPITALS, 4, 3)).astype(np.float32)
    records = {"x": x, "y": x @ np.array([[1], [-2], [3]], np.float32)}
    numbers = jnp.arange(HOSPITALS)
    cohort = CohortRecords(records, numbers % 4 + 1, numbers)
    weights = jax.device_get(task.parameters)
    state = RoundState(weights, server(1.0).init(weights), jnp.int32(0))
    setting = Setting(jnp.float32(0.5), jnp.float32(0.3), jnp.float32(0.1), jnp.float32(1.0))
    key = jax.random.key_data(jax.random.key(7))

    mesh = Mesh(np.asarray(jax.devices()), (AXIS,))
    body = make_round(update, server, plan, chunk=2, axis_name=AXIS)
    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    over_devices = jax.shard_map(
        lambda s, c, m, k: body(s, c, m, jax.random.wrap_key_data(k))[0].parameters,
        mesh=mesh,
        in_specs=(whole, split, whole, whole),
        out_specs=whole,
        check_vma=False,
    )

    def spread(tree: object, spec: PartitionSpec) -> object:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda a: jax.make_array_from_callback(np.shape(a), sharding, lambda i: np.asarray(a)[i]), tree
        )

    together = jax.jit(over_devices)(
        spread(state, whole), spread(cohort, split), spread(setting, whole), spread(key, whole)
    )
    alone, _ = jax.jit(make_round(update, server, plan, chunk=2))(state, cohort, setting, jax.random.wrap_key_data(key))
    (found,), (expected,) = jax.tree.leaves(together), jax.tree.leaves(alone.parameters)
    print(
        json.dumps(
            {
                "before": np.ravel(jax.tree.leaves(weights)[0]).tolist(),
                "together": np.ravel(found.addressable_data(0)).tolist(),
                "alone": np.ravel(expected).tolist(),
            }
        )
    )
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
