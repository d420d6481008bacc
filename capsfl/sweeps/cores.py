"""CPU cores as devices: JAX's CPU is one device by default, on which small studies keep one core busy."""

import contextlib
import os

import jax

from capsfl.workers import count_cores


def one_device_per_core() -> None:
    """Makes every core a CPU device; call it before anything runs. What XLA_FLAGS says wins."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    # Where devices are there already, they are as many as somebody else wanted.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count_cores())
