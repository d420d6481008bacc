"""The public operator `dynamic_routing`."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels import block_sizes
from capsfl_kernels.arguments import (
    Gradient,
    accumulation_dtype,
    check_bias,
    check_capsules,
    check_routing,
    choose_implementation,
    working_set,
)
from capsfl_kernels.dynamic import mosaic_gpu, mosaic_tpu, reference, streamed
from capsfl_kernels.votes.tile import Routing


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
        implementation: ``"mosaic_gpu"`` and ``"mosaic_tpu"`` are kernels for Hopper GPUs and for TPUs,
            ``"streamed"`` runs everywhere, ``"reference"`` stores the votes. The first three never form
            votes and keep only the sums of each iteration for the backward pass. A sequence is an order of
            preference. None takes the first in the order above that can run on these shapes, dtype and
            devices, but stored before streamed votes where these are few.
        block_size: Input capsules that one step handles at once, all but ``"reference"``; None chooses.
        precision: Of the matrix products, as in `jax.lax.dot_general`.

    Returns:
        Output capsules ``(..., M, K)`` in the dtype of the inputs; bfloat16 accumulates in float32.

    Raises:
        ValueError: a shape, dtype or choice is impossible, or no implementation named can run; the message
            says which and why.
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
    matrix = weights.astype(narrow)
    offset = jnp.zeros((capsules, dim), dtype) if bias is None else bias.astype(dtype)
    if capsules == 1 and not leaky:
        num_iters = 1  # the softmax over one capsule is 1 whatever the logits say
    routing = Routing(num_iters, leaky, gradient)
    chosen = choose_implementation("dynamic_routing", implementation, _Obstacles(flat, matrix, dtype, precision))
    if chosen == "reference":
        routed = reference.route(flat, matrix, offset, **routing._asdict(), precision=precision)
    elif chosen == "streamed":
        size = block_size or _choose_block(flat, matrix, dtype)
        routed = streamed.route(flat, matrix, offset, streamed.Streaming(routing, min(size, number), precision))
    else:
        kernel = mosaic_gpu if chosen == "mosaic_gpu" else mosaic_tpu
        routed = kernel.route(flat, matrix, offset, routing, block_size=block_size, precision=precision)
    return routed.reshape(*inputs.shape[:-2], capsules, dim).astype(inputs.dtype)


class _Obstacles(Mapping[str, str | None]):
    """The implementations, best first, and what keeps each from running; looked into only when asked for."""

    def __init__(self, inputs: jax.Array, weights: jax.Array, dtype: jnp.dtype, precision: lax.PrecisionLike) -> None:
        batch, number, depth = inputs.shape
        _, capsules, dim, _ = weights.shape
        self._arguments = (batch, number, capsules, dim, depth, inputs.dtype, precision)
        # Votes that fit the caches are cheaper to keep than to stream (2 cores: the two cross at about 16 MiB).
        vote_bytes = dtype.itemsize * batch * number * capsules * dim
        small = vote_bytes <= working_set(cpu=16 << 20, accelerator=256 << 20)
        portable = ("reference", "streamed") if small else ("streamed", "reference")
        kernels = ("mosaic_gpu", "mosaic_tpu")
        # On a CPU neither kernel can run: last in the order, they cost no look at what is installed.
        self._order = portable + kernels if jax.default_backend() == "cpu" else kernels + portable

    def __getitem__(self, name: str) -> str | None:
        if name == "mosaic_gpu":
            return mosaic_gpu.obstacle(*self._arguments)
        if name == "mosaic_tpu":
            return mosaic_tpu.obstacle(*self._arguments)
        if name in self._order:
            return None
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self._order

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


def _choose_block(inputs: jax.Array, weights: jax.Array, dtype: jnp.dtype) -> int:
    """Input capsules in one block of the streamed implementation."""
    batch, number, depth = inputs.shape
    _, capsules, dim, _ = weights.shape
    # The projection Wᵀ V of one block, (M, block, D, batch), is the largest temporary of a pass. But matrix products
    # need rows (block · D): with 8 instead of 16 or 32 they took three times as long, worse than leaving the caches.
    budget = working_set(cpu=5 << 16, accelerator=64 << 20)
    size = max(-(-32 // depth), budget // (dtype.itemsize * capsules * depth * batch))
    count = -(-number // size)
    return block_sizes.choose(
        "dynamic_routing",
        "streamed",
        shape=(batch, number, depth, capsules, dim),
        dtype=inputs.dtype,
        default=-(-number // count),  # as many blocks, but equal ones: the last is then not mostly padding
    )
