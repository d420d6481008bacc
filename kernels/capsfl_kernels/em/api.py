"""The public operators `em_routing` and `em_capsules`."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import (
    accumulation_dtype,
    check_capsules,
    check_routing,
    choose_implementation,
    working_set,
)
from capsfl_kernels.em import reference, streamed, tiled
from capsfl_kernels.em.reference import Routing

# Positions lie along the vectors of the streamed form; with fewer than these it took 3 to 8 times as long on a CPU.
_VECTOR = 8


def em_routing(
    votes: jax.Array,
    activations: jax.Array,
    beta_a: jax.Array,
    beta_u: jax.Array,
    *,
    num_iters: int = 3,
    final_lambda: float = 0.01,
    eps: float = 1e-6,
    implementation: str | Sequence[str] | None = None,
    block_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Routes given votes by expectation-maximisation (Hinton, Sabour & Frosst 2018, procedure 1).

    Every output capsule j is a Gaussian over the K components of a pose. From shares ``R_ij = 1/J`` an
    iteration t = 1, 2, ... does the M step with ``r_ij = R_ij a_i``::

        μ_j  = Σ_i r_ij V_ij / Σ_i r_ij
        σ_j² = Σ_i r_ij (V_ij − μ_j)² / Σ_i r_ij
        a_j  = logistic(λ_t (β_a,j − Σ_k (β_u,j + log σ_jk) Σ_i r_ij))

    and, but for the last, the E step ``R_ij = a_j p_j(V_ij) / Σ_j' a_j' p_j'(V_ij)``. The inverse temperature
    is ``λ_t = final_lambda (1 − 0.95^t)``, which the authors gave in the paper's public review.

    Args:
        votes: ``(..., I, J, K)``; the leading axes are positions (batch, height, width, ...).
        activations: ``(..., I)``, of the input capsules, in [0, 1].
        beta_a: ``(J,)``, what activating a capsule saves.
        beta_u: ``(J,)``, what describing one component of a vote costs.
        num_iters: Iterations, at least 1.
        final_lambda: The limit of the inverse temperature, above zero.
        eps: Strength of a vote for the standard normal that every output receives besides the others, and the
            least variance: ``μ = Σ r V / (Σ r + eps)``, ``σ² = (Σ r (V − μ)² + eps) / (Σ r + eps) + eps``. It
            keeps value and gradient finite where all votes are the same or nothing is active.
        implementation: ``"reference"`` keeps shares and squares of all votes; ``"streamed"`` those of a block;
            a sequence is an order of preference; None chooses.
        block_size: Positions that the streamed implementation routes at once; None chooses.

    Returns:
        Poses ``(..., J, K)`` in the dtype of the votes and activations ``(..., J)`` in that of the input
        activations; bfloat16 is computed in float32.

    Raises:
        ValueError: a shape, dtype or choice is impossible; the message names it.
    """
    if votes.ndim < 3 or activations.shape != votes.shape[:-2]:
        raise ValueError(
            f"em_routing: votes {votes.shape} and activations {activations.shape} do not fit; "
            "they must be (..., I, J, K) and (..., I)"
        )
    check_capsules("em_routing", votes=votes, activations=activations, beta_a=beta_a, beta_u=beta_u)
    inputs, outputs, dim = votes.shape[-3:]
    check_routing("em_routing", num_iters, "full", block_size)
    routing = Routing(num_iters, final_lambda, eps)
    _check("em_routing", beta_a, beta_u, outputs, f"votes {votes.shape}", routing)
    dtype = accumulation_dtype(jnp.promote_types(votes.dtype, activations.dtype))
    flat = votes.reshape(-1, inputs, outputs, dim)
    chosen = choose_implementation("em_routing", implementation, _obstacles(flat.shape[0]))
    active = activations.reshape(-1, inputs).astype(dtype)
    betas = beta_a.astype(dtype), beta_u.astype(dtype)
    if chosen == "reference":
        poses, log_activations = reference.route(flat.astype(dtype), active, *betas, routing)
    else:
        # On a CPU, the positions that fill a vector register and inputs that stay in the second cache.
        positions = min(block_size or working_set(cpu=_VECTOR, accelerator=1024), flat.shape[0])
        budget = working_set(cpu=3 << 18, accelerator=64 << 20)
        most = max(1, budget // (dtype.itemsize * positions * outputs * dim))
        # Blocks of one size, lest the last one repeat many inputs of the one before.
        size = -(-inputs // -(-inputs // most))
        poses, log_activations = tiled.route(flat, active, *betas, tiled.Tiling(routing, positions, size))
    return (
        poses.reshape(*votes.shape[:-3], outputs, dim).astype(votes.dtype),
        jnp.exp(log_activations).reshape(*votes.shape[:-3], outputs).astype(activations.dtype),
    )


def em_capsules(
    poses: jax.Array,
    activations: jax.Array,
    weights: jax.Array,
    beta_a: jax.Array,
    beta_u: jax.Array,
    *,
    num_iters: int = 3,
    final_lambda: float = 0.01,
    eps: float = 1e-6,
    implementation: str | Sequence[str] | None = None,
    block_size: int | None = None,
    precision: lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array]:
    """Routes every matrix capsule to every output capsule by EM, never storing the votes.

    The votes are ``V_ij = M_i W_ij``, products of matrices (Hinton, Sabour & Frosst 2018); then it
    is `em_routing` over K = P · R components. Capsules that are vectors have P = 1.

    Args:
        poses: ``(..., I, P, Q)``, any number of batch axes.
        activations: ``(..., I)``, in [0, 1].
        weights: ``(I, J, Q, R)``; the paper has P = Q = R = 4.
        beta_a: ``(J,)``, what activating a capsule saves.
        beta_u: ``(J,)``, what describing one component of a vote costs.
        num_iters: Iterations, at least 1.
        final_lambda: The limit of the inverse temperature, above zero.
        eps: Least variance and strength of the prior vote, as in `em_routing`.
        implementation: ``"reference"`` stores the votes; ``"streamed"`` those of a block, and keeps only the
            sums of each iteration for the backward pass; a sequence is an order of preference; None chooses.
        block_size: Input capsules that the streamed implementation handles at once; None chooses.
        precision: Of the products ``M_i W_ij``, as in `jax.lax.dot_general`.

    Returns:
        Poses ``(..., J, P, R)`` in the dtype of the poses and activations ``(..., J)`` in that of the input
        activations; bfloat16 is computed in float32.

    Raises:
        ValueError: a shape, dtype or choice is impossible; the message names it.
    """
    if poses.ndim < 3 or weights.ndim != 4 or (poses.shape[-3], poses.shape[-1]) != weights.shape[::2]:
        raise ValueError(
            f"em_capsules: poses {poses.shape} and weights {weights.shape} do not fit; "
            "they must be (..., I, P, Q) and (I, J, Q, R)"
        )
    if activations.shape != poses.shape[:-2]:
        raise ValueError(
            f"em_capsules: poses {poses.shape} and activations {activations.shape} do not fit; "
            "they must be (..., I, P, Q) and (..., I)"
        )
    arrays = {"poses": poses, "activations": activations, "weights": weights, "beta_a": beta_a, "beta_u": beta_u}
    check_capsules("em_capsules", **arrays)
    number, outputs, inner, columns = weights.shape
    check_routing("em_capsules", num_iters, "full", block_size)
    routing = Routing(num_iters, final_lambda, eps)
    _check("em_capsules", beta_a, beta_u, outputs, f"weights {weights.shape}", routing)
    narrow = jnp.promote_types(poses.dtype, weights.dtype)
    dtype = accumulation_dtype(jnp.promote_types(narrow, activations.dtype))
    rows = poses.shape[-2]
    flat = poses.reshape(-1, number, rows, inner).astype(narrow)
    chosen = choose_implementation("em_capsules", implementation, _obstacles(flat.shape[0]))
    matrix = weights.astype(narrow)
    active = activations.reshape(-1, number).astype(dtype)
    betas = beta_a.astype(dtype), beta_u.astype(dtype)
    if chosen == "reference":
        wide = flat.astype(dtype), matrix.astype(dtype)
        votes = jnp.einsum("bipq,ijqr->bijpr", *wide, precision=precision)
        votes = votes.reshape(*votes.shape[:3], rows * columns)
        routed, log_activations = reference.route(votes, active, *betas, routing)
    else:
        # The votes of one block, (block, J, K, batch), and a few arrays like them.
        budget = working_set(cpu=1 << 19, accelerator=64 << 20)
        votes_of_one = math.prod((dtype.itemsize, outputs, rows, columns, flat.shape[0]))
        size = min(block_size or max(1, budget // votes_of_one), number)
        streaming = streamed.Streaming(routing, size, precision)
        routed, log_activations = streamed.route(flat, active, matrix, *betas, streaming)
    leading = poses.shape[:-3]
    return (
        routed.reshape(*leading, outputs, rows, columns).astype(poses.dtype),
        jnp.exp(log_activations).reshape(*leading, outputs).astype(activations.dtype),
    )


def _check(operator: str, beta_a: jax.Array, beta_u: jax.Array, outputs: int, against: str, routing: Routing) -> None:
    """Refuses biases of another shape than (outputs,) and constants that are not above zero."""
    for name, beta in (("beta_a", beta_a), ("beta_u", beta_u)):
        if beta.shape != (outputs,):
            raise ValueError(f"{operator}: {name} has shape {beta.shape}, but {against} asks for ({outputs},)")
    for name, value in (("final_lambda", routing.final_lambda), ("eps", routing.eps)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{operator}: {name}={value!r} must be above zero and finite")


def _obstacles(positions: int) -> dict[str, None]:
    """Both implementations can always run; the streamed one is the faster where positions fill its vectors."""
    return dict.fromkeys(("reference", "streamed") if positions < _VECTOR else ("streamed", "reference"))
