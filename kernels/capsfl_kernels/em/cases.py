"""Shapes of EM routing that tests and benchmarks share."""

from typing import NamedTuple


class Votes(NamedTuple):
    """One routing of votes: positions, I inputs, J outputs, pose components K, iterations."""

    positions: tuple[int, ...]
    inputs: int
    outputs: int
    dim: int
    num_iters: int = 3


class Capsules(NamedTuple):
    """Fully connected matrix capsules: batch, I inputs, J outputs, poses (P, Q) to (P, R), iterations."""

    batch: int
    inputs: int
    outputs: int
    rows: int
    inner: int
    columns: int
    num_iters: int = 3


TINY_VOTES = Votes(positions=(2, 2), inputs=4, outputs=3, dim=5)
NO_POSITION_AXIS = Votes(positions=(), inputs=6, outputs=2, dim=3, num_iters=2)
ONE_ITERATION = Votes(positions=(3,), inputs=3, outputs=4, dim=2, num_iters=1)
ONE_OUTPUT = Votes(positions=(2,), inputs=4, outputs=1, dim=2)
# A convolutional layer of Hinton et al. 2018: 3x3 windows of 8 types, 16 output types, 4x4 poses.
WINDOWS = Votes(positions=(4, 7, 7), inputs=72, outputs=16, dim=16)

TINY_CAPSULES = Capsules(batch=2, inputs=5, outputs=3, rows=2, inner=3, columns=2)
VECTORS = Capsules(batch=2, inputs=4, outputs=3, rows=1, inner=3, columns=4, num_iters=2)
ONE_EACH = Capsules(batch=1, inputs=1, outputs=1, rows=1, inner=1, columns=1)
MODERATE = Capsules(batch=32, inputs=256, outputs=10, rows=4, inner=4, columns=4)
# The largest fully connected layer that 32 types of 6x6 positions make, routed to ten classes.
CLASSES = Capsules(batch=32, inputs=1152, outputs=10, rows=4, inner=4, columns=4)

SMALL_VOTES = (TINY_VOTES, NO_POSITION_AXIS, ONE_ITERATION, ONE_OUTPUT)
SMALL_CAPSULES = (TINY_CAPSULES, VECTORS, ONE_EACH)
