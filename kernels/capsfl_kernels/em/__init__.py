"""Capsules routed by expectation-maximisation: `capsfl_kernels.em_routing`, `capsfl_kernels.em_capsules`."""
