"""What the kernels of routing on a Hopper GPU share: their plan, the ring of shared memory, the products.

A thread block is one warpgroup. It holds 64 examples, the rows of a tensor core product, and runs twice over the
M output capsules: first for the softmax of the logits (kept as running maximum and total, as in FlashAttention, so
that M is bounded by nothing), then for what the couplings weigh. Per capsule the weights of 16 inputs (K, D · 16)
and the directions (64, K) come through a ring of shared memory that the TMA fills ahead. Columns are d-major:
component d of input i is column 16 · d + i, so that summing or weighing over D adds or multiplies registers.

Operands of the tensor cores are bfloat16; float32 ones come as sums of three of them (see `bfloat16`). Tiles of 16
columns with a swizzle of 32 bytes fit every operand here, for the products contract K, which is often 16.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.dynamic.bfloat16 import PRODUCTS, split

ROWS = 64
COLUMNS = 16
# Running maxima start here: infinity minus infinity would be NaN.
LOWEST = -1e30


class Plan(NamedTuple):
    """How arrays are cut: sizes after padding, and how many of each."""

    capsules: int
    dim: int  # K, a multiple of 16
    depth: int  # D, a multiple of 4
    parts: int  # bfloat16 parts of a float32
    blocks: int  # of 16 input capsules
    reach: int  # blocks that a thread block of the sum kernel adds up
    tiles: int  # of 64 examples
    group: int  # tiles that a thread block of the gradient kernel adds up
    sum_slots: int
    gradient_slots: int
    leaky: bool
    full: bool  # gradient through the couplings

    @property
    def columns(self) -> int:
        return self.depth * COLUMNS

    @property
    def width(self) -> int:
        """Columns that the sum kernel works on at once; three parts of more would take the room of a neighbour."""
        return 128 if self.depth % 8 == 0 and self.parts == 1 else 64


class Ring(NamedTuple):
    """Shared memory that the TMA fills ahead of use; what a step needs lies in slot ``step % slots``."""

    copies: Callable[[Any, Any], tuple]  # of a step into a slot, as (source, destination) pairs
    barriers: Any
    slots: int
    fetched: int  # steps whose copies are made; later ones find theirs in place

    def prime(self) -> None:
        for step in range(min(self.slots, self.fetched)):
            self._fetch(jnp.int32(step))

    def wait(self, step: jax.Array) -> jax.Array:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        slot = lax.rem(step, jnp.int32(self.slots))
        if self.slots < self.fetched:
            plgpu.barrier_wait(self.barriers.at[slot])
        else:

            @pl.when(step < self.fetched)
            def _():
                plgpu.barrier_wait(self.barriers.at[slot])

        return slot

    def advance(self, step: jax.Array) -> None:
        """Ends a step: its slot is filled for the step that uses it next."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        # A barrier as well: every warp must have done with the shared memory that is now overwritten.
        plgpu.commit_smem()
        if self.slots < self.fetched:

            @pl.when(step + self.slots < self.fetched)
            def _():
                self._fetch(step + self.slots)

    def _fetch(self, step: jax.Array) -> None:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        slot = lax.rem(step, jnp.int32(self.slots))
        for source, destination in self.copies(step, slot):
            plgpu.copy_gmem_to_smem(source, destination, self.barriers.at[slot])


def tiled(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory in swizzled tiles of 8 rows of 16, which the TMA writes and the tensor cores read."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    swizzle = COLUMNS * jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(swizzle)))


def plane(value: float) -> jax.Array:
    return jnp.full((ROWS, COLUMNS), value, jnp.float32)


def rows(index: Any, size: int) -> Any:
    from jax.experimental import pallas as pl

    return pl.ds(index * size, size)


def read_component(u_smem: Any, block: Any, d: int) -> jax.Array:
    """Component d of a block of inputs: float32 (64, 16)."""
    return u_smem[block, d * ROWS : (d + 1) * ROWS, :].astype(jnp.float32)


def piece(columns: jax.Array, offset: int) -> jax.Array:
    return columns[:, offset : offset + COLUMNS]


def load_global(ref: Any, emulated: bool) -> jax.Array:
    """Reads from device memory, for which no layout of registers counts as optimized."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if emulated:
        return ref[...]  # the only way to load that the emulator of JAX 0.10 and 0.11 knows
    # JAX 0.10 wants the index apart from the reference, which JAX 0.11 deprecates.
    apart = inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty
    return plgpu.load(ref, *([()] if apart else []), optimized=False)


def store_parts(smem: Any, offset: int, value: jax.Array) -> None:
    """Writes float32 (64, 16) as bfloat16 parts into the columns at `offset`."""
    for part, piece in enumerate(split(value, smem.shape[0])):
        smem[part, :, offset : offset + COLUMNS] = piece


def accumulate(body: Callable[..., Any], *shapes: tuple[int, int]) -> Any:
    """Runs `body` with zeroed accumulators of the tensor cores."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return pl.run_scoped(body, *(plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes))


def project(plan: Plan, slot: Any, start: int, width: int, w_smem: Any, v_smem: Any) -> jax.Array:
    """Columns `start` to `start + width` of the projection V W: (64, width)."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(projection: Any) -> jax.Array:
        for i, j in PRODUCTS[plan.parts]:
            weights = w_smem.at[slot, rows(j, plan.dim), slice(start, start + width)]
            plgpu.wgmma(projection, v_smem.at[slot, rows(i, ROWS), :], weights)
        return projection[...]

    return accumulate(body, (ROWS, width))


def multiply_transposed(accumulator: Any, a: Any, b: Any, emulated: bool) -> None:
    """Starts ``accumulator += a bᵀ``."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with_transposed(b, emulated, lambda turned: plgpu.wgmma(accumulator, a, turned))


def with_transposed(ref: Any, emulated: bool, use: Callable[[Any], None]) -> None:
    """Calls `use` with a transposed view; the emulator of JAX 0.10 and 0.11 knows none and is given a copy."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not emulated:
        use(ref.transpose((1, 0)))
        return

    def copy(turned: Any) -> None:
        turned[...] = ref[...].T
        use(turned)

    pl.run_scoped(copy, plgpu.SMEM(ref.shape[::-1], ref.dtype))
