"""SegCaps over several devices: the same loss and gradient by `jax.pmap` and `jax.shard_map` as by one device.

The batch is (images, slices): the slices of an image belong to the batch, and each device takes a share of
them all. On a CPU the devices are cut from one processor, which shows that the forms are right and says
nothing about their speed. `compare_forms` runs this module in a process of its own, for jax fixes the number
of devices as it starts.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

TOLERANCE = 1e-5
_IMAGES, _SLICES, _SIZE, _WIDTH = 2, 4, 16, 0.25


def compare_forms(devices: Sequence[int]) -> list[dict[str, Any]]:
    """Compares every form on every number of devices with one device.

    Returns:
        Per form and number of devices: ``form``, ``devices``, the relative differences of ``loss`` and
        ``gradient`` from one device without either form, and ``equal`` within 1e-5. Where the process failed,
        ``reason`` instead.
    """
    if not devices:
        return []
    forced = f"--xla_force_host_platform_device_count={max(devices)}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {forced}".strip()
    done = subprocess.run(
        [sys.executable, "-m", "capsfl.bench.parallel", *map(str, devices)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return [
            {"form": form, "devices": count, "reason": lines[-1][:300]}
            for count in devices
            for form in ("pmap", "shard_map")
        ]
    return json.loads(done.stdout)


def _compare(devices: Sequence[int]) -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import AxisType, PartitionSpec

    from capsfl.bench.segcaps import example, largest_difference
    from capsfl.learning.losses import segmentation_loss
    from capsfl.models.segcaps import SegCaps, SegCapsConfig

    graph, parameters = nnx.split(SegCaps(SegCapsConfig(width=_WIDTH), rngs=nnx.Rngs(0)))
    parameters = nnx.to_pure_dict(parameters)
    image, disc = example(_SIZE)
    batch = _IMAGES * _SLICES
    shifts = [(7 * index % _SIZE, 3 * index % _SIZE) for index in range(batch)]  # no two slices alike
    images = jnp.concatenate([jnp.roll(image, shift, axis=(1, 2)) for shift in shifts])
    truth = jnp.concatenate([jnp.roll(disc, shift, axis=(1, 2)) for shift in shifts])

    def loss(parameters: Any, images: jax.Array, truth: jax.Array) -> jax.Array:
        return segmentation_loss(nnx.merge(graph, parameters)(images, truth), images, truth)

    def step(parameters: Any, images: jax.Array, truth: jax.Array) -> Any:
        """Loss and gradient of a share, averaged over the devices; images are (images, slices, ...)."""
        # Else jax sums the gradient over the devices by itself inside shard_map, and the mean would sum again.
        own = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, ("devices",), to="varying"), parameters)
        flat = images.reshape(-1, *images.shape[2:]), truth.reshape(-1, *truth.shape[2:])
        return jax.lax.pmean(jax.value_and_grad(loss)(own, *flat), "devices")

    def mapped(parameters: Any, images: jax.Array, truth: jax.Array) -> Any:
        flat = images.reshape(-1, *images.shape[2:]), truth.reshape(-1, *truth.shape[2:])
        return jax.lax.pmean(jax.value_and_grad(loss)(parameters, *flat), "devices")

    expected, expected_gradient = jax.jit(jax.value_and_grad(loss))(parameters, images, truth)
    stacked = [array.reshape(_IMAGES, _SLICES, *array.shape[1:]) for array in (images, truth)]
    slices = PartitionSpec(None, "devices")
    rows = []
    for count in devices:
        chosen = jax.devices()[:count]
        mesh = jax.make_mesh((count,), ("devices",), axis_types=(AxisType.Auto,), devices=chosen)
        sharded = jax.shard_map(
            step, mesh=mesh, in_specs=(PartitionSpec(), slices, slices), out_specs=(PartitionSpec(), PartitionSpec())
        )
        # pmap has its devices on the first axis: (devices, images, slices / devices, ...).
        shares = [array.reshape(_IMAGES, count, _SLICES // count, *array.shape[2:]).swapaxes(0, 1) for array in stacked]
        several = jax.pmap(mapped, axis_name="devices", in_axes=(None, 0, 0), devices=chosen)(parameters, *shares)
        results = {
            "pmap": jax.tree.map(lambda leaf: leaf[0], several),
            "shard_map": jax.jit(sharded)(parameters, *stacked),
        }
        for form, (value, gradient) in results.items():
            apart = abs(float(value) - float(expected)) / abs(float(expected))
            difference = largest_difference(jax.device_get(gradient), jax.device_get(expected_gradient))
            equal = apart <= TOLERANCE and difference <= TOLERANCE
            rows.append({"form": form, "devices": count, "loss": apart, "gradient": difference, "equal": equal})
    return rows


if __name__ == "__main__":
    print(json.dumps(_compare([int(word) for word in sys.argv[1:]])))
