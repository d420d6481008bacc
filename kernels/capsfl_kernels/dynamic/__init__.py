"""Fully connected capsules: `capsfl_kernels.dynamic_routing`."""
