"""The public operator `dynamic_routing`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import (
    Gradient,
    accumulation_dtype,
    check_bias,
    check_capsules,
    check_routing,
    choose_implementation,
    working_set,
)
from capsfl_kernels.dynamic import reference, streamed
from capsfl_kernels.votes.streamed import Routing


def dynamic_routing(
    inputs: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None = None,
    *,
    num_iters: int = 3,
    leaky: bool = False,
    gradient: Gradient = "full",
    implementation: str | Sequence[str] | None = None,
    block_size: int | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Routes every input capsule to every output capsule by agreement (Sabour et al. 2017, procedure 1).

    With votes ``û_ij = W_ij u_i``, logits b = 0 at first and coupling c = softmax over the output capsules of
    b, every iteration computes ``s_j = Σ_i c_ij û_ij + bias_j``, ``v_j = squash(s_j)`` and ``b_ij += û_ij ·
    v_j``.

    Args:
        inputs: ``(..., N, D)``, any number of batch axes.
        weights: ``(N, M, K, D)``.
        bias: ``(M, K)``, added before the squash in every iteration; None stands for zero.
        num_iters: Iterations of routing, at least 1.
        leaky: Adds one capsule with a logit of zero to the softmax, for inputs that belong nowhere.
        gradient: ``"full"`` differentiates every iteration, ``"last"`` takes the couplings as constants.
        implementation: ``"reference"`` stores the votes; ``"streamed"`` never forms them and keeps only the
            sums of each iteration for the backward pass; a sequence is an order of preference; None chooses.
        block_size: Input capsules that the streamed implementation handles at once; None chooses.
        precision: Of the matrix products, as in `jax.lax.dot_general`.

    Returns:
        Output capsules ``(..., M, K)`` in the dtype of the inputs; bfloat16 accumulates in float32.

    Raises:
        ValueError: a shape, dtype or choice is impossible; the message names it.
    """
    if inputs.ndim < 2 or weights.ndim != 4 or (inputs.shape[-2], inputs.shape[-1]) != weights.shape[::3]:
        raise ValueError(
            f"dynamic_routing: inputs {inputs.shape} and weights {weights.shape} do not fit; "
            "they must be (..., N, D) and (N, M, K, D)"
        )
    check_capsules("dynamic_routing", inputs=inputs, weights=weights)
    check_routing("dynamic_routing", num_iters, gradient, block_size)
    number, capsules, dim, depth = weights.shape
    check_bias("dynamic_routing", bias, capsules, dim, f"weights {weights.shape}")
    narrow = jnp.promote_types(inputs.dtype, weights.dtype)
    dtype = accumulation_dtype(narrow)
    flat = inputs.reshape(-1, number, depth).astype(narrow)
    # Votes that fit the caches are cheaper to keep than to stream (2 cores: the two cross at about 16 MiB).
    vote_bytes = dtype.itemsize * flat.shape[0] * number * capsules * dim
    small = vote_bytes <= working_set(cpu=16 << 20, accelerator=256 << 20)
    order = ("reference", "streamed") if small else ("streamed", "reference")
    chosen = choose_implementation("dynamic_routing", implementation, dict.fromkeys(order))
    matrix = weights.astype(narrow)
    offset = jnp.zeros((capsules, dim), dtype) if bias is None else bias.astype(dtype)
    if capsules == 1 and not leaky:
        num_iters = 1  # the softmax over one capsule is 1 whatever the logits say
    if chosen == "reference":
        routed = reference.route(
            flat,
            matrix,
            offset,
            num_iters=num_iters,
            leaky=leaky,
            gradient=gradient,
            precision=precision,
        )
    else:
        # The projection Wᵀ V of one block, (M, block, D, batch), is the largest temporary of a pass.
        budget = working_set(cpu=1 << 18, accelerator=64 << 20)
        size = block_size or max(1, budget // (dtype.itemsize * capsules * depth * flat.shape[0]))
        routing = Routing(num_iters, leaky, gradient)
        routed = streamed.route(flat, matrix, offset, streamed.Streaming(routing, min(size, number), precision))
    return routed.reshape(*inputs.shape[:-2], capsules, dim).astype(inputs.dtype)
