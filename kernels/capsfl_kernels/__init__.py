"""Capsule routing operators for JAX that never store the votes."""

import jax

# Before any import below, which an old jax would fail in some way that does not name it.
if tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 10):
    raise ImportError(f"capsfl_kernels needs jax 0.10 or later, but jax {jax.__version__} is installed; upgrade jax")

from capsfl_kernels.convolutional.api import conv_capsules
from capsfl_kernels.dynamic.api import dynamic_routing
from capsfl_kernels.em.api import em_capsules, em_routing
from capsfl_kernels.self_attention.api import self_attention_routing
from capsfl_kernels.squash import squash
from capsfl_kernels.votes.api import route_votes

__all__ = [
    "conv_capsules",
    "dynamic_routing",
    "em_capsules",
    "em_routing",
    "route_votes",
    "self_attention_routing",
    "squash",
]
