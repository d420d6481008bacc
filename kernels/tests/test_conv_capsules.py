"""Convolutional capsules: every implementation equals a convolution and a routing written as loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsfl_kernels import conv_capsules
from capsfl_kernels.convolutional import cases
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

IMPLEMENTATIONS = ("reference", "streamed")
STATIC = ("strides", "transpose", "padding", "num_iters", "implementation", "block_size")
_compiled = jax.jit(conv_capsules, static_argnames=STATIC)
"""One program a call: operation by operation, every one of them is compiled alone."""


def _arguments(case: cases.Case, dtype=jnp.float32, leading=(2,)):
    # NumPy draws, for JAX would compile a generator for every shape.
    generator = np.random.default_rng(13)
    shapes = (
        (*leading, case.types, *case.size, case.depth),
        (case.window, case.window, case.depth, case.capsules, case.dim),
        (case.capsules, case.dim),
    )
    return tuple(jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes)


def _options(case: cases.Case):
    return {
        "strides": case.strides,
        "transpose": case.transpose,
        "padding": case.padding,
        "num_iters": case.num_iters,
    }


def _gradients(implementation, case, arguments, **options):
    def loss(inputs, kernel, bias):
        out = conv_capsules(inputs, kernel, bias, implementation=implementation, **_options(case), **options)
        return jnp.sum(jnp.sin(3 * out))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arguments)


def _votes_by_hand(image: np.ndarray, kernel: np.ndarray, case: cases.Case) -> np.ndarray:
    """Votes (H', W', M, K) of one image (H, W, A): gathers windows, or scatters them where transposed."""
    size, window, stride = image.shape[:2], case.window, case.strides
    if case.transpose:
        out = [n * stride if case.padding == "SAME" else (n - 1) * stride + window for n in size]
        before = max(window - stride, 0) // 2 if case.padding == "SAME" else 0
        offsets = (before, before)
    elif case.padding == "SAME":
        out = [-(-n // stride) for n in size]
        offsets = tuple(max((o - 1) * stride + window - n, 0) // 2 for o, n in zip(out, size, strict=True))
    else:
        out = [(n - window) // stride + 1 for n in size]
        offsets = (0, 0)
    votes = np.zeros((*out, case.capsules, case.dim))
    small = size if case.transpose else out
    for y, x in np.ndindex(*small):
        for p, q in np.ndindex(window, window):
            row, column = y * stride + p - offsets[0], x * stride + q - offsets[1]
            if case.transpose and 0 <= row < out[0] and 0 <= column < out[1]:
                votes[row, column] += np.einsum("a,amk->mk", image[y, x], kernel[p, q])
            if not case.transpose and 0 <= row < size[0] and 0 <= column < size[1]:
                votes[y, x] += np.einsum("a,amk->mk", image[row, column], kernel[p, q])
    return votes


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", cases.SMALL)
@pytest.mark.usefixtures("double_precision")
def test_value_is_that_of_the_loops(case, implementation, route_by_hand):
    inputs, kernel, bias = _arguments(case, jnp.float64, leading=())
    got = _compiled(inputs, kernel, bias, **_options(case), implementation=implementation, block_size=2)
    votes = np.stack([_votes_by_hand(image, np.asarray(kernel), case) for image in np.asarray(inputs)])
    assert got.shape == (case.capsules, *votes.shape[1:3], case.dim)
    for y, x in np.ndindex(votes.shape[1:3]):
        expected = route_by_hand(votes[:, y, x], np.asarray(bias), case.num_iters)
        np.testing.assert_allclose(got[:, y, x], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", [cases.SMALL[1], cases.SMALL[3]])
@pytest.mark.usefixtures("double_precision")
def test_streamed_gradient_agrees_with_finite_differences(case):
    route = functools.partial(conv_capsules, **_options(case), implementation="streamed", block_size=2)
    check_grads(route, _arguments(case, jnp.float64, leading=()), order=1, modes=["rev"])


@settings(max_examples=8, deadline=None)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["SAME", "VALID"]),
    st.sampled_from(["full", "last"]),
    st.integers(1, 4),
)
def test_streamed_gradients_equal_stored_votes(
    enable_double_precision, size, types, window, strides, transpose, padding, gradient, block
):
    assume(padding == "SAME" or transpose or window <= min(size))
    case = cases.Case(size, types, 2, window, 2, 3, strides, transpose, padding, num_iters=2)
    with enable_double_precision():
        arguments = _arguments(case, jnp.float64, leading=(1,))
        expected = _gradients("reference", case, arguments, gradient=gradient)
        got = _gradients("streamed", case, arguments, gradient=gradient, block_size=block)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, expected)


def test_bfloat16_accumulates_in_float32():
    case = cases.SMALL[0]
    arguments = _arguments(case, jnp.bfloat16)
    wide = tuple(a.astype(jnp.float32) for a in arguments)
    _, expected = _gradients("reference", case, wide)
    for implementation in IMPLEMENTATIONS:
        route = functools.partial(conv_capsules, implementation=implementation)
        assert jax.eval_shape(route, *arguments).dtype == jnp.bfloat16
        _, grads = _gradients(implementation, case, arguments)
        for grad, full, argument in zip(grads, expected, arguments, strict=True):
            assert grad.dtype == argument.dtype
            error = jnp.linalg.norm((grad.astype(jnp.float32) - full).ravel()) / jnp.linalg.norm(full.ravel())
            assert error < 0.05


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_any_number_of_batch_axes(leading):
    case = cases.SMALL[0]
    inputs, kernel, bias = _arguments(case, leading=leading)
    flat = inputs.reshape(-1, *inputs.shape[-4:])
    expected = _compiled(flat, kernel, bias, implementation="reference")
    for implementation in IMPLEMENTATIONS:
        got = _compiled(inputs, kernel, bias, implementation=implementation)
        assert got.shape == (*leading, *expected.shape[1:])
        np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [cases.SMALL[1], cases.SMALL[3], cases.SMALL[7]])
@pytest.mark.usefixtures("double_precision")
def test_several_arrays_count_as_one_joined(case):
    inputs, kernel, bias = _arguments(case, jnp.float64)
    parts = (inputs[:, :1], inputs[:, 1:])

    def loss(arrays, kernel, bias, implementation):
        options = _options(case) | {"implementation": implementation, "block_size": 2}
        return jnp.sum(jnp.sin(3 * conv_capsules(arrays, kernel, bias, **options)))

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    expected, (grad_inputs, *grad_rest) = grad(inputs, kernel, bias, "reference")
    for implementation in IMPLEMENTATIONS:
        value, (grad_parts, *rest) = grad(parts, kernel, bias, implementation)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        joined = (jnp.concatenate(grad_parts, axis=1), *rest)
        for a, b in zip(joined, (grad_inputs, *grad_rest), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


def test_arrays_that_do_not_join_are_refused_with_both_shapes():
    inputs, kernel, _ = _arguments(cases.SMALL[0])
    with pytest.raises(ValueError, match=r"inputs float32\(2, 3, 6, 4, 2\) and float32\(2, 3, 6, 5, 2\) do not join"):
        conv_capsules((inputs, inputs[:, :, :, :4]), kernel)
    with pytest.raises(ValueError, match="inputs is an empty sequence"):
        conv_capsules((), kernel)


def test_one_output_type_never_forms_votes_of_several_types():
    inputs, kernel, bias = _arguments(cases.Case((8, 8), 5, 2, 3, capsules=1, dim=4))
    traced = str(jax.make_jaxpr(lambda *a: conv_capsules(*a, implementation="reference"))(inputs, kernel, bias))
    assert "f32[10,8,8,4]" not in traced  # 2 examples × 5 types
    assert "f32[2,8,8,4]" in traced


def test_temporary_memory_is_well_below_that_of_stored_votes():
    case = cases.Case((128, 128), types=8, depth=8, window=5, capsules=4, dim=16)

    def temporary(implementation):
        def loss(*arguments):
            return jnp.sum(conv_capsules(*arguments, implementation=implementation) ** 2)

        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in _arguments(case)]
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
        usage = compiled.memory_analysis()
        assert usage is not None
        return usage.temp_size_in_bytes

    assert temporary("streamed") <= temporary("reference") / 3


def test_impossible_arguments_are_refused_with_both_shapes():
    inputs, kernel = jnp.ones((2, 4, 6, 6, 3)), jnp.ones((5, 5, 3, 2, 8))
    with pytest.raises(ValueError, match=r"inputs \(2, 4, 6, 6, 3\) and kernel \(5, 5, 2, 2, 8\) do not fit"):
        conv_capsules(inputs, jnp.ones((5, 5, 2, 2, 8)))
    with pytest.raises(ValueError, match=r"kernel \(5, 3, 3, 2, 8\) is not square"):
        conv_capsules(inputs, jnp.ones((5, 3, 3, 2, 8)))
    with pytest.raises(ValueError, match=r"inputs has shape \(2, 0, 6, 6, 3\)"):
        conv_capsules(jnp.ones((2, 0, 6, 6, 3)), kernel)
    with pytest.raises(ValueError, match=r"bias has shape \(8, 2\), but kernel .* asks for \(2, 8\)"):
        conv_capsules(inputs, kernel, jnp.ones((8, 2)))
    with pytest.raises(ValueError, match="padding='REFLECT' is unknown; choose 'SAME' or 'VALID'"):
        conv_capsules(inputs, kernel, padding="REFLECT")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="strides=0 must be an integer"):
        conv_capsules(inputs, kernel, strides=0)
    with pytest.raises(ValueError, match="is larger than the image"):
        conv_capsules(inputs, jnp.ones((7, 7, 3, 2, 8)), padding="VALID")
    with pytest.raises(ValueError, match="implementation='fast' is unknown; choose from streamed, reference"):
        conv_capsules(inputs, kernel, implementation="fast")
