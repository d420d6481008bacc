"""Shapes of votes that tests and benchmarks share."""

from typing import NamedTuple


class Case(NamedTuple):
    """One routing of votes: positions, input types, M output capsules of dimension K, iterations."""

    positions: tuple[int, ...]
    inputs: int
    capsules: int
    dim: int
    num_iters: int = 3


TINY = Case(positions=(2, 3), inputs=4, capsules=3, dim=5)
NO_POSITION_AXIS = Case(positions=(), inputs=6, capsules=2, dim=3, num_iters=2)
ONE_ITERATION = Case(positions=(5,), inputs=3, capsules=4, dim=2, num_iters=1)
MODERATE = Case(positions=(2, 64, 64), inputs=8, capsules=4, dim=16)

SMALL = (TINY, NO_POSITION_AXIS, ONE_ITERATION)
