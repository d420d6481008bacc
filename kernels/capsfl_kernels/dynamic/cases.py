"""Shapes of fully connected routing that tests and benchmarks share."""

from typing import NamedTuple


class Case(NamedTuple):
    """One routing: batch, N input capsules of dimension D, M output capsules of dimension K, iterations."""

    batch: int
    inputs: int
    depth: int
    capsules: int
    dim: int
    num_iters: int = 3


TINY = Case(batch=2, inputs=5, depth=3, capsules=4, dim=6)
ONE_OUTPUT = Case(batch=3, inputs=7, depth=4, capsules=1, dim=5)
ONE_ITERATION = Case(batch=3, inputs=7, depth=4, capsules=3, dim=5, num_iters=1)
SINGLE_INPUT = Case(batch=1, inputs=1, depth=1, capsules=2, dim=1, num_iters=4)
# Axes that loops over a few terms at a time leave a rest of.
MANY_CLASSES = Case(batch=2, inputs=3, depth=2, capsules=34, dim=2)
DEEP = Case(batch=2, inputs=3, depth=34, capsules=2, dim=2)
MODERATE = Case(batch=128, inputs=1024, depth=8, capsules=16, dim=16)
# The digit capsules of Sabour et al. 2017 on MNIST.
DIGITS = Case(batch=128, inputs=1152, depth=8, capsules=10, dim=16)
# Its inputs from a plane four times as large, and its outputs for a hundred classes (CIFAR-100).
MANY_INPUTS = Case(batch=128, inputs=4608, depth=8, capsules=10, dim=16)
MANY_OUTPUTS = Case(batch=128, inputs=1152, depth=8, capsules=100, dim=16)

SMALL = (TINY, ONE_OUTPUT, ONE_ITERATION, SINGLE_INPUT)
