"""Two rounds of one federation on one device, by pmap and by shard_map; prints how far the weights differ.

test_devices runs this in a process with four devices: a small capsule network and five hospitals of unlike size, so
that some slots stay empty.
"""

import json

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from capsfl.federated import DevicesConfig, Federation, LocalConfig, RoundsConfig, stack_hospitals
from capsfl.learning.classification import ClassificationConfig, make_classification_task
from capsfl.models.capsnet import CapsNetConfig
from capsfl.privacy.plan import PrivacyConfig


def weights_by(layout: str, chunk: int | None) -> tuple[np.ndarray, np.ndarray]:
    """All weights after two rounds, and the hospitals' updates of the second one by name, each as one vector."""
    network = CapsNetConfig(
        image_size=16, conv_channels=16, conv_kernel=5, primary_capsules=4, primary_kernel=5, reconstruction=False
    )
    generator = np.random.default_rng(0)
    records = {
        f"hospital-{number}": {
            "image": generator.normal(size=(number + 1, 16, 16, 1)).astype(np.float32) / 4,
            "label": generator.integers(0, 2, number + 1).astype(np.int32),
        }
        for number in range(5)
    }
    federation = Federation(
        make_classification_task(ClassificationConfig(model=network), seed=0),
        stack_hospitals(records),
        config=RoundsConfig(rounds=2, local=LocalConfig(optimizer="sgd", learning_rate=0.05, batch_size=2)),
        privacy=PrivacyConfig(clip_norm=0.5, noise_multiplier=0.1),
        devices=DevicesConfig.model_validate({"parallel": layout, "chunk": chunk}),
        seed=4,
        keep_updates=True,
    )
    state, updates = federation.init(), {}
    for _ in range(2):
        state, report = federation.step(state)
        assert len(report.cohort) == 5
        assert not report.not_finite
        assert report.updates is not None
        updates = report.updates.on_host()
    assert int(state.round) == 2
    handed_over = [ravel_pytree(updates[name])[0] for name in sorted(records)]
    return np.asarray(ravel_pytree(jax.device_get(state.parameters))[0]), np.concatenate(handed_over)


if __name__ == "__main__":
    single, updates = weights_by("single", None)
    others = {f"{layout} {chunk}": weights_by(layout, chunk) for layout, chunk in (("pmap", None), ("shard_map", 2))}
    print(
        json.dumps(
            {
                "devices": jax.device_count(),
                "weights": int(single.size),
                "moved": float(np.max(np.abs(single))),
                "difference": {name: float(np.max(np.abs(other - single))) for name, (other, _) in others.items()},
                "updates": {name: float(np.max(np.abs(other - updates))) for name, (_, other) in others.items()},
            }
        )
    )
