"""The public operator `route_votes`."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from capsfl_kernels.arguments import (
    Gradient,
    accumulation_dtype,
    check_bias,
    check_capsules,
    check_routing,
    choose_implementation,
    working_set,
)
from capsfl_kernels.votes import reference, streamed
from capsfl_kernels.votes.tile import Routing


def route_votes(
    votes: jax.Array,
    bias: jax.Array | None = None,
    *,
    num_iters: int = 3,
    leaky: bool = False,
    gradient: Gradient = "full",
    implementation: str | Sequence[str] | None = None,
    block_size: int | None = None,
) -> jax.Array:
    """Routes given votes by agreement, every position for itself (Sabour et al. 2017, procedure 1).

    With votes û, logits b = 0 at first and coupling c = softmax over the output capsules of b, every
    iteration computes ``s_j = Σ_i c_ij û_ij + bias_j``, ``v_j = squash(s_j)`` and ``b_ij += û_ij · v_j``.

    Args:
        votes: ``(..., inputs, capsules, dim)``; the leading axes are positions (batch, height, width, ...).
        bias: ``(capsules, dim)``, added before the squash in every iteration; None stands for zero.
        num_iters: Iterations of routing, at least 1.
        leaky: Adds one capsule with a logit of zero to the softmax, for votes that belong nowhere.
        gradient: ``"full"`` differentiates every iteration, ``"last"`` takes the couplings as constants.
        implementation: ``"reference"``, ``"streamed"``, a sequence of them by preference, or None to choose.
        block_size: Positions that the streamed implementation routes at once; None chooses.

    Returns:
        Output capsules ``(..., capsules, dim)`` in the dtype of the votes.

    Raises:
        ValueError: a shape, dtype or choice is impossible; the message names it.
    """
    if votes.ndim < 3:
        raise ValueError(f"route_votes: votes has shape {votes.shape}, needs (..., inputs, capsules, dim)")
    check_capsules("route_votes", votes=votes)
    check_routing("route_votes", num_iters, gradient, block_size)
    inputs, capsules, dim = votes.shape[-3:]
    check_bias("route_votes", bias, capsules, dim, f"votes {votes.shape}")
    chosen = choose_implementation("route_votes", implementation, {"streamed": None, "reference": None})
    dtype = accumulation_dtype(votes.dtype)
    flat = votes.reshape(-1, inputs, capsules, dim).astype(dtype)
    offset = jnp.zeros((capsules, dim), dtype) if bias is None else bias.astype(dtype)
    if chosen == "reference":
        routed = reference.route(flat, offset, num_iters=num_iters, leaky=leaky, gradient=gradient)
    else:
        budget = working_set(cpu=2 << 20, accelerator=256 << 20)
        size = block_size or max(1, budget // (dtype.itemsize * math.prod(votes.shape[-3:])))
        size = min(size, flat.shape[0])
        routed = streamed.route(flat, offset, Routing(num_iters, leaky, gradient), size)
    return routed.reshape(*votes.shape[:-3], capsules, dim).astype(votes.dtype)
