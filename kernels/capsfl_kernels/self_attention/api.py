"""The public operator `self_attention_routing`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import (
    accumulation_dtype,
    check_bias,
    check_capsules,
    check_routing,
    choose_implementation,
    working_set,
)
from capsfl_kernels.self_attention import reference, streamed


def self_attention_routing(
    inputs: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None = None,
    *,
    implementation: str | Sequence[str] | None = None,
    block_size: int | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Routes every input capsule to every output capsule in one pass of self-attention (Mazzia et al. 2021).

    Efficient-CapsNet (arXiv:2101.12491). With votes ``û_nm = W_nm u_n``, a vote's agreement with
    all votes for the same output is ``a_nm = ⟨û_nm, Σ_n' û_n'm⟩ / sqrt(K)``, the coupling is ``c_n. =
    softmax(a_n.) + bias_n.`` over the output capsules, and ``v_m = squash(Σ_n c_nm û_nm)`` with the squash
    ``(1 − exp(−|s|)) s / |s|``.

    Details follow the authors' code: the softmax runs over the output capsules, K is the dimension of an
    OUTPUT capsule, and the bias (their log prior B, zero at first) is added after the softmax, so that
    couplings need not sum to one.

    Args:
        inputs: ``(..., N, D)``, any number of batch axes.
        weights: ``(N, M, K, D)``.
        bias: ``(N, M)``, added to the couplings; None stands for zero.
        implementation: ``"reference"`` stores the votes; ``"streamed"`` never forms them; a sequence is an
            order of preference; None chooses.
        block_size: Input capsules that the streamed implementation handles at once; None chooses.
        precision: Of the matrix products, as in `jax.lax.dot_general`.

    Returns:
        Output capsules ``(..., M, K)`` in the dtype of the inputs; bfloat16 accumulates in float32.

    Raises:
        ValueError: a shape, dtype or choice is impossible; the message names it.
    """
    if inputs.ndim < 2 or weights.ndim != 4 or (inputs.shape[-2], inputs.shape[-1]) != weights.shape[::3]:
        raise ValueError(
            f"self_attention_routing: inputs {inputs.shape} and weights {weights.shape} do not fit; "
            "they must be (..., N, D) and (N, M, K, D)"
        )
    check_capsules("self_attention_routing", inputs=inputs, weights=weights)
    check_routing("self_attention_routing", 1, "full", block_size)
    number, capsules, dim, depth = weights.shape
    check_bias("self_attention_routing", bias, number, capsules, f"weights {weights.shape}")
    narrow = jnp.promote_types(inputs.dtype, weights.dtype)
    dtype = accumulation_dtype(narrow)
    flat = inputs.reshape(-1, number, depth).astype(narrow)
    # The batch lies along the vectors of the streamed form; where it fills them, that form is the faster one
    # even if the votes fit the caches (2 cores: 2 to 3 times at 128 x 16 inputs, a sixth at 1 x 1152).
    order = ("reference", "streamed") if flat.shape[0] < 8 else ("streamed", "reference")
    chosen = choose_implementation("self_attention_routing", implementation, dict.fromkeys(order))
    matrix = weights.astype(narrow)
    prior = jnp.zeros((number, capsules), dtype) if bias is None else bias.astype(dtype)
    if chosen == "reference":
        routed = reference.route(flat, matrix, prior, precision=precision)
    else:
        # The projection Wᵀ V of one block, (M, block, D, batch), is the largest temporary of the pass.
        budget = working_set(cpu=1 << 18, accelerator=64 << 20)
        size = block_size or max(1, budget // (dtype.itemsize * capsules * depth * flat.shape[0]))
        routed = streamed.route(flat, matrix, prior, streamed.Streaming(min(size, number), precision))
    return routed.reshape(*inputs.shape[:-2], capsules, dim).astype(inputs.dtype)
