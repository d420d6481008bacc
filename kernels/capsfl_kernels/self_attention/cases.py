"""Shapes of self-attention routing that tests and benchmarks share."""

from typing import NamedTuple


class Case(NamedTuple):
    """One routing: batch, N input capsules of dimension D, M output capsules of dimension K."""

    batch: int
    inputs: int
    depth: int
    capsules: int
    dim: int


TINY = Case(batch=2, inputs=5, depth=3, capsules=4, dim=6)
ONE_OUTPUT = Case(batch=3, inputs=7, depth=4, capsules=1, dim=5)
SINGLE_INPUT = Case(batch=1, inputs=1, depth=1, capsules=2, dim=1)
MODERATE = Case(batch=64, inputs=512, depth=8, capsules=10, dim=16)
# The digit capsules of Mazzia et al. 2021 on MNIST.
EFFICIENT = Case(batch=128, inputs=16, depth=8, capsules=10, dim=16)
# Those of Sabour et al. 2017, routed by self-attention.
DIGITS = Case(batch=128, inputs=1152, depth=8, capsules=10, dim=16)

SMALL = (TINY, ONE_OUTPUT, SINGLE_INPUT)
