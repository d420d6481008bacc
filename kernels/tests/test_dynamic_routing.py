"""Fully connected routing: every implementation equals the paper's loops, value and gradient."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsfl_kernels import block_sizes, dynamic_routing
from capsfl_kernels.dynamic import api, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

IMPLEMENTATIONS = ("reference", "streamed")
STATIC = ("num_iters", "leaky", "implementation", "block_size", "gradient")
_compiled = jax.jit(dynamic_routing, static_argnames=STATIC)
"""One program a call: operation by operation, every one of them is compiled alone."""


def _arguments(case: cases.Case, dtype=jnp.float32):
    # NumPy draws, for JAX would compile a generator for every shape.
    generator = np.random.default_rng(7)
    shapes = (
        (case.batch, case.inputs, case.depth),
        (case.inputs, case.capsules, case.dim, case.depth),
        (case.capsules, case.dim),
    )
    return tuple(jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes)


def _gradients(implementation, arguments, **options):
    def loss(inputs, weights, bias):
        return jnp.sum(jnp.sin(3 * dynamic_routing(inputs, weights, bias, implementation=implementation, **options)))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("case", cases.SMALL)
@pytest.mark.usefixtures("double_precision")
def test_value_is_that_of_the_papers_loops(case, leaky, implementation, route_by_hand):
    inputs, weights, bias = _arguments(case, jnp.float64)
    got = _compiled(
        inputs,
        weights,
        bias,
        num_iters=case.num_iters,
        leaky=leaky,
        implementation=implementation,
        block_size=2,
    )
    for example, output in zip(np.asarray(inputs), got, strict=True):
        votes = np.stack([[w @ u for w in row] for u, row in zip(example, np.asarray(weights), strict=True)])
        expected = route_by_hand(votes, np.asarray(bias), case.num_iters, leaky)
        np.testing.assert_allclose(output, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.usefixtures("double_precision")
def test_full_gradient_agrees_with_finite_differences(implementation, leaky):
    route = functools.partial(dynamic_routing, leaky=leaky, implementation=implementation, block_size=2)
    check_grads(route, _arguments(cases.TINY, jnp.float64), order=1, modes=["rev"])


@settings(max_examples=6, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["full", "last"]),
    st.integers(1, 10),
)
def test_streamed_gradients_equal_stored_votes(
    enable_double_precision, batch, inputs, depth, capsules, dim, iters, leaky, gradient, block
):
    with enable_double_precision():
        arguments = _arguments(cases.Case(batch, inputs, depth, capsules, dim), jnp.float64)
        options = {"num_iters": iters, "leaky": leaky, "gradient": gradient}
        expected = _gradients("reference", arguments, **options)
        got = _gradients("streamed", arguments, **options, block_size=block)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), got, expected)


@pytest.mark.parametrize("gradient", ["full", "last"])
@pytest.mark.parametrize("case", [cases.MANY_CLASSES, cases.DEEP])
@pytest.mark.usefixtures("double_precision")
def test_long_axes_change_nothing(case, gradient):
    arguments = _arguments(case, jnp.float64)
    expected = _gradients("reference", arguments, gradient=gradient)
    got = _gradients("streamed", arguments, gradient=gradient, block_size=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), got, expected)


@pytest.mark.usefixtures("double_precision")
def test_last_gradient_takes_the_couplings_as_constants():
    inputs, weights, bias = _arguments(cases.TINY, jnp.float64)

    def frozen(inputs, weights, bias):
        """One more sum under the couplings that two iterations leave behind."""
        votes = jnp.einsum("bnd,nmkd->bnmk", inputs, weights)
        kept = jax.lax.stop_gradient(votes)
        fixed = jax.lax.stop_gradient(bias)
        first = dynamic_routing(inputs, weights, fixed, num_iters=1)
        second = dynamic_routing(inputs, weights, fixed, num_iters=2)
        logits = jnp.einsum("bnmk,bmk->bnm", kept, jax.lax.stop_gradient(first + second))
        total = jnp.einsum("bnm,bnmk->bmk", jax.nn.softmax(logits, -1), votes) + bias[None]
        squared = jnp.sum(total * total, -1, keepdims=True)
        return jnp.sum(jnp.sin(3 * total * squared / (1 + squared) / jnp.sqrt(squared + 1e-7)))

    expected = jax.jit(jax.grad(frozen, argnums=(0, 1, 2)))(inputs, weights, bias)
    full = _gradients("reference", (inputs, weights, bias))[1]
    for implementation in IMPLEMENTATIONS:
        got = _gradients(implementation, (inputs, weights, bias), gradient="last")[1]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, expected)
        assert not np.allclose(got[0], full[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_accumulates_in_float32(implementation):
    arguments = _arguments(cases.Case(4, 512, 8, 4, 8), jnp.bfloat16)
    arguments = (arguments[0], arguments[1] * jnp.bfloat16(0.05), arguments[2])
    wide = tuple(a.astype(jnp.float32) for a in arguments)
    got = _compiled(*arguments, implementation=implementation)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), _compiled(*wide, implementation="reference"), atol=0.02)
    _, grads = _gradients(implementation, arguments)
    _, expected = _gradients("reference", wide)
    for grad, full, argument in zip(grads, expected, arguments, strict=True):
        assert grad.dtype == argument.dtype
        error = jnp.linalg.norm((grad.astype(jnp.float32) - full).ravel()) / jnp.linalg.norm(full.ravel())
        assert error < 0.03


@pytest.mark.parametrize("leading", [(), (2,), (2, 1, 3)])
def test_any_number_of_batch_axes(leading):
    _, weights, bias = _arguments(cases.TINY)
    inputs = jax.random.normal(jax.random.key(3), (*leading, cases.TINY.inputs, cases.TINY.depth))
    flat = inputs.reshape(-1, *inputs.shape[-2:])
    for implementation in IMPLEMENTATIONS:
        got = _compiled(inputs, weights, bias, implementation=implementation)
        one = _compiled(flat, weights, bias, implementation="reference")
        assert got.shape == (*leading, cases.TINY.capsules, cases.TINY.dim)
        np.testing.assert_allclose(got.reshape(one.shape), one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("gradient", "part"), [(False, 14), (True, 12)])
def test_temporary_memory_is_a_small_part_of_that_of_stored_votes(gradient, part):
    case = cases.DIGITS
    shapes = [
        jax.ShapeDtypeStruct((case.batch, case.inputs, case.depth), jnp.float32),
        jax.ShapeDtypeStruct((case.inputs, case.capsules, case.dim, case.depth), jnp.float32),
        jax.ShapeDtypeStruct((case.capsules, case.dim), jnp.float32),
    ]

    def temporary(implementation):
        def loss(*arguments):
            return jnp.sum(dynamic_routing(*arguments, implementation=implementation) ** 2)

        function = jax.value_and_grad(loss, argnums=(0, 1, 2)) if gradient else loss
        usage = jax.jit(function).lower(*shapes).compile().memory_analysis()
        assert usage is not None
        return usage.temp_size_in_bytes

    assert temporary("streamed") <= temporary("reference") / part


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_donated_arguments_give_the_same_gradients(implementation):
    arguments = _arguments(cases.TINY)
    expected = _gradients(implementation, arguments)[1]

    def loss(*arguments):
        return jnp.sum(jnp.sin(3 * dynamic_routing(*arguments, implementation=implementation)))

    donated = jax.tree.map(jnp.copy, arguments)
    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), donate_argnums=(0, 1, 2))(*donated)
    # The gradients took over the arguments' memory while both were still needed.
    assert all(array.is_deleted() for array in donated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_impossible_arguments_are_refused_with_both_shapes():
    u, w = jnp.ones((2, 5, 3)), jnp.ones((5, 4, 6, 3))
    with pytest.raises(ValueError, match=r"inputs \(2, 5, 3\) and weights \(6, 4, 6, 3\) do not fit"):
        dynamic_routing(u, jnp.ones((6, 4, 6, 3)))
    with pytest.raises(ValueError, match=r"weights has shape \(5, 0, 6, 3\); every axis needs at least one"):
        dynamic_routing(u, jnp.ones((5, 0, 6, 3)))
    with pytest.raises(ValueError, match=r"bias has shape \(4,\), but weights \(5, 4, 6, 3\) asks for \(4, 6\)"):
        dynamic_routing(u, w, jnp.ones(4))
    with pytest.raises(ValueError, match=r"implementation='fast' is unknown; choose from .*streamed, mosaic_gpu"):
        dynamic_routing(u, w, implementation=("streamed", "fast"))
    with pytest.raises(ValueError, match="num_iters=0 must be an integer of at least 1"):
        dynamic_routing(u, w, num_iters=0)
    with pytest.raises(ValueError, match="gradient='some' is unknown"):
        dynamic_routing(u, w, gradient="some")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="floating point, got int32"):
        dynamic_routing(u.astype(jnp.int32), w)
    with pytest.raises(ValueError, match="block_size=0"):
        dynamic_routing(u, w, block_size=0)


def test_a_sequence_of_implementations_runs_the_first():
    arguments = _arguments(cases.TINY)
    first = str(jax.make_jaxpr(lambda *a: dynamic_routing(*a, implementation=("streamed", "reference")))(*arguments))
    other = str(jax.make_jaxpr(lambda *a: dynamic_routing(*a, implementation=("reference", "streamed")))(*arguments))
    assert "custom_vjp_call" in first
    assert "custom_vjp_call" not in other


@pytest.mark.parametrize(
    ("implementation", "reason"),
    [
        ("mosaic_gpu", "'mosaic_gpu' needs a Hopper GPU; the devices here are cpu"),
        ("mosaic_tpu", "'mosaic_tpu' needs a TPU; the devices here are cpu"),
        (("mosaic_tpu", "mosaic_gpu"), "needs a TPU; the devices here are cpu; 'mosaic_gpu' needs a Hopper GPU"),
    ],
)
def test_a_kernel_that_cannot_run_here_says_why(implementation, reason):
    inputs, weights, _ = _arguments(cases.TINY)
    with pytest.raises(ValueError, match=reason):
        dynamic_routing(inputs, weights, implementation=implementation)


def test_a_kernel_that_cannot_run_gives_way_to_the_next_in_a_sequence():
    arguments = _arguments(cases.TINY)
    got = dynamic_routing(*arguments, implementation=("mosaic_gpu", "mosaic_tpu", "streamed"))
    np.testing.assert_array_equal(got, dynamic_routing(*arguments, implementation="streamed"))


@pytest.mark.parametrize("case", [cases.TINY, cases.ONE_OUTPUT, cases.ONE_ITERATION])
def test_a_kernel_that_can_run_goes_first(case, monkeypatch):
    arguments = _arguments(case)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(api.mosaic_tpu, "obstacle", lambda *_: None)
    emulated = functools.partial(api.mosaic_tpu.route, interpret=True)
    calls = []
    monkeypatch.setattr(api.mosaic_tpu, "route", lambda *a, **options: calls.append(a) or emulated(*a, **options))
    got = dynamic_routing(*arguments, num_iters=case.num_iters)
    assert len(calls) == 1
    expected = dynamic_routing(*arguments, num_iters=case.num_iters, implementation="reference")
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_few_votes_are_stored_and_many_streamed():
    def stored(case):
        shapes = jax.eval_shape(lambda: _arguments(case))
        return "custom_vjp_call" not in str(jax.make_jaxpr(dynamic_routing)(*shapes))

    assert stored(cases.TINY)
    assert stored(cases.DIGITS._replace(batch=8))
    assert not stored(cases.DIGITS)


def test_a_recorded_block_size_is_used_where_none_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("CAPSFL_BLOCK_SIZES", str(tmp_path / "sizes.json"))
    shapes = jax.eval_shape(lambda: _arguments(cases.TINY))

    def arranged(**options):
        route = functools.partial(dynamic_routing, implementation="streamed", **options)
        return str(jax.make_jaxpr(route)(*shapes))

    case = cases.TINY
    shape = (case.batch, case.inputs, case.depth, case.capsules, case.dim)
    before = arranged()
    block_sizes.record("dynamic_routing", "streamed", shape=shape, dtype=jnp.float32, block_size=2)
    assert before != arranged()
    assert arranged() == arranged(block_size=2)
    assert arranged(block_size=5) == before


def _run(code: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Another interpreter, which finds modules in `folder` first."""
    packages = Path(api.__file__).parents[2]
    path = os.pathsep.join(str(place) for place in (folder, packages) if place is not None)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_of_the_kernels_is_loaded_on_a_cpu():
    done = _run(
        "import sys, jax.numpy as jnp, capsfl_kernels\n"
        "capsfl_kernels.dynamic_routing(jnp.ones((2, 3, 2)), jnp.ones((3, 2, 2, 2)))\n"
        "print([name for name in sys.modules if name.startswith('jax.experimental.pallas')])"
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize(("version", "accepted"), [("0.4.30", False), ("0.9.2", False), ("0.10.0rc1", True)])
def test_an_old_jax_is_refused_by_name(version, accepted, tmp_path):
    fake = tmp_path / "jax"
    fake.mkdir()
    # Nothing but a version: whatever else is imported from it fails in its own words.
    (fake / "__init__.py").write_text(f"__version__ = {version!r}")
    done = _run("import capsfl_kernels", tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    refusal = f"ImportError: capsfl_kernels needs jax 0.10 or later, but jax {version} is installed; upgrade jax"
    assert (last != refusal) == accepted
