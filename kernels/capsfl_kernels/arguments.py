"""What every operator checks and decides about its arguments before it computes."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

Gradient = Literal["full", "last"]


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype sums run in: float64 for float64, float32 for every shorter floating-point dtype."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"capsules must be floating point, got {jnp.dtype(dtype).name}; convert with astype")
    return jnp.dtype(jnp.float64) if jnp.dtype(dtype) == jnp.float64 else jnp.dtype(jnp.float32)


def choose_implementation(
    operator: str, implementation: str | Sequence[str] | None, obstacles: Mapping[str, str | None]
) -> str:
    """Returns the implementation to run.

    Args:
        operator: Its name, for messages.
        implementation: A name; a sequence of names, of which the first that can run is taken; or None for
            the first of all that can.
        obstacles: Every implementation of the operator, best first, with what keeps it from running on these
            shapes, this dtype and this device, or None where nothing does.

    Raises:
        ValueError: a name is unknown, or none of those named can run; the message says why.
    """
    known = ", ".join(obstacles)
    if implementation is None:
        names = tuple(obstacles)
    else:
        names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names:
        raise ValueError(f"{operator}: implementation=() names none; choose from {known}")
    for name in names:
        if name not in obstacles:
            raise ValueError(f"{operator}: implementation={name!r} is unknown; choose from {known}")
    for name in names:
        if obstacles[name] is None:
            return name
    reasons = "; ".join(f"{name!r} {obstacles[name]}" for name in names)
    raise ValueError(f"{operator}: no implementation asked for can run: {reasons}")


def working_set(*, cpu: int, accelerator: int) -> int:
    """Bytes that one block of work should take on the machine at hand.

    On a CPU a block should stay in the caches; an accelerator wants enough of it to fill all its cores.
    """
    return cpu if jax.default_backend() == "cpu" else accelerator


def check_routing(operator: str, num_iters: int, gradient: str, block_size: int | None) -> None:
    """Refuses a number of iterations, a gradient mode or a block size that has no meaning."""
    if isinstance(num_iters, bool) or not isinstance(num_iters, int) or num_iters < 1:
        raise ValueError(f"{operator}: num_iters={num_iters!r} must be an integer of at least 1")
    if gradient not in ("full", "last"):
        raise ValueError(f"{operator}: gradient={gradient!r} is unknown; choose 'full' or 'last'")
    if block_size is not None and (isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1):
        raise ValueError(f"{operator}: block_size={block_size!r} must be None or an integer of at least 1")


def check_capsules(operator: str, **arrays: jax.Array) -> None:
    """Refuses arrays with an empty axis or of a dtype that cannot be routed."""
    for name, array in arrays.items():
        accumulation_dtype(array.dtype)
        if 0 in array.shape:
            raise ValueError(f"{operator}: {name} has shape {array.shape}; every axis needs at least one entry")


def check_bias(operator: str, bias: jax.Array | None, capsules: int, dim: int, against: str) -> None:
    """Refuses a bias whose shape is not (capsules, dim)."""
    if bias is not None and bias.shape != (capsules, dim):
        raise ValueError(f"{operator}: bias has shape {bias.shape}, but {against} asks for ({capsules}, {dim})")


def common_variation(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Marks all arrays as varying over the same mesh axes, so that `jax.shard_map` can check a custom
    gradient.

    Inside a shard_map, replicated weights meet sharded capsules. JAX's own operators then sum the gradient of
    the weights over the devices; a custom gradient must ask for the same, and the cast's transpose is that
    sum.
    """
    varying = [_varying_axes(array) for array in arrays]
    everywhere = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(array, tuple(sorted(everywhere - axes)), to="varying") if everywhere - axes else array
        for array, axes in zip(arrays, varying, strict=True)
    )


def _varying_axes(array: jax.Array) -> frozenset:
    kind = jax.typeof(array)
    manual = getattr(kind, "manual_axis_type", None)  # jax 0.10 and later; `vma` before
    return manual.varying if manual is not None else getattr(kind, "vma", frozenset())
