"""The Hopper kernels of dynamic routing, emulated: equal to stored votes in value and gradient, and they lower."""

import functools
import importlib.util
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsfl_kernels.dynamic import bfloat16, cases, mosaic_gpu, reference
from capsfl_kernels.votes.tile import Routing
from jax import lax

pytest.importorskip("absl", reason="Pallas for Mosaic GPU needs absl-py, which is not installed")

# Two and three blocks of 16 inputs, the last one partly padding, and two tiles of 64 examples.
SPLIT = cases.Case(batch=65, inputs=17, depth=2, capsules=2, dim=3, num_iters=2)
UNEVEN = SPLIT._replace(inputs=35)
MINUTE = cases.Case(batch=2, inputs=3, depth=2, capsules=2, dim=2, num_iters=2)
# Of the code that XLA makes of an emulated kernel nothing is ever shipped: polishing it takes longer than running it.
UNPOLISHED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _shapes(case: cases.Case, dtype):
    return (
        jax.ShapeDtypeStruct((case.batch, case.inputs, case.depth), dtype),
        jax.ShapeDtypeStruct((case.inputs, case.capsules, case.dim, case.depth), dtype),
        jax.ShapeDtypeStruct((case.capsules, case.dim), jnp.float32),
    )


def _arguments(case: cases.Case, dtype=jnp.float32, scale=1.0):
    # NumPy draws, for JAX would compile a generator for every shape.
    generator = np.random.default_rng(7)
    inputs, weights, bias = (generator.standard_normal(shape.shape) for shape in _shapes(case, dtype))
    return jnp.asarray(inputs, dtype), jnp.asarray(scale * weights, dtype), jnp.asarray(bias, jnp.float32)


def _route(routing, **options):
    return lambda inputs, weights, bias: mosaic_gpu.route(inputs, weights, bias, routing, interpret=True, **options)


def _stored(routing):
    return lambda *arguments: reference.route(*arguments, **routing._asdict(), precision=lax.Precision.HIGHEST)


def _with_gradients(route):
    """What `route` returns, and the gradients of a loss that weighs every entry of it differently."""

    def loss(*arguments):
        output = route(*arguments)
        return jnp.sum(jnp.sin(3 * output)), output

    differentiated = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)

    def run(*arguments):
        (_, output), grads = differentiated(*arguments)
        return output, grads

    return run


def _gradients(route, arguments):
    return jax.jit(_with_gradients(route), compiler_options=UNPOLISHED)(*arguments)


@functools.cache
def _emulated(routing):
    """Output and gradients under the plans that the module chooses, compiled once for every shape."""
    return jax.jit(_with_gradients(_route(routing)), compiler_options=UNPOLISHED)


@functools.cache
def _expected(routing):
    """Output and gradients from stored votes."""
    return jax.jit(_with_gradients(_stored(routing)))


def _close(got, expected, tolerance):
    """Every array within `tolerance` of the other in relative norm."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-30


def _plan(case, dtype, block_size=None):
    sizes = (case.batch, case.inputs, case.capsules, case.dim, case.depth)
    return mosaic_gpu._plan(*sizes, jnp.dtype(dtype), lax.Precision.HIGHEST, Routing(2, False, "full"), block_size)


@pytest.mark.parametrize(
    ("case", "leaky", "gradient"),
    [
        (cases.TINY, False, "full"),
        (cases.ONE_OUTPUT, True, "full"),
        (cases.ONE_ITERATION, False, "full"),
        (cases.ONE_ITERATION, True, "last"),
        (cases.SINGLE_INPUT, True, "last"),
        (MINUTE, False, "last"),
    ],
)
def test_value_and_gradients_are_those_of_stored_votes(case, leaky, gradient):
    arguments, routing = _arguments(case), Routing(case.num_iters, leaky, gradient)
    _close(_emulated(routing)(*arguments), _expected(routing)(*arguments), 3e-6)


def test_blocks_and_tiles_of_many_thread_blocks_add_up():
    plan = _plan(SPLIT, jnp.float32)
    assert (plan.blocks, plan.tiles, plan.reach, plan.group) == (2, 2, 1, 1)
    arguments, routing = _arguments(SPLIT), Routing(2, True, "full")
    _close(_emulated(routing)(*arguments), _expected(routing)(*arguments), 3e-6)


def test_blocks_and_tiles_add_up_inside_a_thread_block(monkeypatch):
    assert [_plan(UNEVEN, jnp.float32, size).reach for size in (1, 16, 17, 99)] == [1, 1, 2, 3]
    monkeypatch.setattr(mosaic_gpu, "_THREAD_BLOCKS", 1)
    # With or without a size of blocks. A reach of two does not divide three blocks: a fourth one of zeros adds nothing.
    for plan in (_plan(UNEVEN, jnp.float32), _plan(UNEVEN, jnp.float32, 17)):
        assert (plan.blocks, plan.tiles, plan.reach, plan.group) == (4, 2, 2, 2)
    arguments, routing = _arguments(UNEVEN), Routing(2, True, "full")
    _close(_gradients(_route(routing, block_size=17), arguments), _expected(routing)(*arguments), 3e-6)


def test_ring_of_one_slot_and_ring_of_all_steps_agree(monkeypatch):
    arguments, routing = _arguments(MINUTE), Routing(2, False, "full")
    expected = _expected(routing)(*arguments)
    plan = _plan(MINUTE, jnp.float32)
    assert (plan.sum_slots, plan.gradient_slots) == (2, 2)
    _close(_emulated(routing)(*arguments), expected, 3e-6)
    monkeypatch.setattr(mosaic_gpu, "_SHARED_AIM", 1)
    monkeypatch.setattr(mosaic_gpu, "_SHARED_LIMIT", 1)
    plan = _plan(MINUTE, jnp.float32)
    assert (plan.sum_slots, plan.gradient_slots) == (1, 1)
    _close(_gradients(_route(routing), arguments), expected, 3e-6)


def test_bfloat16_accumulates_in_float32():
    arguments, routing = _arguments(cases.Case(4, 32, 8, 2, 8), jnp.bfloat16, 0.1), Routing(2, False, "full")
    wide = tuple(a.astype(jnp.float32) for a in arguments)
    value, got = _emulated(routing)(*arguments)
    expected_value, expected = _expected(routing)(*wide)
    _close(value, expected_value, 0.02)
    assert [g.dtype for g in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    _close([g.astype(jnp.float32) for g in got], expected, 0.03)


@pytest.mark.parametrize(("precision", "most", "least"), [("high", 3e-5, 1e-8), ("default", 0.1, 1e-4)])
def test_precision_sets_the_parts_of_float32(precision, most, least):
    arguments, routing = _arguments(MINUTE), Routing(2, False, "full")
    expected = np.asarray(_expected(routing)(*arguments)[0])
    route = jax.jit(_route(routing, precision=precision), compiler_options=UNPOLISHED)
    error = np.linalg.norm(route(*arguments) - expected)
    assert least < error / np.linalg.norm(expected) < most


def test_parts_of_float32_sum_to_it_also_after_compilation():
    x = jax.random.normal(jax.random.key(0), (1000,)) * 2.0 ** jnp.arange(-30.0, 30.0, 0.06)
    for parts, bits in ((1, 8), (2, 16), (3, 24)):
        pieces = jax.jit(bfloat16.split, static_argnums=1)(x, parts)
        assert [piece.dtype for piece in pieces] == [jnp.bfloat16] * parts
        total = sum(np.asarray(piece, np.float64) for piece in pieces)
        assert np.max(np.abs(total - np.asarray(x, np.float64)) / np.abs(np.asarray(x))) <= 2.0**-bits


@pytest.mark.parametrize("zero", [0, 1])
def test_zero_vectors_have_finite_gradients_and_zero_where_nothing_moves(zero):
    arguments = list(_arguments(MINUTE))
    arguments[zero] = jnp.zeros_like(arguments[zero])
    arguments[2] = jnp.zeros_like(arguments[2])
    _, grads = _emulated(Routing(2, False, "full"))(*arguments)
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)


def test_vmap_is_one_after_the_other():
    inputs, weights, bias = _arguments(MINUTE)
    stacked = jnp.stack([inputs, -2 * inputs]), jnp.stack([weights, -2 * weights])
    routing = Routing(2, False, "full")
    vmapped = jax.vmap(_with_gradients(_route(routing)), in_axes=(0, 0, None))
    got = jax.jit(vmapped, compiler_options=UNPOLISHED)(*stacked, bias)
    for index in range(2):
        one = _emulated(routing)(stacked[0][index], stacked[1][index], bias)
        _close(jax.tree.map(lambda leaf, index=index: leaf[index], got), one, 1e-6)


def _export(case, dtype, transform=lambda route: route):
    def loss(*arguments):
        return jnp.sum(transform(lambda u, w, b: mosaic_gpu.route(u, w, b, Routing(2, False, "full")))(*arguments))

    return jax.export.export(
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )(*_shapes(case, dtype)).mlir_module()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        # One block of inputs and one tile of the batch to a thread block, then two of each.
        (cases.DIGITS, jnp.float32),
        (cases.Case(128, 4608, 8, 100, 16), jnp.bfloat16),
        (cases.Case(128, 4608, 3, 4, 6), jnp.float32),
    ],
)
def test_value_and_gradient_lower_for_a_hopper_gpu(case, dtype):
    plan = _plan(case, dtype)
    assert (plan.reach, plan.group) == ((1, 1) if case is cases.DIGITS else (2, 2))
    assert _export(case, dtype).count("mosaic_gpu_v2") == 2


def test_gradient_of_a_shard_map_lowers():
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("devices"), jax.sharding.PartitionSpec()

    def shard(route):
        return jax.shard_map(route, mesh=mesh, in_specs=(split, whole, whole), out_specs=split)

    assert _export(cases.TINY, jnp.bfloat16, shard).count("mosaic_gpu_v2") == 2


def test_plans_fit_the_shared_memory_of_a_processor():
    for case in (cases.DIGITS, cases.Case(128, 4608, 8, 100, 16), cases.Case(300, 512, 16, 32, 32)):
        for dtype in (jnp.float32, jnp.bfloat16):
            plan = _plan(case, dtype)
            assert mosaic_gpu._sum_bytes(plan, jnp.dtype(dtype)) <= mosaic_gpu._SHARED_LIMIT
            assert mosaic_gpu._gradient_bytes(plan, jnp.dtype(dtype)) <= mosaic_gpu._SHARED_LIMIT


def test_importing_the_module_leaves_pallas_alone():
    program = "import sys, capsfl_kernels.dynamic.mosaic_gpu; sys.exit('jax.experimental.pallas' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_obstacle_names_what_is_in_the_way(monkeypatch):
    shape = (128, 1152, 10, 16, 8)
    assert mosaic_gpu.obstacle(*shape, jnp.float32) == "needs a Hopper GPU; the devices here are cpu"
    assert mosaic_gpu.obstacle(*shape, jnp.float64) == "takes float32 and bfloat16, got float64"
    assert "precision='exact' is not one of" in (mosaic_gpu.obstacle(*shape, jnp.float32, "exact") or "")
    for sizes, text in (
        ((128, 1152, 10, 16, 33), "input capsules of at most 32 components, got 33"),
        ((128, 1152, 10, 129, 8), "output capsules of at most 128 components, got 129"),
        ((128, 1152, 10, 128, 32), "KiB of shared memory for 128 x 32 weights"),
    ):
        assert text in (mosaic_gpu.obstacle(*sizes, jnp.float32) or "")

    def pretend(capability, kind):
        device = types.SimpleNamespace(platform="gpu", compute_capability=capability, device_kind=kind)
        monkeypatch.setattr(jax, "devices", lambda: [device])

    pretend("10.0", "NVIDIA B200")
    assert mosaic_gpu.obstacle(*shape, jnp.bfloat16) == "needs a Hopper GPU; the devices here are NVIDIA B200"
    pretend("9.0", "NVIDIA H200")
    assert mosaic_gpu.obstacle(*shape, jnp.bfloat16) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert mosaic_gpu.obstacle(*shape, jnp.bfloat16) == "needs absl-py, which is not installed"
