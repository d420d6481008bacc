"""The operators to measure: their cases, arguments, implementations and counted work."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from capsfl_kernels import conv_capsules, dynamic_routing, em_capsules, em_routing, self_attention_routing
from capsfl_kernels.convolutional import cases as convolutional
from capsfl_kernels.convolutional.geometry import plan
from capsfl_kernels.dynamic import cases as dynamic
from capsfl_kernels.em import cases as em
from capsfl_kernels.self_attention import cases as attention

from capsfl.bench.work import (
    Work,
    route_convolutional,
    route_em_capsules,
    route_em_votes,
    route_fully_connected,
)

STORED = "reference"


class Operator(NamedTuple):
    """One operator.

    Attributes:
        title: What it is, for the page.
        cases: Shapes by name; those of `quick` alone in a quick run.
        quick: Small shapes by name.
        implementations: Names to try; the first stores the votes.
        arguments: The arrays of a case, seeded.
        call: ``call(case, *arrays, implementation=..., block_size=...)``, an array or several.
        work: ``work(case, stored=..., gradient=...)``, both passes where gradient.
        votes: Numbers in the votes of a case.
        describe: A case in words.
    """

    title: str
    cases: Mapping[str, Any]
    quick: Mapping[str, Any]
    implementations: tuple[str, ...]
    arguments: Callable[[Any], tuple[jax.Array, ...]]
    call: Callable[..., Any]
    work: Callable[..., Work]
    votes: Callable[[Any], int]
    describe: Callable[[Any], str]

    def function(
        self, case: Any, implementation: str, *, gradient: bool, block_size: int | None = None
    ) -> Callable[..., Any]:
        """The operator of a case, or its sum of squares with the gradients of all arguments."""
        forward = functools.partial(self.call, case, implementation=implementation, block_size=block_size)
        if not gradient:
            # A function of its own each time: jax would answer from memory, and lowering would take no time.
            return lambda *arrays: forward(*arrays)
        count = len(jax.eval_shape(lambda: self.arguments(case)))

        def loss(*arrays: jax.Array) -> jax.Array:
            return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(forward(*arrays))), jnp.zeros(()))

        return jax.value_and_grad(loss, argnums=tuple(range(count)))


def _dense_arguments(case: dynamic.Case | attention.Case) -> tuple[jax.Array, ...]:
    key_inputs, key_weights = jax.random.split(jax.random.key(0))
    inputs = jax.random.normal(key_inputs, (case.batch, case.inputs, case.depth))
    # Inputs of length one and weights of this size give lengths as in training, neither zero nor one.
    inputs = inputs / jnp.linalg.norm(inputs, axis=-1, keepdims=True)
    return inputs, 0.1 * jax.random.normal(key_weights, (case.inputs, case.capsules, case.dim, case.depth))


def _dense_call(case: dynamic.Case, inputs: jax.Array, weights: jax.Array, **options: Any) -> jax.Array:
    return dynamic_routing(inputs, weights, num_iters=case.num_iters, **options)


def _dense_work(case: dynamic.Case, *, stored: bool, gradient: bool) -> Work:
    return route_fully_connected(*case, 4, stored=stored, gradient=gradient)


def _attention_call(case: attention.Case, inputs: jax.Array, weights: jax.Array, **options: Any) -> jax.Array:
    return self_attention_routing(inputs, weights, **options)


def _attention_work(case: attention.Case, *, stored: bool, gradient: bool) -> Work:
    # One sum and one coupled sum: two iterations of routing by agreement.
    return route_fully_connected(*case, 2, 4, stored=stored, gradient=gradient)


def _dense_votes(case: dynamic.Case | attention.Case) -> int:
    return case.batch * case.inputs * case.capsules * case.dim


def _describe_dense(case: dynamic.Case | attention.Case) -> str:
    return f"{case.batch} x {case.inputs} x {case.depth} -> {case.capsules} x {case.dim}"


def _image_arguments(case: convolutional.Case) -> tuple[jax.Array, ...]:
    key_inputs, key_kernel = jax.random.split(jax.random.key(1))
    fan_in = case.window**2 * case.depth
    shape = (case.window, case.window, case.depth, case.capsules, case.dim)
    return (
        jax.random.normal(key_inputs, (1, case.types, *case.size, case.depth)),
        jax.random.normal(key_kernel, shape) * (2 / fan_in) ** 0.5,
        jnp.full((case.capsules, case.dim), 0.1),
    )


def _image_call(case: convolutional.Case, *arrays: jax.Array, **options: Any) -> jax.Array:
    return conv_capsules(
        *arrays,
        strides=case.strides,
        transpose=case.transpose,
        padding=case.padding,
        num_iters=case.num_iters,
        **options,
    )


def _image_positions(case: convolutional.Case) -> int:
    height, width = plan(case.size, case.window, case.strides, case.transpose, case.padding).output
    return height * width


def _image_work(case: convolutional.Case, *, stored: bool, gradient: bool) -> Work:
    return route_convolutional(
        positions=_image_positions(case),
        pixels=case.size[0] * case.size[1],
        types=case.types,
        depth=case.depth,
        taps=case.window**2 / (case.strides**2 if case.transpose else 1),
        capsules=case.capsules,
        dim=case.dim,
        num_iters=case.num_iters,
        itemsize=4,
        kernel=case.window**2 * case.depth * case.capsules * case.dim,
        stored=stored,
        gradient=gradient,
    )


def _describe_image(case: convolutional.Case) -> str:
    height, width = case.size
    kind = "transposed" if case.transpose else "strided" if case.strides > 1 else "plain"
    stride = f" s{case.strides}" if case.strides > 1 else ""
    return f"{height}x{width}, {case.types}x{case.depth} -> {case.capsules}x{case.dim}, {kind} k{case.window}{stride}"


def _em_votes_arguments(case: em.Votes) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(2), 2)
    votes = jax.random.normal(keys[0], (*case.positions, case.inputs, case.outputs, case.dim))
    return votes, jax.random.uniform(keys[1], votes.shape[:-2]), *_betas(case)


def _em_votes_call(case: em.Votes, *arrays: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    return em_routing(*arrays, num_iters=case.num_iters, **options)


def _em_votes(case: em.Votes) -> int:
    return math.prod(case.positions) * case.inputs * case.outputs * case.dim


def _em_votes_work(case: em.Votes, *, stored: bool, gradient: bool) -> Work:
    votes = _em_votes(case)
    count = functools.partial(route_em_votes, votes, votes // case.dim, case.num_iters, 4, stored=stored)
    forward = count(backward=False)
    return forward.plus(count(backward=True)) if gradient else forward


def _em_capsules_arguments(case: em.Capsules) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(3), 3)
    poses = jax.random.normal(keys[0], (case.batch, case.inputs, case.rows, case.inner))
    weights = jax.random.normal(keys[1], (case.inputs, case.outputs, case.inner, case.columns))
    return poses, jax.random.uniform(keys[2], poses.shape[:2]), weights, *_betas(case)


def _em_capsules_call(case: em.Capsules, *arrays: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    return em_capsules(*arrays, num_iters=case.num_iters, **options)


def _em_capsules_work(case: em.Capsules, *, stored: bool, gradient: bool) -> Work:
    return route_em_capsules(*case, 4, stored=stored, gradient=gradient)


def _betas(case: em.Votes | em.Capsules) -> tuple[jax.Array, jax.Array]:
    return jnp.ones(case.outputs), jnp.ones(case.outputs)


_LAYERS = ("conv_cap_2_2", "conv_cap_3_1", "deconv_cap_2_1", "deconv_cap_2_2")

OPERATORS: dict[str, Operator] = {
    "dynamic_routing": Operator(
        title="Fully connected capsules, `dynamic_routing`: batch x N x D -> M x K",
        cases={
            "digits": dynamic.DIGITS,
            "moderate": dynamic.MODERATE,
            "many inputs": dynamic.MANY_INPUTS,
            "many outputs": dynamic.MANY_OUTPUTS,
        },
        quick={"small": dynamic.Case(batch=8, inputs=96, depth=8, capsules=10, dim=16)},
        implementations=(STORED, "streamed", "mosaic_gpu", "mosaic_tpu"),
        arguments=_dense_arguments,
        call=_dense_call,
        work=_dense_work,
        votes=_dense_votes,
        describe=_describe_dense,
    ),
    "conv_capsules": Operator(
        title="Convolutional capsules, `conv_capsules`: layers of SegCaps R3 at a 512 x 512 slice",
        cases={name: convolutional.SEGCAPS[name] for name in _LAYERS},
        quick={"small": convolutional.Case((16, 16), types=4, depth=8, window=3, capsules=4, dim=8)},
        implementations=(STORED, "streamed"),
        arguments=_image_arguments,
        call=_image_call,
        work=_image_work,
        votes=lambda case: _image_positions(case) * case.types * case.capsules * case.dim,
        describe=_describe_image,
    ),
    "self_attention_routing": Operator(
        title="Self-attention over capsules, `self_attention_routing`: batch x N x D -> M x K",
        cases={"efficient": attention.EFFICIENT, "digits": attention.DIGITS},
        quick={"small": attention.MODERATE._replace(batch=8, inputs=96)},
        implementations=(STORED, "streamed"),
        arguments=_dense_arguments,
        call=_attention_call,
        work=_attention_work,
        votes=_dense_votes,
        describe=_describe_dense,
    ),
    "em_routing": Operator(
        title="EM routing of given votes, `em_routing`: positions x I -> J x K",
        cases={"windows": em.WINDOWS},
        quick={"small": em.WINDOWS._replace(positions=(1, 2, 4), inputs=24)},
        implementations=(STORED, "streamed"),
        arguments=_em_votes_arguments,
        call=_em_votes_call,
        work=_em_votes_work,
        votes=_em_votes,
        describe=lambda case: f"{math.prod(case.positions)} x {case.inputs} -> {case.outputs} x {case.dim}",
    ),
    "em_capsules": Operator(
        title="EM routing of matrix capsules, `em_capsules`: batch x I x P x Q -> J x P x R",
        cases={"classes": em.CLASSES},
        quick={"small": em.MODERATE._replace(batch=4, inputs=64)},
        implementations=(STORED, "streamed"),
        arguments=_em_capsules_arguments,
        call=_em_capsules_call,
        work=_em_capsules_work,
        votes=lambda case: case.batch * case.inputs * case.outputs * case.rows * case.columns,
        describe=lambda case: (
            f"{case.batch} x {case.inputs} x {case.rows} x {case.inner} -> "
            f"{case.outputs} x {case.rows} x {case.columns}"
        ),
    ),
}
