"""Fully connected capsules on a Hopper GPU: one Pallas kernel per iteration, forward and backward.

Votes are never stored: a thread block computes the logits of 16 input capsules and 64 examples, and from them what
these add to the sums. N is split over thread blocks as well as the batch, since tiles of the batch alone would leave
most of the processors idle; the partial sums are added afterwards. The kernels are in `mosaic_gpu_sums` and
`mosaic_gpu_gradients`, what they share in `warpgroup`.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import common_variation
from capsfl_kernels.dynamic import iterations
from capsfl_kernels.dynamic.bfloat16 import count_parts, split
from capsfl_kernels.dynamic.mosaic_gpu_gradients import gradient_kernel, gradient_scratch
from capsfl_kernels.dynamic.mosaic_gpu_sums import sum_kernel, sum_scratch
from capsfl_kernels.dynamic.precision import resolve_precision
from capsfl_kernels.dynamic.warpgroup import COLUMNS, ROWS, Plan
from capsfl_kernels.votes.tile import Routing

# Two thread blocks on each of the 132 processors of an H100 or H200 hide each other's waits.
_THREAD_BLOCKS = 264
# Half of a processor's 228 KiB less what the system keeps; and all that one thread block may have (227 KiB) less
# barriers and alignment.
_SHARED_AIM = 112 << 10
_SHARED_LIMIT = 224 << 10
# A copy by the TMA spans at most 256 tiles of 8 rows in a dimension, and an accumulator of the tensor cores that
# is wider than this leaves no registers for anything else.
_DEPTH_LIMIT = 32
_DIM_LIMIT = 128


def obstacle(
    batch: int,
    number: int,
    capsules: int,
    dim: int,
    depth: int,
    dtype: Any,
    precision: lax.PrecisionLike = None,
) -> str | None:
    """What keeps `route` from running here, in words that follow its name; None where nothing does.

    Args:
        batch: Examples.
        number: N, input capsules.
        capsules: M, output capsules.
        dim: K, their dimension.
        depth: D, the dimension of an input capsule.
        dtype: Of inputs and weights.
        precision: Of the matrix products.
    """
    if importlib.util.find_spec("absl") is None:
        return "needs absl-py, which is not installed"
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        return f"takes float32 and bfloat16, got {dtype.name}"
    try:
        exact = resolve_precision(dtype, precision)
    except ValueError as error:
        return f"takes no such precision: {error}"
    if depth > _DEPTH_LIMIT:
        return f"takes input capsules of at most {_DEPTH_LIMIT} components, got {depth}"
    if dim > _DIM_LIMIT:
        return f"takes output capsules of at most {_DIM_LIMIT} components, got {dim}"
    plan = _plan(batch, number, capsules, dim, depth, dtype, exact, Routing(2, False, "full"), None)
    needed = max(_sum_bytes(plan, dtype), _gradient_bytes(plan, dtype))
    if needed > _SHARED_LIMIT:
        return f"needs {needed >> 10} KiB of shared memory for {dim} x {depth} weights, more than {_SHARED_LIMIT >> 10}"
    devices = jax.devices()
    if any(device.platform != "gpu" for device in devices):
        return f"needs a Hopper GPU; the devices here are {', '.join(sorted({d.platform for d in devices}))}"
    # The tensor core instructions (wgmma) exist in compute capability 9.0 only, neither before nor after.
    if any(getattr(device, "compute_capability", "9.0") != "9.0" for device in devices):
        return f"needs a Hopper GPU; the devices here are {', '.join(sorted({d.device_kind for d in devices}))}"
    return None


def route(
    inputs: jax.Array,
    weights: jax.Array,
    bias: jax.Array,
    routing: Routing,
    *,
    block_size: int | None = None,
    precision: lax.PrecisionLike = None,
    interpret: Any = False,
) -> jax.Array:
    """Routes inputs through weights without forming votes (Sabour et al. 2017, procedure 1); differentiable.

    Args:
        inputs: ``(batch, N, D)``, float32 or bfloat16.
        weights: ``(N, M, K, D)`` of the same dtype.
        bias: ``(M, K)`` float32.
        routing: Iterations, leak and gradient mode.
        block_size: Input capsules that one thread block of the forward pass adds up, rounded up to 16; None
            chooses by the number of thread blocks.
        precision: Of the matrix products. None and ``HIGHEST`` split float32 into three bfloat16 parts, which
            hold all its bits, ``HIGH`` into two; ``DEFAULT`` rounds to bfloat16.
        interpret: True, or parameters of JAX's emulator of GPUs, runs the kernels on any device.

    Returns:
        Output capsules ``(batch, M, K)`` float32.
    """
    exact = resolve_precision(inputs.dtype, precision)
    if interpret is True:
        # JAX 0.10 and 0.11 name the parameters of this emulator nowhere else.
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        interpret = InterpretGPUParams()
    return iterations.route(inputs, weights, bias, routing, _Hopper(routing, block_size, exact, interpret or None))


class _Arranged(NamedTuple):
    """Inputs (tiles, blocks, D · 64, 16) and weights (blocks, M, parts · K, D · 16), padded with zeros."""

    inputs: jax.Array
    weights: jax.Array
    plan: Plan


class _Hopper(NamedTuple):
    """The two passes on a Hopper GPU."""

    routing: Routing
    block_size: int | None
    precision: lax.Precision
    interpret: Any

    def arrange(self, inputs: jax.Array, weights: jax.Array) -> _Arranged:
        batch, number, depth = inputs.shape
        _, capsules, dim, _ = weights.shape
        plan = _plan(batch, number, capsules, dim, depth, weights.dtype, self.precision, self.routing, self.block_size)
        more = plan.blocks * COLUMNS - number
        u = jnp.pad(inputs, ((0, plan.tiles * ROWS - batch), (0, more), (0, plan.depth - depth)))
        w = jnp.pad(weights, ((0, more), (0, 0), (0, plan.dim - dim), (0, plan.depth - depth)))
        u = u.reshape(plan.tiles, ROWS, plan.blocks, COLUMNS, plan.depth).transpose(0, 2, 4, 1, 3)
        w = w.reshape(plan.blocks, COLUMNS, capsules, plan.dim, plan.depth).transpose(0, 2, 3, 4, 1)
        return _Arranged(
            u.reshape(plan.tiles, plan.blocks, plan.depth * ROWS, COLUMNS),
            _stack_parts(w.reshape(plan.blocks, capsules, plan.dim, plan.columns), plan),
            plan,
        )

    def sum_votes(self, arranged: _Arranged, direction: jax.Array) -> jax.Array:
        plan = arranged.plan
        partial = _launch("sums", plan, self.interpret, arranged.inputs, arranged.weights, _to_tiles(direction, plan))
        return _from_tiles(jnp.sum(partial[0], axis=0), direction.shape)

    def differentiate(
        self, arranged: _Arranged, direction: jax.Array, grad_sum: jax.Array
    ) -> tuple[jax.Array | None, tuple[jax.Array, jax.Array]]:
        plan = arranged.plan
        states = _to_tiles(direction, plan), _to_tiles(grad_sum, plan)
        grads = _launch("gradients", plan, self.interpret, arranged.inputs, arranged.weights, *states)
        grad_direction = _from_tiles(jnp.sum(grads[2], axis=0), direction.shape) if plan.full else None
        return grad_direction, (grads[0], jnp.sum(grads[1], axis=0))

    def restore(
        self, grads: tuple[jax.Array, jax.Array], inputs: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        batch, number, depth = inputs.shape
        _, capsules, dim, _ = weights.shape
        u = grads[0].transpose(0, 3, 1, 4, 2)
        w = grads[1].reshape(grads[1].shape[0], capsules, -1, COLUMNS, grads[1].shape[-1]).transpose(0, 3, 1, 4, 2)
        return (
            u.reshape(u.shape[0] * ROWS, -1, u.shape[-1])[:batch, :number, :depth],
            w.reshape(-1, *w.shape[2:])[:number, :, :dim, :depth],
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _launch(
    which: Literal["sums", "gradients"], plan: Plan, interpret: Any, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """Runs a kernel; compiled on its own, so that all iterations share one lowering, which takes seconds."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if which == "sums":
        body, scratch = sum_kernel, sum_scratch(plan, arrays[0].dtype)
        grid = {"tile": plan.tiles, "reach": plan.blocks // plan.reach}
        shapes = [(grid["reach"], *_state_shape(plan))]
    else:
        body, scratch = gradient_kernel, gradient_scratch(plan, arrays[0].dtype)
        grid = {"block": plan.blocks, "group": plan.tiles // plan.group}
        shapes = [
            (plan.tiles, plan.blocks, plan.depth, ROWS, COLUMNS),
            (grid["group"], plan.blocks, plan.capsules, plan.columns, plan.dim),
        ]
        if plan.full:
            shapes.append((plan.blocks, *_state_shape(plan)))
    outputs = plgpu.kernel(
        functools.partial(body, plan, bool(interpret)),
        out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        # Layouts of registers are inferred; JAX 0.11 made this the default.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name=f"capsule_{which}",
    )(*arrays)
    # Inside a shard_map the kernel's outputs pass for equal on all devices, which they are not.
    return common_variation(arrays[0], *outputs)[1:]


def _plan(
    batch: int,
    number: int,
    capsules: int,
    dim: int,
    depth: int,
    dtype: jnp.dtype,
    precision: lax.Precision,
    routing: Routing,
    block_size: int | None,
) -> Plan:
    blocks = -(-number // COLUMNS)
    tiles = -(-batch // ROWS)
    groups = min(tiles, -(-_THREAD_BLOCKS // blocks))
    group = -(-tiles // groups)
    plan = Plan(
        capsules=capsules,
        dim=_round_up(dim, 16),
        depth=_round_up(depth, 4),
        parts=count_parts(dtype, precision),
        blocks=blocks,
        reach=1,
        tiles=_round_up(tiles, group),
        group=group,
        sum_slots=1,
        gradient_slots=1,
        leaky=routing.leaky,
        full=routing.gradient == "full",
    )
    # As many blocks in one thread block as leave enough of these, and as its shared memory holds.
    wished = -(-block_size // COLUMNS) if block_size else max(1, blocks * plan.tiles // _THREAD_BLOCKS)
    room = _SHARED_LIMIT if block_size else _SHARED_AIM
    reach = min(wished, blocks)
    while reach > 1 and _sum_bytes(plan._replace(reach=reach, sum_slots=2), dtype) > room:
        reach -= 1
    plan = plan._replace(reach=reach, blocks=_round_up(blocks, reach))
    return plan._replace(
        sum_slots=_slots(capsules * reach, lambda slots: _sum_bytes(plan._replace(sum_slots=slots), dtype)),
        gradient_slots=_slots(capsules, lambda slots: _gradient_bytes(plan._replace(gradient_slots=slots), dtype)),
    )


def _slots(steps: int, needed: Callable[[int], int]) -> int:
    """Slots of a ring: every step's, filled once, is best; else four keep the TMA busy, and one is the least."""
    for room, choices in ((_SHARED_AIM, (steps, 4, 3, 2)), (_SHARED_LIMIT, (4, 3, 2))):
        for slots in choices:
            if needed(slots) <= room:
                return slots
    return 1


def _sum_bytes(plan: Plan, dtype: jnp.dtype) -> int:
    """Shared memory of a thread block of the sum kernel."""
    inputs = plan.reach * plan.columns * ROWS * dtype.itemsize
    slots = plan.sum_slots * plan.parts * plan.dim * (plan.columns + ROWS) * 2
    return inputs + slots + plan.parts * ROWS * plan.width * 2 + 2 * plan.reach * ROWS * COLUMNS * 4


def _gradient_bytes(plan: Plan, dtype: jnp.dtype) -> int:
    """Shared memory of a thread block of the gradient kernel."""
    inputs = plan.columns * ROWS * dtype.itemsize
    slots = plan.gradient_slots * plan.parts * plan.dim * (plan.columns + 2 * ROWS) * 2
    return inputs + slots + 2 * plan.parts * ROWS * ROWS * 2 + 3 * ROWS * COLUMNS * 4


def _stack_parts(x: jax.Array, plan: Plan) -> jax.Array:
    """(..., rows, columns) to bfloat16 (..., parts · rows, columns)."""
    if x.dtype == jnp.bfloat16:
        return x
    return jnp.concatenate(split(x, plan.parts), axis=-2)


def _state_shape(plan: Plan) -> tuple[int, int, int, int]:
    return plan.tiles, plan.capsules, ROWS, plan.dim


def _to_tiles(state: jax.Array, plan: Plan) -> jax.Array:
    """(batch, M, K) to bfloat16 (tiles, M, parts · 64, K)."""
    batch, capsules, dim = state.shape
    padded = jnp.pad(state, ((0, plan.tiles * ROWS - batch), (0, 0), (0, plan.dim - dim)))
    return _stack_parts(padded.reshape(plan.tiles, ROWS, capsules, plan.dim).transpose(0, 2, 1, 3), plan)


def _from_tiles(tiles: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    batch, capsules, dim = shape
    return tiles.transpose(0, 2, 1, 3).reshape(-1, capsules, tiles.shape[3])[:batch, :, :dim]


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
