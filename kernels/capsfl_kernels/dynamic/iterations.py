"""The loop over routing iterations and its custom gradient, around two passes that an implementation brings.

Every implementation that never forms a vote computes the same thing: one pass over the input capsules for every
iteration, the first under equal couplings, and for the gradient the same passes backwards from the stored sums
``s_t`` and directions ``V_t``. Only the passes differ between the machines.
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import common_variation
from capsfl_kernels.squash import squash
from capsfl_kernels.votes.tile import Routing


class Passes(Protocol):
    """One sum pass and one gradient pass over arranged inputs and weights; hashable, for it is static.

    Sums, directions and their gradients are (batch, M, K) in the accumulation dtype.
    """

    @property
    def precision(self) -> lax.PrecisionLike:
        """Precision of the plain matrix products around the passes."""
        ...

    def arrange(self, inputs: jax.Array, weights: jax.Array) -> Any:
        """Lays inputs (batch, N, D) and weights (N, M, K, D) out for the passes."""
        ...

    def sum_votes(self, arranged: Any, direction: jax.Array) -> jax.Array:
        """``s_j = Σ_i c_ij û_ij`` under the logits ``û_ij · V_j``."""
        ...

    def differentiate(
        self, arranged: Any, direction: jax.Array, grad_sum: jax.Array
    ) -> tuple[jax.Array | None, tuple[jax.Array, jax.Array]]:
        """Gradients of V and of the arranged inputs and weights; that of V is None for ``gradient="last"``."""
        ...

    def restore(self, grads: tuple[jax.Array, jax.Array], inputs: Any, weights: Any) -> tuple[jax.Array, jax.Array]:
        """Gradients of arranged inputs and weights in the shapes of `inputs` and `weights`."""
        ...


class AccumulatingPasses(Protocol):
    """As `Passes`, but they take the first iteration too, and add each gradient to those before it in place.

    Without a direction all couplings are 1: the plain sum of the votes, which the loop divides.
    """

    def arrange(self, inputs: jax.Array, weights: jax.Array) -> Any:
        """As in `Passes`."""
        ...

    def sum_votes(self, arranged: Any, direction: jax.Array | None, dtype: Any) -> jax.Array:
        """As in `Passes`, in the accumulation dtype."""
        ...

    def differentiate(
        self, arranged: Any, direction: jax.Array | None, grad_sum: jax.Array, grads: Any
    ) -> tuple[jax.Array | None, Any]:
        """As in `Passes`, with the gradients of inputs and weights added to `grads`, which is None at first."""
        ...

    def restore(self, grads: Any, inputs: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As in `Passes`."""
        ...


def route(inputs: jax.Array, weights: jax.Array, bias: jax.Array, routing: Routing, passes: Passes) -> jax.Array:
    """Routes inputs (batch, N, D) through weights (N, M, K, D) to (batch, M, K) in the dtype of the bias."""
    return route_accumulating(inputs, weights, bias, routing, _Separate(passes))


def route_accumulating(
    inputs: jax.Array, weights: jax.Array, bias: jax.Array, routing: Routing, passes: AccumulatingPasses
) -> jax.Array:
    """As `route`, with passes that accumulate."""
    inputs, weights, bias = common_variation(inputs, weights, bias)
    return _route(inputs, weights, bias, routing, passes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _route(
    inputs: jax.Array, weights: jax.Array, bias: jax.Array, routing: Routing, passes: AccumulatingPasses
) -> jax.Array:
    return _forward(inputs, weights, bias, routing, passes)[0]


def _forward(
    inputs: jax.Array, weights: jax.Array, bias: jax.Array, routing: Routing, passes: AccumulatingPasses
) -> tuple:
    offset = bias[None]
    arranged = passes.arrange(inputs, weights)
    sums = [passes.sum_votes(arranged, None, bias.dtype) * _uniform(weights, routing) + offset]
    output = squash(sums[0])
    directions: list[jax.Array] = []
    for _ in range(1, routing.num_iters):
        directions.append(directions[-1] + output if directions else output)
        sums.append(passes.sum_votes(arranged, directions[-1], bias.dtype) + offset)
        output = squash(sums[-1])
    return output, (inputs, weights, bias, sums, directions)


def _backward(routing: Routing, passes: AccumulatingPasses, residuals: tuple, grad: jax.Array) -> tuple:
    inputs, weights, bias, sums, directions = residuals
    # Arranging again costs one copy; keeping the arrangement would double what a training step holds.
    arranged = passes.arrange(inputs, weights)
    grad_output = grad
    grad_bias = jnp.zeros_like(bias)
    grads = None
    for iteration in reversed(range(routing.num_iters)):
        grad_sum = jax.vjp(squash, sums[iteration])[1](grad_output)[0]
        grad_bias = grad_bias + jnp.sum(grad_sum, axis=0)
        if iteration == 0:
            _, grads = passes.differentiate(arranged, None, grad_sum * _uniform(weights, routing), grads)
            break
        grad_direction, grads = passes.differentiate(arranged, directions[iteration - 1], grad_sum, grads)
        if grad_direction is None:
            break
        # V of an iteration sums every output before it, so its gradient reaches all of them.
        grad_output = grad_direction if iteration == routing.num_iters - 1 else grad_output + grad_direction
    grad_inputs, grad_weights = passes.restore(grads, inputs, weights)
    return grad_inputs.astype(inputs.dtype), grad_weights.astype(weights.dtype), grad_bias


_route.defvjp(_forward, _backward)


def _uniform(weights: jax.Array, routing: Routing) -> float:
    """Coupling of the first iteration: logits of zero share equally."""
    return 1 / (weights.shape[1] + routing.leaky)


class _Separate(NamedTuple):
    """Passes as they accumulate: the first iteration is plain matrix products, gradients are added afterwards.

    An accelerator's kernels write whole gradients; adding is then one more fused read.
    """

    passes: Passes

    def arrange(self, inputs: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        return inputs, weights, self.passes.arrange(inputs, weights)

    def sum_votes(self, arranged: tuple, direction: jax.Array | None, dtype: Any) -> jax.Array:
        inputs, weights, laid_out = arranged
        if direction is None:
            return self._product("bnd,nmkd->bmk", inputs, weights, dtype)
        return self.passes.sum_votes(laid_out, direction)

    def differentiate(
        self, arranged: tuple, direction: jax.Array | None, grad_sum: jax.Array, grads: tuple | None
    ) -> tuple[jax.Array | None, tuple]:
        inputs, weights, laid_out = arranged
        first, later = (None, None) if grads is None else grads
        if direction is None:
            spread = grad_sum.astype(weights.dtype)
            first = (
                self._product("nmkd,bmk->bnd", weights, spread, grad_sum.dtype),
                self._product("bnd,bmk->nmkd", inputs, spread, grad_sum.dtype),
            )
            return None, (first, later)
        grad_direction, passed = self.passes.differentiate(laid_out, direction, grad_sum)
        return grad_direction, (first, _add(later, passed))

    def restore(self, grads: tuple, inputs: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, later = grads
        if later is None:
            return first
        restored = self.passes.restore(later, inputs, weights)
        return _add(first, restored)

    def _product(self, axes: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
        return jnp.einsum(axes, a, b, precision=self.passes.precision, preferred_element_type=dtype)


def _add(grads: tuple[jax.Array, jax.Array] | None, more: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return more if grads is None else (grads[0] + more[0], grads[1] + more[1])
