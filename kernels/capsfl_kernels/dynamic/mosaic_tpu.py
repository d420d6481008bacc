"""Fully connected capsules on a TPU: one Pallas kernel per iteration, forward and backward.

The grid is (groups of batch tiles, splits of N, blocks of a split, batch tiles of a group). The innermost axis walks
the batch, so a block of weights is fetched once per group and its gradient is summed in VMEM over the group; the
sums s (or the gradient of V) of a whole group stay in VMEM while the blocks of a split pass. Splits are parallel,
their partial sums are added afterwards. With a batch of one group, all of it is read and written once. What a block
does is in `mosaic_tpu_kernels`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.dynamic import iterations
from capsfl_kernels.dynamic.mosaic_tpu_kernels import LANES, Plan, gradient_kernel, sum_kernel
from capsfl_kernels.dynamic.precision import resolve_precision
from capsfl_kernels.votes.tile import Routing

# Two cores share a chip (v4, v5p, v7x): each takes half of the blocks. A chip with one core runs them in turn.
_SPLITS = 2
# The compiler grants a kernel 16 MiB of VMEM on the smallest chips; blocks are sized for less than that, and
# what cannot be cut smaller may take up to half of the 128 MiB (64 on v7x) that newer chips hold.
_VMEM_AIM = 10 << 20
_VMEM_LIMIT = 48 << 20


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
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        return f"takes float32 and bfloat16, got {jnp.dtype(dtype).name}"
    try:
        resolve_precision(dtype, precision)
    except ValueError as error:
        return f"takes no such precision: {error}"
    plan = _plan(batch, number, capsules, dim, depth, jnp.dtype(dtype), None)
    needed = _vmem_bytes(plan, jnp.dtype(dtype))
    if needed > _VMEM_LIMIT:
        return f"needs {needed >> 20} MiB of VMEM for {capsules} output capsules, more than {_VMEM_LIMIT >> 20}"
    platforms = sorted({device.platform for device in jax.devices()})
    if platforms != ["tpu"]:
        return f"needs a TPU; the devices here are {', '.join(platforms)}"
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
        block_size: Input capsules in one block, rounded up to whole sublane tiles; None chooses by VMEM.
        precision: Of the matrix products; None is float32 for float32, and ``HIGH``, which the matrix unit does
            not offer to kernels, runs as ``HIGHEST``.
        interpret: As in `jax.experimental.pallas.pallas_call`: True emulates the kernels on any device.

    Returns:
        Output capsules ``(batch, M, K)`` float32.
    """
    exact = resolve_precision(inputs.dtype, precision)
    if exact == lax.Precision.HIGH:
        exact = lax.Precision.HIGHEST
    return iterations.route(inputs, weights, bias, routing, _TensorCore(routing, block_size, exact, interpret))


class _Arranged(NamedTuple):
    """Inputs (blocks, tiles, D · n, 128) and weights (blocks, M, K, D · n), padded with zeros."""

    inputs: jax.Array
    weights: jax.Array
    plan: Plan


class _TensorCore(NamedTuple):
    """The two passes on a TPU's core."""

    routing: Routing
    block_size: int | None
    precision: lax.Precision
    interpret: Any

    def arrange(self, inputs: jax.Array, weights: jax.Array) -> _Arranged:
        batch, number, depth = inputs.shape
        _, capsules, dim, _ = weights.shape
        plan = _plan(batch, number, capsules, dim, depth, weights.dtype, self.block_size)
        blocks = plan.splits * plan.blocks
        tiles = plan.groups * plan.tiles
        more = blocks * plan.block - number
        u = jnp.pad(inputs, ((0, tiles * LANES - batch), (0, more), (0, 0)))
        w = jnp.pad(weights, ((0, more), (0, 0), (0, plan.dim - dim), (0, 0)))
        return _Arranged(
            u.reshape(tiles, LANES, blocks, plan.block, depth)
            .transpose(2, 0, 4, 3, 1)
            .reshape(blocks, tiles, plan.rows, LANES),
            w.reshape(blocks, plan.block, capsules, plan.dim, depth)
            .transpose(0, 2, 3, 4, 1)
            .reshape(blocks, capsules, plan.dim, plan.rows),
            plan,
        )

    def sum_votes(self, arranged: _Arranged, direction: jax.Array) -> jax.Array:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        plan = arranged.plan
        specs = _specs(plan)
        partial = pl.pallas_call(
            functools.partial(sum_kernel, self.routing, self.precision, plan),
            grid=(plan.groups, plan.splits, plan.blocks, plan.tiles),
            in_specs=[specs.inputs, specs.weights, specs.state],
            out_specs=specs.partial_state,
            out_shape=_shape((plan.splits, *_state_shape(plan)), jnp.float32, arranged.inputs),
            scratch_shapes=[pltpu.VMEM((plan.capsules, plan.block, LANES), jnp.float32)],
            compiler_params=_parameters(plan, arranged.weights.dtype),
            interpret=self.interpret,
            name="capsule_sums",
        )(arranged.inputs, arranged.weights, _to_tiles(direction, plan))
        return _from_tiles(jnp.sum(partial, axis=0), direction.shape)

    def differentiate(
        self, arranged: _Arranged, direction: jax.Array, grad_sum: jax.Array
    ) -> tuple[jax.Array | None, tuple[jax.Array, jax.Array]]:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        plan = arranged.plan
        specs = _specs(plan)
        blocks = plan.splits * plan.blocks
        full = self.routing.gradient == "full"
        out_specs = [specs.inputs, specs.grad_weights]
        out_shape = [
            _shape(arranged.inputs.shape, jnp.float32, arranged.inputs),
            _shape((plan.groups, blocks, *arranged.weights.shape[1:]), jnp.float32, arranged.inputs),
        ]
        if full:
            out_specs.append(specs.partial_state)
            out_shape.append(_shape((plan.splits, *_state_shape(plan)), jnp.float32, arranged.inputs))
        planes = pltpu.VMEM((plan.capsules, plan.block, LANES), jnp.float32)
        grads = pl.pallas_call(
            functools.partial(gradient_kernel, self.routing, self.precision, plan),
            grid=(plan.groups, plan.splits, plan.blocks, plan.tiles),
            in_specs=[specs.inputs, specs.weights, specs.state, specs.state],
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=[planes, planes],
            compiler_params=_parameters(plan, arranged.weights.dtype),
            interpret=self.interpret,
            name="capsule_gradients",
        )(arranged.inputs, arranged.weights, _to_tiles(direction, plan), _to_tiles(grad_sum, plan))
        grad_direction = _from_tiles(jnp.sum(grads[2], axis=0), direction.shape) if full else None
        return grad_direction, (grads[0], jnp.sum(grads[1], axis=0))

    def restore(
        self, grads: tuple[jax.Array, jax.Array], inputs: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        batch, number, depth = inputs.shape
        _, capsules, dim, _ = weights.shape
        grad_inputs, grad_weights = grads
        blocks, tiles, rows, lanes = grad_inputs.shape
        block = rows // depth
        u = grad_inputs.reshape(blocks, tiles, depth, block, lanes).transpose(1, 4, 0, 3, 2)
        w = grad_weights.reshape(blocks, capsules, -1, depth, block).transpose(0, 4, 1, 2, 3)
        return (
            u.reshape(tiles * lanes, blocks * block, depth)[:batch, :number],
            w.reshape(blocks * block, capsules, -1, depth)[:number, :, :dim],
        )


def _plan(
    batch: int, number: int, capsules: int, dim: int, depth: int, dtype: jnp.dtype, block_size: int | None
) -> Plan:
    # A sublane tile holds 8 rows of 32 bits or 16 of 16 bits.
    sublanes = 32 // dtype.itemsize
    padded_dim = _round_up(dim, sublanes)
    most = _round_up(min(block_size or LANES, number), sublanes)
    tiles = -(-batch // LANES)

    def cut(block: int, group: int) -> Plan:
        count = -(-number // block)
        splits = min(_SPLITS, count)
        groups = -(-tiles // group)
        return Plan(
            capsules=capsules,
            dim=padded_dim,
            depth=depth,
            block=block,
            blocks=-(-count // splits),
            splits=splits,
            tiles=-(-tiles // groups),
            groups=groups,
        )

    block = most
    if block_size is None:
        while block > sublanes and _vmem_bytes(cut(block, 1), dtype) > _VMEM_AIM:
            block = _round_up(block // 2, sublanes)
        # As many blocks, but equal ones: the last block of each split is then not mostly padding.
        shape = cut(block, 1)
        block = _round_up(-(-number // (shape.splits * shape.blocks)), sublanes)
    # Whatever room is left goes to a larger group, which saves reading the weights again.
    group = tiles
    while group > 1 and _vmem_bytes(cut(block, group), dtype) > _VMEM_AIM:
        group = -(-group // 2)
    return cut(block, group)


def _vmem_bytes(plan: Plan, dtype: jnp.dtype) -> int:
    """VMEM of the gradient kernel, the larger of the two; what the pipeline prefetches counts twice."""
    lanes = _round_up(plan.rows, LANES)
    weights = plan.capsules * plan.dim * lanes
    tile = plan.rows * LANES
    state = plan.tiles * plan.capsules * plan.dim * LANES
    planes = plan.capsules * plan.block * LANES
    # Values: inputs, both projections, both coupled inputs and their gradient, all in float32.
    return (
        2 * (weights * (dtype.itemsize + 4) + tile * (dtype.itemsize + 4) + 3 * state * 4)
        + 2 * planes * 4
        + 6 * tile * 4
    )


class _Specs(NamedTuple):
    inputs: Any
    weights: Any
    state: Any
    partial_state: Any
    grad_weights: Any


def _specs(plan: Plan) -> _Specs:
    """Blocks of the arrays at grid point (group, split, block, tile)."""
    from jax.experimental import pallas as pl

    state = (plan.tiles, plan.capsules, plan.dim, LANES)
    weights = (plan.capsules, plan.dim, plan.rows)
    return _Specs(
        inputs=pl.BlockSpec(
            (1, 1, plan.rows, LANES), lambda g, s, b, t: (s * plan.blocks + b, g * plan.tiles + t, 0, 0)
        ),
        weights=pl.BlockSpec((1, *weights), lambda g, s, b, t: (s * plan.blocks + b, 0, 0, 0)),
        state=pl.BlockSpec(state, lambda g, s, b, t: (g, 0, 0, 0)),
        partial_state=pl.BlockSpec((1, *state), lambda g, s, b, t: (s, g, 0, 0, 0)),
        grad_weights=pl.BlockSpec((1, 1, *weights), lambda g, s, b, t: (g, s * plan.blocks + b, 0, 0, 0)),
    )


def _parameters(plan: Plan, dtype: jnp.dtype) -> Any:
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=max(16 << 20, _vmem_bytes(plan, dtype) * 5 // 4),
    )


def _state_shape(plan: Plan) -> tuple[int, int, int, int]:
    return plan.groups * plan.tiles, plan.capsules, plan.dim, LANES


def _to_tiles(state: jax.Array, plan: Plan) -> jax.Array:
    """(batch, M, K) to (tiles, M, K, 128)."""
    batch, capsules, dim = state.shape
    tiles = plan.groups * plan.tiles
    padded = jnp.pad(state, ((0, tiles * LANES - batch), (0, 0), (0, plan.dim - dim)))
    return padded.reshape(tiles, LANES, capsules, plan.dim).transpose(0, 2, 3, 1)


def _from_tiles(tiles: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    batch, capsules, dim = shape
    flat = tiles.transpose(0, 3, 1, 2).reshape(-1, capsules, tiles.shape[2])
    return flat[:batch, :, :dim]


def _shape(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> Any:
    """An output of the kernel, varying over the mesh axes that its inputs vary over."""
    kind = getattr(jax.typeof(like), "manual_axis_type", None)
    return jax.ShapeDtypeStruct(shape, dtype, **({} if kind is None else {"manual_axis_type": kind}))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
