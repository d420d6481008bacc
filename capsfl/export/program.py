"""A trained network as a program of its own: serialized StableHLO that jax can run without capsfl (`jax.export`)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from capsfl.learning import networks
from capsfl.learning.tasks import Task

# Largest difference between a program and the network that it was made from, on probabilities.
_TOLERANCE = 1e-5


class ExportError(ValueError):
    """A model that cannot be taken away; the message names it and the remedy."""


def segmentation_function(task: Task, weights: Any) -> Callable[[jax.Array], jax.Array]:
    """Returns slices `(batch, height, width, channels)` in [-0.5, 0.5] -> probabilities `(batch, height, width)`."""
    model: Any = task.merge(weights)

    def probabilities(slices: jax.Array) -> jax.Array:
        # One after the other: memory is then that of one slice, whatever the batch.
        return jax.lax.map(lambda image: model(image[None]).lengths[0], slices)

    return probabilities


def classification_function(task: Task, weights: Any) -> Callable[[jax.Array], jax.Array]:
    """Returns images `(batch, side, side, 1)` in [0, 1] -> class probabilities `(batch, classes)`."""
    model: Any = task.merge(weights)

    def probabilities(images: jax.Array) -> jax.Array:
        # One after the other, too: how a capsule layer is computed is chosen by the size of its batch.
        return jax.lax.map(lambda image: networks.class_probabilities(networks.ask(model, image[None]))[0], images)

    return probabilities


def export_program(function: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> bytes:
    """Serializes a function of `(batch, *shape)` float32, for any batch, its weights inside.

    Made on a CPU it runs on CPU, GPU and TPU alike; made on an accelerator, whose kernels it then holds, on that.
    The program is read back and asked about a batch before it is handed out.

    Raises:
        ExportError: what was read back answers otherwise than the function.
    """
    (batch,) = export.symbolic_shape("batch")
    platforms = ("cpu", "cuda", "tpu") if jax.default_backend() == "cpu" else None
    jitted = jax.jit(function)
    made = export.export(jitted, platforms=platforms)(jax.ShapeDtypeStruct((batch, *shape), jnp.float32))
    program = bytes(made.serialize())
    images = jnp.asarray(np.random.default_rng(0).uniform(-0.5, 0.5, (3, *shape)), jnp.float32)
    difference = float(jnp.max(jnp.abs(run_program(program, images) - jitted(images))))
    if not difference <= _TOLERANCE:
        raise ExportError(f"the program of shape {shape} answers {difference:.2g} beside the network; not written")
    return program


def run_program(program: bytes, images: jax.Array) -> jax.Array:
    """Runs what `export_program` has made; three lines that whoever takes it away can copy."""
    exported = export.deserialize(bytearray(program))
    return exported.call(images)
