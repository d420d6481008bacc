"""The TPU kernels of dynamic routing, emulated: equal to stored votes in value and gradient, and they lower."""

import functools
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsfl_kernels.dynamic import cases, mosaic_tpu, reference
from capsfl_kernels.votes.tile import Routing
from jax import lax

# Two splits of several blocks, the last one partly padding.
UNEVEN = cases.Case(batch=3, inputs=21, depth=4, capsules=3, dim=5, num_iters=2)
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
    return lambda inputs, weights, bias: mosaic_tpu.route(inputs, weights, bias, routing, interpret=True, **options)


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


@pytest.mark.parametrize(
    ("case", "leaky", "gradient"),
    [
        (cases.TINY, False, "full"),
        (cases.TINY, True, "last"),
        (cases.ONE_OUTPUT, True, "full"),
        (cases.ONE_ITERATION, False, "full"),
        (cases.ONE_ITERATION, True, "last"),
        (cases.SINGLE_INPUT, True, "full"),
        (UNEVEN, False, "last"),
    ],
)
def test_value_and_gradients_are_those_of_stored_votes(case, leaky, gradient):
    arguments, routing = _arguments(case), Routing(case.num_iters, leaky, gradient)
    _close(_emulated(routing)(*arguments), _expected(routing)(*arguments), 3e-6)


def _plan(case, block_size):
    sizes = (case.batch, case.inputs, case.capsules, case.dim, case.depth)
    return mosaic_tpu._plan(*sizes, jnp.dtype(jnp.float32), block_size)


def test_blocks_of_any_size_add_up():
    # One input takes the sublanes that eight take.
    assert _plan(UNEVEN, 1) == _plan(UNEVEN, 8)
    arguments, routing = _arguments(UNEVEN), Routing(2, False, "full")
    expected = _expected(routing)(*arguments)
    for block_size, block, blocks, splits in ((1, 8, 2, 2), (9, 16, 1, 2), (None, 24, 1, 1)):
        plan = _plan(UNEVEN, block_size)
        assert (plan.block, plan.blocks, plan.splits) == (block, blocks, splits)
        _close(_gradients(_route(routing, block_size=block_size), arguments), expected, 3e-6)


@pytest.mark.parametrize("aim", [mosaic_tpu._VMEM_AIM, 1])
def test_tiles_of_the_batch_add_up_in_one_group_and_in_many(aim, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "_VMEM_AIM", aim)
    case = cases.Case(batch=300, inputs=9, depth=2, capsules=2, dim=3)
    arguments, routing = _arguments(case), Routing(2, True, "full")
    plan = _plan(case, 8)
    assert (plan.tiles, plan.groups, plan.splits) == ((3, 1, 2) if aim > 1 else (1, 3, 2))
    got = _gradients(_route(routing, block_size=8), arguments)
    _close(got, _expected(routing)(*arguments), 3e-6)


def test_bfloat16_accumulates_in_float32():
    arguments, routing = _arguments(cases.Case(4, 96, 8, 4, 8), jnp.bfloat16, 0.1), Routing(3, False, "full")
    wide = tuple(a.astype(jnp.float32) for a in arguments)
    value, got = _emulated(routing)(*arguments)
    expected_value, expected = _expected(routing)(*wide)
    _close(value, expected_value, 0.02)
    assert [g.dtype for g in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    _close([g.astype(jnp.float32) for g in got], expected, 0.03)


@pytest.mark.parametrize("zero", [0, 1])
def test_zero_vectors_have_finite_gradients_and_zero_where_nothing_moves(zero):
    arguments = list(_arguments(cases.TINY))
    arguments[zero] = jnp.zeros_like(arguments[zero])
    arguments[2] = jnp.zeros_like(arguments[2])
    _, grads = _emulated(Routing(3, False, "full"))(*arguments)
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)


def test_vmap_is_one_after_the_other():
    inputs, weights, bias = _arguments(cases.TINY)
    factors = (1, -2, 0.5)
    stacked = tuple(jnp.stack([factor * a for factor in factors]) for a in (inputs, weights))
    routing = Routing(3, False, "full")
    vmapped = jax.vmap(_with_gradients(_route(routing)), in_axes=(0, 0, None))
    got = jax.jit(vmapped, compiler_options=UNPOLISHED)(*stacked, bias)
    for index in range(len(factors)):
        one = _emulated(routing)(stacked[0][index], stacked[1][index], bias)
        _close(jax.tree.map(lambda leaf, index=index: leaf[index], got), one, 1e-6)


def test_shard_map_sums_the_gradient_of_shared_weights():
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("devices"), jax.sharding.PartitionSpec()
    arguments, routing = _arguments(cases.TINY), Routing(3, False, "full")

    # JAX cannot check how values inside an emulated kernel vary over devices.
    sharded = jax.shard_map(
        _with_gradients(_route(routing)),
        mesh=mesh,
        in_specs=(split, whole, whole),
        out_specs=(split, (split, whole, whole)),
        check_vma=False,
    )
    got = jax.jit(sharded, compiler_options=UNPOLISHED)(*arguments)
    _close(got, _expected(routing)(*arguments), 3e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", [cases.DIGITS, cases.Case(128, 4608, 8, 100, 16), UNEVEN])
def test_value_and_gradient_lower_for_a_tpu(case, dtype):
    def loss(inputs, weights, bias):
        return jnp.sum(mosaic_tpu.route(inputs, weights, bias, Routing(3, False, "full")))

    exported = jax.export.export(
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))),
        platforms=["tpu"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("tpu_custom_call")],
    )(*_shapes(case, dtype))
    # Two further iterations, each with a kernel of sums and one of gradients.
    assert exported.mlir_module().count("tpu_custom_call") == 4


def test_float32_products_are_exact_unless_precision_asks_for_less():
    def text(precision, dtype=jnp.float32):
        return str(jax.make_jaxpr(_route(Routing(2, False, "full"), precision=precision))(*_shapes(cases.TINY, dtype)))

    assert "Precision.HIGHEST" in text(None)
    assert "Precision.HIGHEST" in text("high")
    assert "Precision.HIGHEST" not in text("default")
    assert "Precision.HIGHEST" not in text(None, jnp.bfloat16)
    with jax.default_matmul_precision("bfloat16"):
        assert "Precision.HIGHEST" not in text(None)


def test_importing_the_module_leaves_pallas_alone():
    program = "import sys, capsfl_kernels.dynamic.mosaic_tpu; sys.exit('jax.experimental.pallas' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_obstacle_names_what_is_in_the_way(monkeypatch):
    shape = (128, 1152, 10, 16, 8)
    assert mosaic_tpu.obstacle(*shape, jnp.float32) == "needs a TPU; the devices here are cpu"
    assert mosaic_tpu.obstacle(*shape, jnp.float64) == "takes float32 and bfloat16, got float64"
    assert "precision='exact' is not one of" in (mosaic_tpu.obstacle(*shape, jnp.float32, "exact") or "")
    large = mosaic_tpu.obstacle(128, 1152, 4000, 16, 8, jnp.float32)
    assert large is not None
    assert "MiB of VMEM for 4000 output capsules" in large
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="tpu")])
    assert mosaic_tpu.obstacle(*shape, jnp.float32) is None
    assert mosaic_tpu.obstacle(*shape, jnp.bfloat16, lax.Precision.HIGHEST) is None
